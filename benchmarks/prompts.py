"""What the tiny world's checkpoints are asked for in measurements."""

import random

from tiny.captions import describe
from tiny.world import sample_scene

OPEN = [  # each leaves most attributes to the model
    "a circle", "a square", "a triangle", "a star", "a cross", "a ring",
    "a large circle", "a small square", "a triangle on a striped ground", "a star on a plain ground",
    "a cross on the left", "a ring at the bottom", "a red shape", "a yellow shape", "a green shape in the center",
    "a circle and a square", "a star above a ring", "a cross left of a triangle", "a circle, a star and a ring",
    "a square, a triangle and a cross in a row",
]  # fmt: skip


def full_prompts(count: int, seed: int = 2024) -> list[str]:
    """Prompts that say everything."""
    rng = random.Random(seed)
    return [describe(sample_scene(rng)) for _ in range(count)]
