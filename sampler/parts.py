"""The networks of a pipeline in memory: read when they are needed, and freed where memory is short."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmdit import MMDiT


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
    """Blocks that stay where they are and visit `device` one after the other, for the length of their call."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device):
        super().__init__(blocks)
        self.device = device

    def __iter__(self) -> Iterator[Callable]:
        for block in super().__iter__():
            yield Visit(block, self.device)


class Visit:
    """A call of a block with copies of its parameters on another device."""

    def __init__(self, block: nn.Module, device: torch.device):
        self.block, self.device = block, device

    def __call__(self, *arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        here = {name: tensor.to(self.device) for name, tensor in self.block.state_dict().items()}
        return functional_call(self.block, here, arguments)


def stream_blocks(model: MMDiT, device: torch.device) -> MMDiT:
    """The model with everything but its blocks on `device`; the blocks visit it one by one."""
    blocks = {name: getattr(model, name) for name in ("dual_blocks", "single_blocks")}
    for name in blocks:
        setattr(model, name, nn.ModuleList())
    model.to(device)
    for name, stay in blocks.items():
        setattr(model, name, StreamedBlocks(stay, device))
    return model
