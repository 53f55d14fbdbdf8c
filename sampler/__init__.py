"""From a prompt to pictures: schedules, the sampling loop, guidance, pipelines, the command line."""

from .guidance import SkipLayerGuidance
from .pipeline import Pipeline
from .schedule import denoise, sigmas, starting_noise

__all__ = ["Pipeline", "SkipLayerGuidance", "denoise", "sigmas", "starting_noise"]
