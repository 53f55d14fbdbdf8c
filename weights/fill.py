"""Fill a module on the meta device with stored numbers, each parameter read directly into its memory."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn

from mmdit.float8 import Float8Linear, Float8Modulation
from mmdit.layers import Modulation

from .files import DTYPES, FLOAT8, TensorEntry, read_into, read_scale, read_tensor
from .names import UNCHANGED, Layout, Sizes, Transform

THREADS = 4  # that read in parallel


def keep_float8(model: nn.Module, layout: Layout, sizes: Sizes, entries: Mapping[str, TensorEntry]) -> None:
    """Replace the linear layers of blocks whose weights are stored in float8 by `Float8Linear`, still on meta.

    Layers outside the blocks are converted to a wider dtype: they are small, and the model computes in their dtype.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or not ("blocks." in name or "layers." in name):
            continue
        parts = [entries[theirs] for theirs in layout.find(f"{name}.weight", sizes)[0]]
        if parts[0].dtype in FLOAT8 and len({part.dtype for part in parts}) == 1:
            kind = Float8Modulation if isinstance(module, Modulation) else Float8Linear
            model.set_submodule(name, kind(module.in_features, module.out_features, DTYPES[parts[0].dtype],
                                           module.bias is not None, any(part.scale for part in parts)))


def fill(model: nn.Module, layout: Layout, sizes: Sizes, entries: Mapping[str, TensorEntry], dtype: torch.dtype | None,
         device: str | torch.device) -> None:
    """Allocate every tensor of `model` on `device` and read the stored numbers into it.

    Tensors that the file stores separately are concatenated. `dtype` None keeps the stored dtype, except for float8
    outside of `Float8Linear`, which becomes bfloat16.
    """
    state, jobs = {}, []
    for name, empty in model.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        kept = isinstance(module, Float8Linear) and not name.endswith(".bias")  # a matrix in float8, or its scale
        theirs, transform = layout.find(name.replace(".scale", ".weight") if kept else name, sizes)
        parts = [entries[n] for n in theirs]
        if kept and name.endswith(".scale"):
            state[name] = transform.read(_scale(parts), sizes.patch).to(device)
            continue
        if kept:
            parts = [replace(part, scale=None) for part in parts]
        dtype_here = empty.dtype if kept else dtype or _stored_dtype(parts)
        state[name] = torch.empty(empty.shape, device=device, dtype=dtype_here)
        jobs.append((state[name], parts, transform, sizes.patch))
    with ThreadPoolExecutor(THREADS) as threads:  # the first write to new memory is slow
        list(threads.map(_read, *zip(*jobs, strict=True)))
    model.load_state_dict(state, assign=True)


def _read(target: Tensor, parts: list[TensorEntry], transform: Transform, patch: int) -> None:
    """Read one parameter from the tensor, or the several tensors, that the file stores it as."""
    if transform is UNCHANGED:
        for piece, part in zip(target.split([part.shape[0] for part in parts]), parts, strict=True):
            read_into(piece, part)
        return
    as_stored = all(DTYPES[part.dtype] == target.dtype for part in parts)
    wide = target.dtype if as_stored else torch.promote_types(target.dtype, torch.float32)
    target.copy_(transform.read(torch.cat([read_tensor(part, wide) for part in parts]), patch))


def _stored_dtype(parts: list[TensorEntry]) -> torch.dtype:
    """The dtype that the parts' dtypes promote to, with float8 counted as bfloat16."""
    stored = [torch.bfloat16 if part.dtype in FLOAT8 else DTYPES[part.dtype] for part in parts]
    return reduce(torch.promote_types, stored)


def _scale(parts: list[TensorEntry]) -> Tensor:
    """One scale for each row of a fused matrix: (rows, 1) float32."""
    return torch.cat([read_scale(part) if part.scale else torch.ones(part.shape[0], 1) for part in parts])
