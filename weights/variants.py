"""Variants of the same sizes, FLUX.1-dev and Kontext, SD3.5-large and turbo, are told apart by what they are called."""

import re
from collections.abc import Collection
from pathlib import Path

CALLED = [  # a pattern in lower case; the first that fits counts
    ("flux1-kontext-dev", r"kontext"), ("flux1-dev", r"flux[^a-z]*dev(?![a-z])"),
    ("sd3.5-large-turbo", r"turbo"), ("sd3.5-large", r"3[._]?5[^a-z]*large(?![a-z])"),
]


def told_by_name(candidates: Collection[str], path: Path) -> str | None:
    """Which of the public names a checkpoint's file or folder, or one of those around it, suggests; None: nothing does.

    One candidate alone is it. The nearest name counts. Four folders up: in a hub's cache a repository's is
    models--org--name/snapshots/<hash>/transformer.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    for place in (path.absolute(), path.resolve()):
        for name in (place.name, *(folder.name for folder in place.parents[:4])):
            for variant, pattern in CALLED:
                if variant in candidates and re.search(pattern, name.lower()):
                    return variant
    return None
