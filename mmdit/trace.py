"""`trace`: named intermediate tensors of a forward pass, without a line in the models.

While it is on, hooks record the inputs and outputs of every module, a `TorchFunctionMode` those of each attention, and
a wrapper of each block's `push` the tokens before and after repulsion. A name is the module's path, with `dual` for
`dual_blocks` and `single` for `single_blocks`, and what is recorded there:

    <place>.in, <place>.out            a module of one argument: image_in.out, dual.0.image.mlp.in
    <place>.<argument>.in              of several: latent.in (of the MMDiT itself), dual.0.context.in, dual.0.image.in
    <place>.<what>.out                 velocity (MMDiT), context and image (dual-stream block, joint attention), tokens
                                       (single-stream block), last, penultimate, unprojected and pooled (CLIP)
    <place>.modulation.<part>.out      shift, scale, gate, then mlp_…, and second_… where there is a second attention
    <place>.attention.q, k, v, attended    (b, h, n, k): q and k after norm and position; what the softmax reads
    <block>.repulsion.in, out          the tokens before and after the push
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention import JointAttention
from .blocks import DualBlock, SingleBlock
from .layers import Modulation
from .model import MMDiT

PARTS = ("shift", "scale", "gate", "mlp_shift", "mlp_scale", "mlp_gate", "second_shift", "second_scale", "second_gate")
OUTPUTS = {MMDiT: ("velocity",), DualBlock: ("context", "image"), JointAttention: ("context", "image"),
           SingleBlock: ("tokens",), Modulation: PARTS}
ATTENTION = F.scaled_dot_product_attention


@contextmanager
def trace(model: nn.Module,
          only: str | tuple[str, ...] | Callable[[str], bool] = "") -> Iterator[list[dict[str, Tensor]]]:
    """Record what a network of this package, or a module of it, computes while the `with` block runs.

    Yields a list to which each forward pass adds a dict, name → tensor, in the order of computation; an autoencoder's
    encoder and decoder are a pass each. `only` keeps the names that begin so, or for which it returns True: all of a
    large model is more than fits in memory. The tensors are the pass's own, detached and not copied; what the model
    returns is the same to the bit as without.
    """
    recorder = _Recorder(only if callable(only) else lambda name: name.startswith(only))
    handles = []
    try:
        for path, module in model.named_modules():
            place = path.replace("dual_blocks.", "dual.").replace("single_blocks.", "single.")
            handles.append(module.register_forward_pre_hook(partial(recorder.enter, place), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(recorder.leave, place), always_call=True))
        with recorder:
            yield recorder.passes
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchFunctionMode):
    def __init__(self, wanted: Callable[[str], bool]):
        super().__init__()
        self.wanted = wanted
        self.passes: list[dict[str, Tensor]] = []
        self.running: list[str] = []  # the places entered and not yet left

    def keep(self, place: str, what: str, value: Any) -> None:
        name = f"{place}.{what}".removeprefix(".")
        if isinstance(value, Tensor) and self.wanted(name):
            self.passes[-1][name] = value.detach()

    def enter(self, place: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.running:
            self.passes.append({})
        self.running.append(place)
        call = inspect.signature(partial(type(module).forward, module)).bind(*args, **kwargs)  # compiled or not
        for argument, value in call.arguments.items():
            self.keep(place, f"{argument}.in" if len(call.signature.parameters) > 1 else "in", value)
        if isinstance(module, DualBlock | SingleBlock) and call.arguments.get("push"):
            call.arguments["push"] = partial(self.pushed, place, call.arguments["push"])
            return call.args, call.kwargs
        return None

    def leave(self, place: str, module: nn.Module, args: tuple, output: Any) -> None:
        self.running.pop()
        kinds = [names for kind, names in OUTPUTS.items() if isinstance(module, kind)]
        names = kinds[0] if kinds else getattr(output, "_fields", None)
        if isinstance(module, Modulation):
            output = tuple(vector for triple in output for vector in triple if vector is not None)
        if names is None:
            self.keep(place, "out", output)
        else:
            for name, value in zip(names, output if isinstance(output, tuple) else (output,), strict=False):
                self.keep(place, f"{name}.out", value)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is ATTENTION and self.running:
            place = self.running[-1]
            if not place.endswith("attention"):  # a single-stream block has no module for it
                place += ".attention"
            for what, tensor in zip(("q", "k", "v", "attended"), (*args[:3], result), strict=True):
                self.keep(place, what, tensor)
        return result

    def pushed(self, place: str, push: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        self.keep(place, "repulsion.in", tokens)
        tokens = push(tokens)
        self.keep(place, "repulsion.out", tokens)
        return tokens
