"""Folders of results: whose name is whose, what --overwrite may replace, and kill −9 and races with real processes."""

import inspect
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sampler import folders
from sampler.folders import whole_folder

ROOT = Path(__file__).parents[2]
FILES = ["base-00.png", "base-01.png", "base.png", "compare.png", "repelled-00.png", "repelled.png", "summary.json"]


def write(folder, text, names=FILES):
    for name in names:
        (folder / name).write_text(text)


def texts(folder):
    """The distinct contents of a folder that has all of the files, and nothing else."""
    assert sorted(file.name for file in folder.iterdir()) == FILES
    return {file.read_text() for file in folder.iterdir()}


def hidden(place):
    return [file.name for file in place.iterdir() if file.name.startswith(".")]


def child(program, *arguments):
    """A Python process that runs the program, and answers on a pipe."""
    program = (f"import sys\nfrom pathlib import Path\nfrom sampler.folders import whole_folder\nFILES = {FILES}\n"
               f"{inspect.getsource(write)}{program}")
    return subprocess.Popen([sys.executable, "-u", "-c", program, *map(str, arguments)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, cwd=ROOT)


def killed(process):
    """The numbers that it printed until then."""
    process.kill()
    with process:
        return [int(line) for line in process.stdout.read().split()]


def contents(place):
    """Everything in a folder, to compare with later."""
    return sorted((str(file), file.is_symlink(), file.is_file() and file.read_text()) for file in place.rglob("*"))


# ---- one process


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with whole_folder(tmp_path / "new" / "a") as claim:
        write(claim.work, "1")
        assert not claim.target.exists()
    assert texts(tmp_path / "new" / "a") == {"1"} and hidden(tmp_path / "new") == []
    for error in (ValueError, KeyboardInterrupt):
        for target, overwrite in ((tmp_path / "x" / "y" / "b", False), (tmp_path / "new" / "a", True)):
            with pytest.raises(error), whole_folder(target, overwrite) as claim:
                write(claim.work, "2")
                raise error
    assert texts(tmp_path / "new" / "a") == {"1"} and [file.name for file in tmp_path.iterdir()] == ["new"]
    assert hidden(tmp_path / "new") == []


def test_names_are_numbered_and_a_claimed_one_counts_as_taken(tmp_path):
    with whole_folder(tmp_path / "a", numbered=True) as one, whole_folder(tmp_path / "a", numbered=True) as two:
        assert (one.target.name, two.target.name) == ("a", "a-2")
        with pytest.raises(FileExistsError, match="a is being written by another run"), whole_folder(tmp_path / "a"):
            pass
        write(two.work, "2"), write(one.work, "1")
    with whole_folder(tmp_path / "a", numbered=True) as three:
        assert three.target.name == "a-3"
    assert texts(tmp_path / "a") == {"1"} and texts(tmp_path / "a-2") == {"2"}


def test_what_comes_under_the_name_meanwhile_stays_and_nothing_is_lost(tmp_path):
    with whole_folder(tmp_path / "a") as claim:
        write(claim.work, "ours")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "letter.txt").write_text("theirs")
    assert claim.target.name == "a-2" and texts(tmp_path / "a-2") == {"ours"}
    write(tmp_path / "a-2", "old")
    with whole_folder(tmp_path / "a-2", overwrite=True) as claim:
        write(claim.work, "new")
        (tmp_path / "a-2" / "letter.txt").write_text("theirs")
    assert texts(claim.target) == {"new"} and (tmp_path / "a-2" / "letter.txt").read_text() == "theirs"


@pytest.mark.parametrize("theirs", ["file", "link", "dangling", "letter", "subfolder", "link inside", "no summary"])
def test_overwrite_replaces_nothing_that_is_not_ours(tmp_path, theirs):
    target, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(elsewhere, "theirs")
    if theirs == "file":
        target.write_text("theirs")
    elif theirs in ("link", "dangling"):
        target.symlink_to(elsewhere if theirs == "link" else tmp_path / "nothing")
    else:
        target.mkdir()
        write(target, "theirs", FILES[:-1] if theirs == "no summary" else FILES)
        if theirs == "letter":
            (target / "base-00.png.bak").write_text("theirs")
        elif theirs == "subfolder":
            (target / "repelled-01.png").mkdir()
        elif theirs == "link inside":
            (target / "repelled-01.png").symlink_to(elsewhere / "base.png")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="choose another folder"), whole_folder(target, overwrite=True):
        pytest.fail("it was claimed")
    assert contents(tmp_path) == before


def test_overwrite_replaces_ours_an_empty_folder_and_the_one_we_are_in(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for text in "123":
        if text == "3":
            monkeypatch.chdir(tmp_path / "a")
        with whole_folder(Path(".") if text == "3" else tmp_path / "a", overwrite=True) as claim:
            write(claim.work, text)
        assert texts(tmp_path / "a") == {text} and hidden(tmp_path) == []


def test_every_name_that_the_program_writes_is_ours():
    from sampler import methods  # with torch, which the processes below do without

    assert tuple(methods.METHODS) == folders.METHODS
    for batch in ("base", "repelled", *folders.METHODS):
        for end in ("", "-00", "-123"):
            assert folders.re.fullmatch(folders.PICTURES, f"{batch}{end}.png")
    for other in ("photo.png", "base-.png", "base-00.jpg", "summary.json.bak", "summary-json", "my-base.png"):
        assert not folders.re.fullmatch(folders.PICTURES, other)


@pytest.mark.parametrize("place", ["/dev/null/a", "/proc/a", "file/a", "a" * 300])
def test_where_nothing_can_be_written_is_said_at_once(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for numbered in (False, True):
        with pytest.raises(OSError, match=r"a cannot be written \(.*\): choose another folder"), \
             whole_folder(Path(place), numbered=numbered):
            pytest.fail("it was claimed")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_names_are_swapped_where_the_system_cannot_do_it_in_one_step(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    folders.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "is").read_text() == "b"
    monkeypatch.setattr(folders.ctypes, "CDLL", lambda _: object())
    folders.exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "is").read_text() for name in "ab"] == ["a", "b"] and len(list(tmp_path.iterdir())) == 2


