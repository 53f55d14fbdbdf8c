"""Interpolation (Eq. 5): its ends, what stays untouched, the measure of blur, and the program."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import flux, saved

from benchmarks import interpolate as program
from benchmarks.interpolate import ContextInterpolation, LatentInterpolation, between, blur, interpolate
from repulsion import Repulsion
from sampler import Pipeline, starting_noise
from sampler.pipeline import to_picture
from tiny.world import render, sample_scene

EVERYWHERE = Repulsion(0.0, steps=4)
PROMPT = "a star"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("tiny-sd3")


@pytest.fixture(scope="module")
def rows(pipeline):
    return interpolate(pipeline, PROMPT, 3, 8, (0.0, 0.5, 1.0), EVERYWHERE, steps=4)


def close(found, expected):
    found, expected = (np.asarray(picture, dtype=np.int16) for picture in (found, expected))
    return abs(found - expected).max() <= 1  # float32 sums in another order


def test_between_is_the_line_through_both_and_exact_at_them():
    h = torch.randn(2 * 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = between(h, (-0.5, 0.0, 1.0), groups=2)
    for group, old in zip(found.chunk(2), h.chunk(2), strict=True):
        source, target = old[3:]
        torch.testing.assert_close(group[0], 1.5 * source - 0.5 * target)
        assert all(torch.equal(a, b) for a, b in zip(group[1:], (source, target, source, target), strict=True))


def test_both_rows_start_with_the_sources_picture_and_only_the_latent_one_ends_with_the_targets(pipeline, rows):
    source, target = (pipeline(PROMPT, 1, seed=seed, steps=4)[0] for seed in (3, 8))
    assert close(rows["contextual space"][0], source) and close(rows["latent space"][0], source)
    assert close(rows["latent space"][2], target)
    assert not close(rows["contextual space"][2], target) and not close(rows["contextual space"][2], source)


def test_latents_stay_on_the_line_as_long_as_they_are_held(pipeline):
    noise = starting_noise(0, 3, (16, 16, 16))
    noise[0] = noise[1:].mean(0)
    decode, latents = pipeline.autoencoder.decode, []
    pipeline.autoencoder.decode = lambda latent: latents.append(latent) or decode(latent)
    try:
        for steps in (4, 2):
            pipeline(PROMPT, 3, steps=4, noise=noise, method=LatentInterpolation(alphas=(0.5,), steps=steps))
    finally:
        del pipeline.autoencoder.decode
    held, released = torch.cat(latents).chunk(2)  # decoded one by one
    torch.testing.assert_close(held[0], held[1:].mean(0), rtol=1e-4, atol=1e-4)
    assert (released[0] - released[1:].mean(0)).abs().max() > 0.1
    torch.testing.assert_close(released[1:], held[1:])


def test_the_context_at_alpha_1_is_the_targets_and_the_last_two_stay(pipeline):
    noise = torch.cat([starting_noise(3, 1, (16, 16, 16)).expand(2, -1, -1, -1), starting_noise(8, 1, (16, 16, 16))])
    plain = pipeline(PROMPT, 3, steps=4, noise=noise)
    found = pipeline(PROMPT, 3, steps=4, noise=noise, repulsion=ContextInterpolation(**vars(EVERYWHERE), alphas=(1.0,)))
    assert all(map(close, found[1:], plain[1:])) and not close(found[0], plain[0])
    context = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    moved = ContextInterpolation(**vars(EVERYWHERE), alphas=(1.0,)).bind(0, 8, groups=2)(context)
    assert torch.equal(moved[[0, 3]], context[[2, 5]]) and torch.equal(moved[[1, 2, 4, 5]], context[[1, 2, 4, 5]])
    assert ContextInterpolation(0.0, blocks=(1,), alphas=(1.0,)).bind(0, 8, groups=2) is None


def test_single_stream_blocks_move_their_context_alone(tmp_path):
    tokens = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    moved = ContextInterpolation(**vars(EVERYWHERE), alphas=(1.0,)).bind(0, 8, groups=1, num_context=4)(tokens)
    assert torch.equal(moved[0, :4], tokens[2, :4]) and torch.equal(moved[0, 4:], tokens[0, 4:])
    assert torch.equal(moved[1:], tokens[1:])
    _, pipe = saved(flux(), tmp_path)
    call = {"height": 32, "width": 48, "steps": 2, "guidance": 2.5, "noise": starting_noise(0, 3, (16, 8, 12))}
    line = ContextInterpolation(0.0, steps=2, blocks=(2, 3), alphas=(1.0,))  # the single-stream ones
    decode, latents = pipe.autoencoder.decode, []
    pipe.autoencoder.decode = lambda latent: latents.append(latent) or decode(latent)
    pipe(PROMPT, 3, **call), pipe(PROMPT, 3, **call, repulsion=line)
    plain, found = torch.cat(latents).chunk(2)
    changed = (found - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert changed[0] > 1e-4 and (changed[1:] < 1e-6).all()  # random weights: the context says little here


def test_a_double_exposure_is_many_times_as_blurred_as_what_it_is_made_of():
    rng = random.Random(0)
    sharp = render([sample_scene(rng) for _ in range(40)])
    alone = blur([to_picture(x) for x in sharp])
    double = blur([to_picture((a + b) / 2) for a, b in zip(sharp[:20], sharp[20:], strict=True)])
    assert max(alone) < 4 and sorted(double)[2] > 8  # outlines alone; two of twenty pairs may nearly share their ground
    assert blur([Image.new("RGB", (64, 64), (30, 32, 85))]) == [pytest.approx(0, abs=1e-3)]  # navy
    assert blur([Image.new("RGB", (64, 64), (30, 32, 95))]) == [pytest.approx(10, abs=1e-3)]


def test_the_program_writes_a_labeled_strip_and_the_numbers(pipeline, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program.Pipeline, "load", classmethod(lambda cls, model: pipeline))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["interpolate", *arguments])
        return program.main()

    assert call(PROMPT, "--source-seed", "3", "--target-seed", "8", "--steps", "2", "--blocks", "0-2") == 0
    folder = tmp_path / "outputs" / "interpolate-a-star"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["alphas"] == [-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5] and summary["first"] == 2
    assert summary["blocks"] == [0, 1, 2] and {len(v) for v in summary["blur"].values()} == {9}
    picture = Image.open(folder / "strip.png")
    assert picture.width > 9 * 128 and picture.height > 2 * 128 and picture.text["target_seed"] == "8"
    assert "contextual space" in capsys.readouterr().out
    assert call(PROMPT, "--out", str(folder)) == 2 and "exists already" in capsys.readouterr().err
    assert call(PROMPT, "--blocks", "7-9") == 2 and "blocks end at 7" in capsys.readouterr().err
    assert call("") == 2 and "the prompt is empty" in capsys.readouterr().err
