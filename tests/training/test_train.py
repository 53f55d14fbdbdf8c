"""The training script: a stopped run goes on as if it had not stopped, and what it writes is a checkpoint."""

import math
import sys

import pytest
import torch
from torch import nn

from sampler import Pipeline
from tiny.captions import parse
from training import tiny_sd3 as script
from training.data import Data
from training.loop import batches, optimizers, train


def small_run(folder, steps, stop_at=None):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    blocks = nn.ModuleList([nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1)])
    net = nn.ModuleDict({"blocks": blocks, "out": nn.Linear(8, 2)})
    pick = batches(64, 16, seed=1)
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))

    def batch_at(step):
        if step == stop_at:
            raise KeyboardInterrupt
        return [data[pick(step)]]

    def loss_of(x):
        inner = blocks[1](blocks[0](x)[:, :, None, None])[:, :, 0, 0]
        return (net["out"](inner) - x[:, :2] + 0.1 * torch.randn(16, 2)).square().mean()

    train("net", {"net": net}, batch_at, loss_of, steps, folder, lr=1e-2, muon_lr=1e-2, ema=0.9, save_every=5)
    return net.state_dict()


def test_a_resumed_run_ends_where_an_unbroken_one_ends(tmp_path):
    unbroken = small_run(tmp_path / "a", 20)
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path / "b", 20, stop_at=13)
    assert torch.load(tmp_path / "b/net.pt", weights_only=True)["step"] == 10
    resumed = small_run(tmp_path / "b", 20)
    assert all(torch.equal(resumed[key], unbroken[key]) for key in unbroken)
    again = small_run(tmp_path / "b", 20)  # a finished run loads and does nothing
    assert all(torch.equal(again[key], unbroken[key]) for key in unbroken)


def test_batches_show_every_example_once_an_epoch():
    pick = batches(60, 20, seed=0)
    first, second = ([tuple(pick(step).tolist()) for step in steps] for steps in (range(3), range(3, 6)))
    assert sorted(i for batch in first for i in batch) == list(range(60)) and first != second


def test_captions_of_even_scenes_say_everything_and_some_of_the_others_are_empty():
    data = Data.sample(4000, seed=0, wrong=0.2)
    assert data.whole == 1200  # a share of 0.3
    captions = data.captions(torch.arange(4000), 0)
    told = [parse(caption) for caption in captions[: data.whole]]  # no empty caption can be parsed
    for scene, said in zip(data.scenes, told, strict=False):
        assert (len(said.things), None in (said.arrangement, said.ground, said.texture)) == (len(scene.things), False)
    right = sum(scene.ground == said.ground for scene, said in zip(data.scenes, told, strict=False)) / data.whole
    assert abs(right - 0.8) < 4 * math.sqrt(0.16 / data.whole)
    assert abs(captions[data.whole :].count("") / 2800 - 0.15) < 4 * math.sqrt(0.15 * 0.85 / 2800)


def test_fewer_examples_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="100 examples are fewer than a batch of 128: take more, or smaller batches"):
        batches(100, 128, seed=0)


def test_muon_gets_the_matrices_and_convolutions_of_blocks_and_nothing_else():
    block = nn.ModuleDict({"qkv": nn.Linear(4, 4), "modulation": nn.Linear(4, 4), "conv": nn.Conv2d(4, 6, 3)})
    net = nn.ModuleDict({"blocks": nn.ModuleList([block]), "out": nn.Linear(4, 2)})
    adam, muon = optimizers({"net": net}, 1e-3, 1e-2)
    matrix, kernel = muon.param_groups[0]["params"]
    assert matrix is block["qkv"].weight and kernel.shape == (6, 36)
    assert len(adam.param_groups[0]["params"]) == 6
    before = block["conv"].weight.detach().clone()
    for _ in range(2):  # the second step must not see the first one's gradient
        (0.5 * block["conv"].weight.square()).sum().backward()
        gradient = block["conv"].weight.detach().flatten(1)
        assert torch.equal(kernel.grad, gradient)
        muon.step()
        net.zero_grad()
    size = torch.linalg.svdvals((before - block["conv"].weight.detach()).flatten(1))
    assert size.min() > 0.5 * size.max()  # Muon's step is nearly orthogonal, whatever the gradient


def test_from_nothing_to_a_folder_that_paints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path), "--steps", "2", "--autoencoder-steps", "2",
                                      "--clip-steps", "2", "--scenes", "2000", "--wrong", "0.2", "--device", "cpu"])
    script.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed", "1"])
    with pytest.raises(SystemExit):  # its latents and weights are those of seed 0
        script.main()
    assert "holds a run with seed 0, not 1: give another --out" in capsys.readouterr().err
    first = tmp_path / "checkpoint"
    pictures = Pipeline.load(first)("a circle", 2, steps=2)
    assert [picture.size for picture in pictures] == [(128, 128)] * 2
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path / "more"), "--start", str(first), "--steps", "2",
                                      "--scenes", "128", "--device", "cpu"])
    script.main()
    second = tmp_path / "more" / "checkpoint"
    for part, kept in (("text_encoder/model", True), ("vae/diffusion_pytorch_model", True),
                       ("transformer/diffusion_pytorch_model", False)):
        old, new = ((folder / f"{part}.safetensors").read_bytes() for folder in (first, second))
        assert (old == new) == kept, part
    assert sum(file.stat().st_size for file in (tmp_path / "checkpoint").rglob("*")) < 20e6