# ---- several


REPLACE = """
print("ready")
n = int(sys.argv[2])
while True:
    n += 1
    with whole_folder(Path(sys.argv[1]), overwrite=True) as claim:
        write(claim.work, str(n))
    print(n)
"""


def test_killed_fifty_times_while_it_replaces_a_folder_the_old_or_the_new_one_is_whole(tmp_path):
    target, rng, last = tmp_path / "a", random.Random(0), 0
    with whole_folder(target) as claim:
        write(claim.work, "0")
    for _ in range(50):
        process = child(REPLACE, target, last)
        assert process.stdout.readline() == "ready\n"
        first = int(process.stdout.readline())  # one at least, on however slow a machine
        time.sleep(rng.uniform(0, 0.02))
        reported = [first, *killed(process)]
        (text,) = texts(target)
        assert int(text) - (reported[-1] if reported else last) in (0, 1)  # what was reported is there, or the next
        last = int(text)
        assert hidden(tmp_path) in ([], [".a.partial"])
    with whole_folder(target, overwrite=True) as claim:  # no lock, no leftover is in the way
        assert list(claim.work.iterdir()) == []
        write(claim.work, "last")
    assert texts(target) == {"last"} and hidden(tmp_path) == []


ADD = """
print("ready")
for n in range(10**9):
    with whole_folder(Path(sys.argv[1]) / str(n)) as claim:
        write(claim.work, str(n))
    print(n)
"""


def test_killed_fifty_times_while_it_writes_new_folders_each_is_whole_or_missing(tmp_path):
    rng = random.Random(1)
    for i in range(50):
        process = child(ADD, tmp_path / str(i))
        assert process.stdout.readline() == "ready\n"
        first = int(process.stdout.readline())  # one at least, on however slow a machine
        time.sleep(rng.uniform(0, 0.02))
        reported = [first, *killed(process)]
        place = tmp_path / str(i)
        found = {int(file.name) for file in place.glob("[0-9]*")}
        assert all(texts(place / str(n)) == {str(n)} for n in found)
        assert found in (set(reported), {*reported, len(reported)})


RACE = """
for line in sys.stdin:  # as soon as the other process is told
    place, numbered, me = line.split()
    try:
        with whole_folder(Path(place), overwrite=numbered == "over", numbered=numbered == "yes") as claim:
            write(claim.work, me)
        print(claim.target)
    except FileExistsError as error:
        print("refused:", error)
"""


def test_a_run_that_finishes_while_another_makes_the_folder_is_seen(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def too_late(self, *args, **settings):
        monkeypatch.setattr(Path, "mkdir", mkdir)
        mkdir(tmp_path / "a")  # the hidden folder of the other run has its name now
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(Path, "mkdir", too_late)
    with pytest.raises(FileExistsError, match="exists already"), whole_folder(tmp_path / "a"):
        pass


@pytest.mark.parametrize("numbered", ["no", "yes", "over"])
def test_fifty_races_of_two_processes_for_one_name_lose_nothing(tmp_path, numbered):
    racers = [child(RACE), child(RACE)]
    refusals = 0
    for i in range(50):
        target = tmp_path / str(i)
        if numbered == "over":
            with whole_folder(target) as claim:
                write(claim.work, "old")
        for me, racer in enumerate(racers):
            racer.stdin.write(f"{target} {numbered} {me}\n")
        for racer in racers:
            racer.stdin.flush()
        said = [racer.stdout.readline().strip() for racer in racers]
        won = [me for me, line in enumerate(said) if not line.startswith("refused")]
        refusals += 2 - len(won)
        if numbered == "yes":
            assert sorted(said) == [str(target), f"{target}-2"]
            assert all(texts(Path(line)) == {str(me)} for me, line in enumerate(said))
        elif numbered == "no":
            (winner,) = won
            assert texts(target) == {str(winner)}
            assert "exists already" in said[1 - winner] or "being written by another run" in said[1 - winner]
        else:  # one after the other, or one of them is refused
            (text,) = texts(target)
            assert won and int(text) in won
        assert hidden(tmp_path) == []
    for racer in racers:
        racer.communicate()
    assert refusals == 50 if numbered == "no" else refusals <= 50


def test_two_runs_of_the_program_at_once_write_two_folders(tmp_path):
    command = [sys.executable, "-m", "sampler", "a star", "--images", "2", "--steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen([*command, "--seed", str(seed)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for seed in (1, 2)]
    printed = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    places = [tmp_path / "outputs" / name for name in ("a-star", "a-star-2")]
    assert sorted(tmp_path.joinpath("outputs").iterdir()) == places
    assert {json.loads((place / "summary.json").read_text())["seed"] for place in places} == {1, 2}
    for seed, text in zip((1, 2), printed, strict=True):
        (place,) = (place for place in places if f"written to outputs/{place.name}:" in text)
        assert json.loads((place / "summary.json").read_text())["seed"] == seed
