"""From a prompt to pictures: schedules, the sampling loop, guidance, pipelines, the command line.

A name is imported when it is first used: `python -m sampler --help` answers without torch.
"""

from importlib import import_module

__all__ = ["Pipeline", "SkipLayerGuidance", "denoise", "sigmas", "starting_noise"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = {"Pipeline": "pipeline", "SkipLayerGuidance": "guidance"}.get(name, "schedule")
    return getattr(import_module(f".{file}", __name__), name)
