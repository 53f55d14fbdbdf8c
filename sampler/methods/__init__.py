"""Other ways to make a batch diverse, each in a file of its own, all through `Method`: pass one to a pipeline.

Lower guidance, the simplest of them, is an argument of every call already.
"""

from .cads import CADS
from .diverseflow import DiverseFlow
from .interval import IntervalGuidance
from .method import Method
from .particle import ParticleGuidance
from .sgi import GroupSelection
from .sparke import SPARKE

METHODS: dict[str, type[Method]] = {  # as the command line names them
    "cads": CADS, "particle": ParticleGuidance, "sparke": SPARKE, "diverseflow": DiverseFlow,
    "interval": IntervalGuidance, "sgi": GroupSelection,
}  # fmt: skip

__all__ = ["CADS", "METHODS", "SPARKE", "DiverseFlow", "GroupSelection", "IntervalGuidance", "Method",
           "ParticleGuidance"]
