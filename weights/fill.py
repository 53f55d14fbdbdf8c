"""A module on the meta device gets its numbers, one parameter at a time, each read straight to where it stays."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmdit.float8 import Float8Linear

from .files import DTYPES, FLOAT8, Entry, read_into, read_scale, read_tensor
from .names import SAME, Layout, Sizes

Stored = Mapping[str, Entry]  # under the layout's names


def keep_float8(model: nn.Module, layout: Layout, sizes: Sizes, entries: Stored) -> None:
    """Inside blocks and layers, linear layers that are stored in float8 become `Float8Linear`, still on meta.

    What stands before and after the blocks is widened: it is small, and its dtype is the one computed in.
    """
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or not ("blocks." in name or "layers." in name):
            continue
        theirs, transform = layout.find(f"{name}.weight", sizes)
        parts = [entries[n] for n in theirs]
        if transform is SAME and parts[0].dtype in FLOAT8 and len({part.dtype for part in parts}) == 1:
            scaled = any(part.scale for part in parts)
            slim = Float8Linear(module.in_features, module.out_features, DTYPES[parts[0].dtype],
                                module.bias is not None, scaled)
            model.set_submodule(name, slim.to("meta"))


def fill(model: nn.Module, layout: Layout, sizes: Sizes, entries: Stored, dtype: torch.dtype | None,
         device: str | torch.device) -> None:
    """Give every tensor of `model` memory on `device` and the stored numbers, fused where the file has them apart.

    `dtype` None keeps what is stored, but for float8 outside of `Float8Linear`, which becomes bfloat16.
    """
    state = {}
    for name, empty in model.state_dict().items():
        if name.endswith(".scale") and isinstance(model.get_submodule(name.removesuffix(".scale")), Float8Linear):
            theirs = layout.find(name.removesuffix("scale") + "weight", sizes)[0]
            state[name] = _scale([entries[n] for n in theirs]).to(device)
            continue
        theirs, transform = layout.find(name, sizes)
        parts = [entries[n] for n in theirs]
        target = torch.empty(empty.shape, device=device, dtype=_dtype(empty, parts, dtype))
        if transform is SAME:
            for piece, part in zip(target.split([part.shape[0] for part in parts]), parts, strict=True):
                _copy(piece, part, raw=empty.dtype in (torch.float8_e4m3fn, torch.float8_e5m2))
        else:
            wide = None if target.dtype == DTYPES[parts[0].dtype] else torch.float32
            target.copy_(transform.read(torch.cat([read_tensor(part, wide) for part in parts]), sizes.patch))
        state[name] = target
    model.load_state_dict(state, assign=True)


def _dtype(empty: Tensor, parts: list[Entry], asked: torch.dtype | None) -> torch.dtype:
    if empty.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return empty.dtype
    if asked is not None:
        return asked
    stored = [torch.bfloat16 if part.dtype in FLOAT8 else DTYPES.get(part.dtype, torch.float32) for part in parts]
    widest = stored[0]
    for other in stored[1:]:
        widest = torch.promote_types(widest, other)
    return widest


def _copy(piece: Tensor, part: Entry, raw: bool) -> None:
    """`raw`: float8 that stays float8, its scale kept apart."""
    read_into(piece, Entry(part.file, part.name, part.dtype, part.shape, part.start) if raw else part)


def _scale(parts: list[Entry]) -> Tensor:
    """One scale for each row of a fused matrix: (rows, 1) float32."""
    scales = [read_scale(part) if part.scale else torch.ones(()) for part in parts]
    return torch.cat([scale.expand(part.shape[0], 1) for scale, part in zip(scales, parts, strict=True)])
