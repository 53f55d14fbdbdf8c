"""From a prompt to pictures: schedules, the Euler loop, guidance, pipelines, the command line."""

from .guidance import SkipLayerGuidance
from .pipeline import Pipeline
from .schedule import euler, sigmas, starting_noise

__all__ = ["Pipeline", "SkipLayerGuidance", "euler", "sigmas", "starting_noise"]
