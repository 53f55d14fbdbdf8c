"""The tiny world, on which the bundled checkpoints were trained: scenes, renderer, captions, reader of pictures."""

from .captions import describe, parse
from .reader import adherence, attribute_vectors, read
from .world import Scene, Thing, render, sample_scene

__all__ = [
    "Scene", "Thing", "adherence", "attribute_vectors", "describe", "parse", "read", "render", "sample_scene",
]
