"""Variants of equal sizes (FLUX.1-dev and Kontext, SD3.5-large and turbo), told apart by file and folder names."""

import re
from collections.abc import Collection
from pathlib import Path

CALLED = [  # public name, pattern in lower case; the first match counts
    ("flux1-kontext-dev", r"kontext"), ("flux1-dev", r"flux[^a-z]*dev(?![a-z])"),
    ("sd3.5-large-turbo", r"turbo"), ("sd3.5-large", r"3[._]?5[^a-z]*large(?![a-z])"),
]


def told_by_name(candidates: Collection[str], path: Path) -> str | None:
    """The candidate that the name of a checkpoint's file or folder, or of a folder around it, suggests; None: none.

    A single candidate needs no name. The nearest name counts, at most four folders up: a repository in the hub's cache
    is models--org--name/snapshots/<hash>/transformer.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    for place in (path.absolute(), path.resolve()):
        for name in (place.name, *(folder.name for folder in place.parents[:4])):
            for variant, pattern in CALLED:
                if variant in candidates and re.search(pattern, name.lower()):
                    return variant
    return None
