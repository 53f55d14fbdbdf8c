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

CHOICE = [  # others like them, on which settings are chosen; what is reported is measured on OPEN
    "a medium circle", "a large square", "a small triangle", "a large star", "a medium cross", "a small ring",
    "a circle on a teal ground", "a square at the top", "a triangle on the right", "a star on a checked ground",
    "a cross on a plain ground", "a ring on a dotted ground", "a blue shape", "a purple shape",
    "a white shape at the top", "a triangle and a ring", "a square above a circle", "a star left of a cross",
    "a ring, a cross and a circle", "a star, a triangle and a square in a column",
]  # fmt: skip


def full_prompts(count: int, seed: int = 2024) -> list[str]:
    """Prompts that say everything."""
    rng = random.Random(seed)
    return [describe(sample_scene(rng)) for _ in range(count)]
