"""Scenes for the tests of the experiments."""

import random

from tiny.world import sample_scene


def scenes_of(count, seed):
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]
