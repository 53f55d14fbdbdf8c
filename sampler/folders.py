"""Folders of results: a name is claimed before the work, and everything appears under it in one step, or nothing."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from .options import METHODS

try:
    import fcntl
except ImportError:  # Windows, where two runs of one name at the same time are not kept apart
    fcntl = None

PICTURES = rf"summary\.json|compare\.png|(base|repelled|{'|'.join(METHODS)})(-\d+)?\.png"  # of `python -m sampler`


@dataclass
class Claim:
    """A folder's name that no other run can take: files are written to `work`, which becomes `target` at the end."""

    target: Path
    work: Path
    lock: int  # the descriptor that holds `work`


@contextmanager
def whole_folder(target: Path, overwrite: bool = False, *, numbered: bool = False,
                 ours: str = PICTURES) -> Iterator[Claim]:
    """Claims a folder's name while the block runs; all that was written then appears under that name in one step.

    A name is taken where something exists there or another run has claimed it: FileExistsError, or with `numbered` the
    claim is of the first free one of target-2, target-3, … `overwrite` replaces a folder of ours, see `refused`.
    OSError where nothing can be written. An error in the block leaves nothing of what was written.

    If the process is killed, the name holds what it held before or all that is new, and the hidden folder that remains
    is taken over by the next run of that name. What came there from elsewhere in the meantime stays: ours is numbered.
    """
    made = [folder for folder in Path(os.path.abspath(target)).parents if not os.path.lexists(folder)]
    names = numbers(target) if numbered else (target,)
    claim = next(filter(None, (take(name, overwrite, ours) for name in names)), None)
    if claim is None:
        raise FileExistsError(refused(target, overwrite, ours)
                              or f"{target} is being written by another run: choose another folder")
    try:
        yield claim
        publish(claim, overwrite, ours)
    except BaseException:
        remove(claim.work, ours)
        for folder in made:
            with suppress(OSError):  # others write there by now
                folder.rmdir()
        raise
    finally:
        os.close(claim.lock)


def take(target: Path, overwrite: bool, ours: str) -> Claim | None:
    """The claim of a name; None where it is taken."""
    if refused(target, overwrite, ours):
        return None
    place = Path(os.path.abspath(target))
    work = place.with_name(f".{place.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = hold(work)
    except OSError as error:
        if isinstance(error, FileExistsError) and not (work.is_file() or work.is_symlink()):
            return take(target, overwrite, ours)  # a run that finished in this moment has renamed it
        raise OSError(f"{target} cannot be written ({error.strerror}): choose another folder") from error
    if lock is None:
        return None
    if refused(target, overwrite, ours):  # by now: another run has finished
        remove(work, ours)
        os.close(lock)
        return None
    empty(work, ours)  # a killed run's
    return Claim(target, work, lock)


def hold(folder: Path, wait: bool = False) -> int | None:
    """A descriptor that holds a folder until it is closed or the process ends; None if another process holds it."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = None
    with suppress(BlockingIOError, FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # not renamed in between
            return descriptor
    if descriptor is not None:
        os.close(descriptor)
    return None


def publish(claim: Claim, overwrite: bool, ours: str) -> None:
    """Gives what was written its name, and deletes the folder that it replaces."""
    if refused(claim.target, overwrite, ours):  # it came while the pictures were painted
        claim.target = next(name for name in numbers(claim.target) if not os.path.lexists(name))
    if not os.path.lexists(claim.target):
        os.rename(claim.work, claim.target)
        return
    old = hold(claim.target, wait=True)  # or another run would take it for a killed run's under its hidden name
    exchange(claim.work, Path(os.path.abspath(claim.target)))
    remove(claim.work, ours)
    if old is not None:
        os.close(old)


def exchange(one: Path, other: Path) -> None:
    """Swaps the names of two folders in one step (Linux, macOS); elsewhere `other` is missing for a moment."""
    library, names = ctypes.CDLL(None) if os.name == "posix" else None, (os.fsencode(one), os.fsencode(other))
    if hasattr(library, "renameat2"):
        swapped = library.renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    else:
        swapped = hasattr(library, "renamex_np") and library.renamex_np(*names, 2) == 0  # RENAME_SWAP
    if not swapped:  # a file system that cannot
        aside = one.with_name(f"{one.name}-old")
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)


def empty(folder: Path, ours: str) -> None:
    """Deletes our files in a folder, and nothing else."""
    for file in folder.iterdir():
        if re.fullmatch(ours, file.name):
            file.unlink()


def remove(folder: Path, ours: str) -> None:
    """Deletes a folder of ours; what else is in it stays."""
    with suppress(OSError):
        empty(folder, ours)
        folder.rmdir()


def refused(target: Path, overwrite: bool, ours: str) -> str | None:
    """Why nothing may be written to `target`; None where nothing is there, or with `overwrite` a folder of ours alone.

    Such a folder has only files whose names match `ours`, with a JSON file among them; or none.
    """
    if not os.path.lexists(target):
        return None
    if not overwrite:
        return f"{target} exists already: choose another folder, or say --overwrite"
    if target.is_symlink() or not target.is_dir():
        return f"{target} is a file or a link, and --overwrite replaces folders alone: choose another folder"
    found = sorted(target.iterdir())
    foreign = [file for file in found if file.is_symlink() or not file.is_file() or not re.fullmatch(ours, file.name)]
    if found and not any(file.suffix == ".json" for file in found):
        foreign += found
    return f"{foreign[0]} is not ours, --overwrite would delete it: choose another folder" if foreign else None


def numbers(base: Path) -> Iterator[Path]:
    """`base`, base-2, base-3, …"""
    return (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in count(1))
