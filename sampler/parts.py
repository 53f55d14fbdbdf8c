"""The networks of a pipeline in memory: read when they are needed, and freed where memory is short."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weights import Stored


class Part:
    """A network that is read when it is first used. `free`: and again each time, since it is freed after each use."""

    def __init__(self, load: Callable[[], nn.Module], free: bool = False):
        self._load, self._free, self._module = load, free, None

    @property
    def module(self) -> nn.Module:
        """The network, in memory from now on."""
        if self._module is None:
            self._module = self._load().eval().requires_grad_(False)
        return self._module

    @contextmanager
    def used(self) -> Iterator[nn.Module]:
        """The network, for as long as the block runs."""
        try:
            yield self.module
        finally:
            if self._free:
                self._module = None


def using(network: "Part | nn.Module"):
    """`Part.used`, for a network that may as well be in memory anyway."""
    return network.used() if isinstance(network, Part) else nullcontext(network)


class StreamedBlocks(nn.ModuleList):
    """Blocks that stay where they are and visit `device` one after the other, for the length of their call.

    There they are in `dtype` where that is wider than what they are kept in (None: as they are kept).
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, dtype: torch.dtype | None = None):
        super().__init__(blocks)
        self.device, self.dtype = device, dtype

    def __iter__(self) -> Iterator[Callable]:
        for block in super().__iter__():
            yield Visit(block, self.device, self.dtype)


class Visit:
    """A call of a block with copies of its parameters on another device, widened where that is asked."""

    def __init__(self, block: nn.Module, device: torch.device, dtype: torch.dtype | None):
        self.block, self.device, self.dtype = block, device, dtype

    def __call__(self, *arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        here = {name: tensor.to(self.device, self._dtype_of(tensor))
                for name, tensor in self.block.state_dict().items()}
        return functional_call(self.block, here, arguments)

    def _dtype_of(self, kept: Tensor) -> torch.dtype:
        widens = self.dtype is not None and 2 <= kept.itemsize < self.dtype.itemsize  # float8 widens as it is used
        return self.dtype if widens else kept.dtype


def stream_blocks(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with everything but its blocks on `device` in `dtype`; the blocks visit it one by one.

    Works for an MMDiT and for text encoders, whose blocks are called layers.
    """
    names = [name for name in ("dual_blocks", "single_blocks", "layers") if hasattr(model, name)]
    blocks = {name: getattr(model, name) for name in names}
    for name in blocks:
        setattr(model, name, nn.ModuleList())
    model.to(device, dtype)
    for name, stay in blocks.items():
        setattr(model, name, StreamedBlocks(stay, device, dtype))
    return model


def load_streamed(stored: Stored, dtype: torch.dtype, device: torch.device, keep_float8: bool) -> nn.Module:
    """A network that computes in `dtype` on `device`, and whose blocks stay in the CPU's memory, as they are stored
    where that is narrower."""
    as_stored = stored.narrowest.itemsize >= 2 and stored.widest.itemsize < dtype.itemsize
    return stream_blocks(stored.load(None if as_stored else dtype, "cpu", keep_float8), device, dtype)
