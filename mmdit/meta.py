"""Networks without memory: names, shapes and sizes alone."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _WithoutInit(TorchFunctionMode):
    """Leaves out the initialization of parameters, which on the meta device takes most of the time."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", *args[:1])
        return function(*args, **(kwargs or {}))


def on_meta(network: type[nn.Module], config: Any) -> nn.Module:
    """A network of these sizes on the meta device, such as `on_meta(MMDiT, PRESETS["flux1-dev"])`."""
    with torch.device("meta"), _WithoutInit():
        return network(config)
