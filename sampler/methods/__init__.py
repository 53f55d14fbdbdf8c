"""Other ways to make a batch diverse, each in a file of its own, all through `Method`: pass one to a pipeline.

Lower guidance, the simplest of them, is an argument of every call already.
"""

from .cads import CADS
from .cno import CNO
from .coupled import CoupledNoise
from .dave import DAVE
from .diverseflow import DiverseFlow
from .fsg import FeatureSelfGuidance
from .interval import IntervalGuidance
from .method import Method
from .particle import ParticleGuidance
from .pink import PinkNoise
from .seedvariance import SeedVariance
from .sgi import GroupSelection
from .sparke import SPARKE
from .stride import STRIDE
from .teacher import TeacherFirst

METHODS: dict[str, type[Method]] = {  # as the command line names them
    "cads": CADS, "particle": ParticleGuidance, "sparke": SPARKE, "diverseflow": DiverseFlow,
    "interval": IntervalGuidance, "sgi": GroupSelection, "fsg": FeatureSelfGuidance, "dave": DAVE, "stride": STRIDE,
    "coupled": CoupledNoise, "pink": PinkNoise, "seedvariance": SeedVariance, "teacher": TeacherFirst, "cno": CNO,
}  # fmt: skip

__all__ = ["CADS", "CNO", "DAVE", "METHODS", "SPARKE", "STRIDE", "CoupledNoise", "DiverseFlow", "FeatureSelfGuidance",
           "GroupSelection", "IntervalGuidance", "Method", "ParticleGuidance", "PinkNoise", "SeedVariance",
           "TeacherFirst"]
