"""The networks of a pipeline in memory: read when they are needed, and freed where memory is short."""

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmdit import MMDiT
from weights import Stored


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name. Raises ValueError where this machine or this build of torch has none such."""
    try:
        numbers = torch.zeros(1, device=name)
        numbers.tolist()  # which "meta" cannot
        return numbers.device
    except (RuntimeError, AssertionError) as error:
        why = "torch lacks it" if isinstance(error, NotImplementedError) else str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used here: {why}") from error


class Part:
    """A network that is read when it is first used. `free`: and again each time, since it is freed after each use."""

    def __init__(self, load: Callable[[], nn.Module], free: bool = False):
        self._load, self._free, self._module, self._uses = load, free, None, 0

    @property
    def module(self) -> nn.Module:
        """The network, in memory from now on."""
        if self._module is None:
            self._module = self._load().eval().requires_grad_(False)
        return self._module

    @contextmanager
    def used(self, now: bool = True) -> Iterator[nn.Module | None]:
        """The network, until the outermost such block ends. Not `now`: it is read when a block inside needs it."""
        self._uses += 1
        try:
            yield self.module if now else None
        finally:
            self._uses -= 1
            if self._free and not self._uses:
                self._module = None
                if dist.is_initialized():
                    gc.collect()  # a network that FSDP has sharded refers to itself


def finite(values: Tensor, network: str, also: str = "") -> Tensor:
    """What a network returned. Raises ValueError naming the network where it is NaN or infinite."""
    if not values.isfinite().all():
        raise ValueError(f"{network} returned NaN or infinity: try another dtype (bfloat16 and float32 reach further "
                         f"than float16){also}, and check its file with python -m weights FILE --check")
    return values


class StreamedBlocks(nn.ModuleList):
    """Blocks that stay in the CPU's memory and are copied to `device` one after the other, for the time of their call.

    There they are in `dtype` where that is wider than what they are kept in (None: as they are kept).
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, dtype: torch.dtype | None = None):
        super().__init__(blocks)
        self.device, self.dtype = device, dtype

    def __iter__(self) -> Iterator[Callable]:
        return (partial(self.run, block) for block in super().__iter__())

    def run(self, block: nn.Module, *arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The block's result, from copies of its parameters on `device`; float8 widens as it is used."""
        itemsize = 0 if self.dtype is None else self.dtype.itemsize
        here = {name: tensor.to(self.device, self.dtype if 2 <= tensor.itemsize < itemsize else tensor.dtype)
                for name, tensor in block.state_dict().items()}
        return functional_call(block, here, arguments)


def stream_blocks(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with everything but its blocks on `device` in `dtype`; the blocks are copied there one by one.

    Works for an MMDiT and for text encoders, whose blocks are called layers.
    """
    blocks = {name: found for name, found in model.named_children() if isinstance(found, nn.ModuleList)}
    for name in blocks:
        setattr(model, name, nn.ModuleList())
    model.to(device, dtype)
    for name, stay in blocks.items():
        setattr(model, name, StreamedBlocks(stay, device, dtype))
    return model


def compile_blocks(model: MMDiT, dynamic: bool | None = None) -> MMDiT:
    """The model with compiled blocks: all of a kind share one graph. A block that pushes runs uncompiled, since the
    push is arithmetic of numpy on B × B matrices. `dynamic` as of torch.compile: False, a graph for each shape."""
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.forward = gelu_by_sigmoid
    for block in (*model.dual_blocks, *model.single_blocks):
        block.forward = partial(run_compiled, block.forward, torch.compile(block.forward, dynamic=dynamic))
    return model


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """GELU in its tanh form, where it is compiled by 1 + tanh z = 2 sigmoid 2z: on a CPU exp is several times as fast
    as tanh. A block that runs uncompiled has torch's: there each operation here would round to its dtype."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid((8 / torch.pi) ** 0.5 * x * (1 + 0.044715 * x * x))


def run_compiled(eager: Callable, compiled: Callable, *inputs: Tensor | Callable | None) -> Tensor | tuple:
    """The result of a block, whose last input is its push or None."""
    return (eager if inputs[-1] else compiled)(*inputs)


def load_streamed(stored: Stored, dtype: torch.dtype, device: torch.device, keep_float8: bool) -> nn.Module:
    """A network that computes in `dtype` on `device`, and whose blocks stay in the CPU's memory, as they are stored
    where that is narrower."""
    narrow = stored.dtype.itemsize < dtype.itemsize
    return stream_blocks(stored.load(None if narrow else dtype, "cpu", keep_float8), device, dtype)


def load_sharded(stored: Stored, dtype: torch.dtype, device: torch.device, keep_float8: bool) -> nn.Module:
    """A network whose parameters are spread over the ranks by rows (FSDP2). A block's are gathered for the time of its
    call, what stands outside of the blocks for the time of the network's. Each rank reads its rows of the file alone.
    """
    from torch.distributed.fsdp import fully_shard  # here, since it takes longer than all of torch
    from torch.distributed.tensor import DTensor

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    if device.type == "cpu" and os.name == "posix":  # glibc: what takes 1 MiB or more goes back to the system
        getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(-3, 1 << 20)  # M_MMAP_THRESHOLD

    def own(rows: int) -> slice:
        each = -(-rows // mesh.size())  # as torch.chunk does
        return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)

    model, state = stored.read(dtype, device, keep_float8, own)
    model.requires_grad_(False)
    blocks = [block for blocks in model.children() if isinstance(blocks, nn.ModuleList) for block in blocks]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name, whole in model.named_parameters():
        state[name] = DTensor.from_local(state[name], mesh, whole.placements, run_check=False, shape=whole.shape,
                                         stride=whole.stride())
    model.load_state_dict(state, assign=True)
    return model
