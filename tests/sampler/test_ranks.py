"""Groups across ranks: pushes, Gram matrices and pictures are those of one process. Ranks are processes with gloo."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paint_on_ranks as shared
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_flux2 import klein
from small_pipelines import saved

from sampler.methods import CADS
from sampler.ranks import Ranks, RepulsionAcrossRanks, shares
from weights import BUNDLED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def torchrun(count, *command, folder):
    """The program on `count` ranks, each of one thread; ends with an error after ten minutes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    return subprocess.run([*start, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})


def apart(*files):
    """The largest difference of two pictures, of 255: not 0, since the processes may have other numbers of threads."""
    one, other = (np.asarray(Image.open(file), dtype=int) for file in files)
    return np.abs(one - other).max()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The small FLUX.2 pipelines; tiny-flux's transformer with blocks in float8."""
    place = tmp_path_factory.mktemp("pipelines")
    found = {"klein": place / "small-klein", "base": place / "small-klein-base", "float8": place / "float8"}
    saved(klein(), found["klein"])
    saved(klein(is_distilled=False), found["base"])
    shutil.copytree(BUNDLED["tiny-flux"] / "transformer", found["float8"])
    (file,) = found["float8"].glob("*.safetensors")
    save_file({name: x.to(torch.float8_e4m3fn) if x.ndim == 2 and "blocks" in name else x
               for name, x in load_file(file).items()}, file)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def on_ranks(request, folders, tmp_path_factory):
    """The number of ranks and what they found."""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    pairs = [f"{name}={folder}" for name, folder in folders.items()]
    done = torchrun(request.param, HERE / "paint_on_ranks.py", out, *pairs, folder=ROOT)
    assert done.returncode == 0, done.stderr[:6000]
    return request.param, torch.load(out, weights_only=False)


def test_a_push_across_ranks_is_that_of_one_process(on_ranks):
    _, found = on_ranks
    expected, _ = shared.pushed(Ranks())
    for (name, dtype), result in found["pushed"][0].items():
        one = expected[name, dtype]
        assert torch.equal(result, shared.tokens(dtype, shared.PUSHES[name][1])) == (name == "no strength")
        eps = torch.finfo(dtype).eps  # float64 is rounded once: at most to the neighbor
        torch.testing.assert_close(result, one, rtol=eps, atol=eps / 100, msg=lambda text, name=name: f"{name}: {text}")


def test_no_rank_holds_the_tokens_of_all_samples(on_ranks):
    count, found = on_ranks
    held = np.array([rank["held"] for rank in found["everyone"]])  # features in each push
    assert held.shape == (count, len(shared.PUSHES) * 3 - 3) and (held.sum(axis=0) == shared.TOKENS[2]).all()
    assert held.max() == -(-shared.TOKENS[2] // count)


def test_pictures_and_gram_matrices_are_those_of_one_process(on_ranks, folders):
    count, found = on_ranks
    for name, (grams, pictures) in found["painted"].items():
        one = shared.painted(Ranks(), folders, [name], len(pictures))[name]
        assert len(grams) == len(one[0]) > 0
        for a, b in zip(grams, one[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max(), err_msg=name)
        assert np.abs(pictures.astype(int) - one[1].astype(int)).max() <= 1, name
        assert len(pictures) == (3 if count == 2 else 10) and pictures.std() > 5


def test_sharded_parameters_paint_the_same_pictures(on_ranks, folders):
    count, found = on_ranks
    if count == 2:
        pictures, _ = found["sharded"]
        expected, _ = shared.ring(Ranks(), folders)
        assert np.abs(pictures - expected).max() <= 1 and pictures.std() > 5
        assert all(0.49 < share < 0.51 for rank in found["everyone"] for share in rank["sharded"][1])


def test_the_program_on_ranks_writes_and_prints_once(call, tmp_path):
    options = ("--images", "3", "--steps", "2", "--model", "tiny-turbo", "--shard")
    done = torchrun(2, "-m", "sampler", "a star", *options, "--out", "ranks", folder=tmp_path)
    assert done.returncode == 0, done.stderr[:6000]
    assert done.stdout.count("Vendi score (1 to 3)") == done.stdout.count("written to ranks") == 1
    assert call("a star", *options[:-1], "--out", "one") == 0
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert sorted(file.name for file in (tmp_path / "ranks").iterdir()) == names and len(names) == 10
    for name in (name for name in names if name[-5].isdigit()):
        assert apart(*(tmp_path / folder / name for folder in ("ranks", "one"))) <= 1, name


def test_ranks_take_prompts_in_turn(call, tmp_path):
    (tmp_path / "file.txt").write_text("a star\na ring\na circle\n")
    options = ("--prompts", "file.txt", "--images", "2", "--steps", "1", "--model", "tiny-turbo", "--no-compare")
    done = torchrun(2, "-m", "sampler", *options, "--out", "ranks", folder=tmp_path)
    assert done.returncode == 0, done.stderr[:6000]
    assert done.stdout.strip() == "3 of 3 groups are in ranks, with a line each in results.jsonl"
    assert call(*options, "--out", "one") == 0
    lines = [json.loads(line)["folder"] for line in (tmp_path / "ranks/results.jsonl").read_text().splitlines()]
    assert sorted(lines) == ["00001-a-star", "00002-a-ring", "00003-a-circle"]
    for name in lines:
        for picture in ("repelled-00.png", "repelled-01.png"):
            assert apart(*(tmp_path / folder / name / picture for folder in ("ranks", "one"))) <= 1


FAILING = """
import os, sys
from sampler import __main__, guidance
call = guidance.GuidedVelocity.__call__

def failing(self, x, sigma, step, guided=True):
    if os.environ["RANK"] == "1" and step == 2 and self.repulsion:
        raise MemoryError("allocate")
    return call(self, x, sigma, step, guided)

guidance.GuidedVelocity.__call__ = failing
sys.exit(__main__.main())
"""


def test_a_rank_that_fails_ends_all_in_one_sentence(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    done = torchrun(2, "failing.py", "a star", "--images", "3", "--repel-steps", "4", "--model", "tiny-turbo", "--out",
                    "here", folder=tmp_path)
    said, _, rest = done.stderr.partition("torch/distributed/elastic")  # what torchrun says of it
    assert done.returncode != 0 and said.count("error: out of memory: try fewer") == said.count("error:") == 1
    assert "Traceback" not in said and "[rank" not in done.stderr
    assert "exitcode: 2" in rest and not (tmp_path / "here").exists()


def test_what_cannot_be_split_is_said():
    ranks = Ranks(0, 4)
    with pytest.raises(ValueError, match="3 images cannot be shared by 4 ranks: ask for 4 or more"):
        ranks.split(3)
    with pytest.raises(ValueError, match="CADS is not computed across ranks"):
        ranks.split(4, None, CADS())
    with pytest.raises(ValueError, match="solver autograd needs all tokens in one process"):
        RepulsionAcrossRanks(strength=1.0, solver="autograd", sizes=(1, 1))
    with pytest.raises(ValueError, match="shard spreads parameters over several processes: start the program with"):
        shared.Pipeline.load("tiny-turbo", shard=True)


@pytest.mark.parametrize("count,ranks", [(10, 4), (3, 3), (4, 3), (7, 2)])
def test_shares_are_as_equal_as_can_be(count, ranks):
    assert shares(count, ranks) == [len(part) for part in np.array_split(np.arange(count), ranks)]
    assert shares(count, ranks) == [len(part) for part in torch.arange(count).tensor_split(ranks)]
