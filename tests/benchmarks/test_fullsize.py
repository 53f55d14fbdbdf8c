"""`benchmarks.fullsize` with small transformers: weights against closed forms, velocities a branch at a time."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_scale import FLUX, FLUX2, SD3

from benchmarks import fullsize
from benchmarks.loading import MANIFESTS, anonymous, most_anonymous, sparse_transformer
from benchmarks.memory import guided, latent_shape
from mmdit import PRESETS, AutoencoderConfig, MMDiT
from repulsion import Repulsion
from weights import PUBLIC, Settings
from weights.files import read_header

SMALL = AutoencoderConfig(channels=(32, 32, 64, 64), latent_channels=4)
SETTINGS = Settings(steps=4, guidance=3.0, height=128, width=128)
TOKENS = 10


def numbers(config):
    """How many numbers a transformer has, by the figure of its family."""
    d, r, bias, k = config.hidden_size, int(config.mlp_ratio), int(config.bias), config.head_dim
    up, shared = r * (1 + config.gated_mlp), config.shared_modulation

    def layer(inputs, outputs):
        return (inputs + bias) * outputs

    def modulation(parts, shares=shared):
        return 0 if shares else layer(d, parts * d)

    mlp = layer(d, up * d) + layer(r * d, d)
    stream = modulation(6) + layer(d, 3 * d) + 2 * k + layer(d, d) + mlp
    total = config.num_dual_blocks * 2 * stream
    if config.context_ends_early:
        total -= modulation(6) - modulation(2) + layer(d, d) + mlp
    total += config.num_single_blocks * (modulation(3) + layer(d, (3 + up) * d) + 2 * k + layer((1 + r) * d, d))
    total += 2 * modulation(6, False) + modulation(3, False) if shared else 0
    total += layer(config.patch_dim, d) + layer(config.context_dim, d) + layer(d, 2 * d) + layer(d, config.patch_dim)
    total += (1 + config.guidance_embedding) * (layer(256, d) + layer(d, d))
    total += layer(config.pooled_dim, d) + layer(d, d) if config.pooled_dim else 0
    return total + (config.position_table_size**2 * d if config.position == "table" else 0)


@pytest.mark.parametrize("config", [FLUX, SD3, FLUX2], ids=["flux", "sd3", "flux2"])
def test_weights_take_two_bytes_for_each_number_of_the_figure(config):
    assert fullsize.size_of(fullsize.random_weights(MMDiT, config, "cpu")) == 2 * numbers(config)


@pytest.mark.parametrize(("name", "manifest"), [
    ("flux1-dev", "bfl/flux1-dev"), ("sd3-medium", "sai/sd3_medium"), ("flux2-klein-4b", "bfl/flux2-klein-4b")])
def test_a_sparse_file_has_the_names_and_shapes_of_the_public_one(tmp_path, name, manifest):
    entries = read_header(sparse_transformer(tmp_path / "x.safetensors", PRESETS[name]))
    wanted = {name: tuple(shape) for name, shape in MANIFESTS[manifest]["tensors"].items()
              if not name.startswith("first_stage_model.")}
    assert {name: entry.shape for name, entry in entries.items()} == wanted


@pytest.mark.parametrize(("config", "guidance"), [(FLUX, 3.0), (SD3, 3.0), (FLUX2, None)], ids=["flux", "sd3", "flux2"])
@torch.no_grad()
def test_the_step_is_guided_and_pushes_each_branch_apart(config, guidance):
    torch.manual_seed(0)
    model, repulsion = fullsize.random_weights(MMDiT, config, "cpu").double(), Repulsion(strength=1.0)
    settings = replace(SETTINGS, guidance=guidance)
    for tensor in model.state_dict().values():
        tensor.mul_(5)  # a matrix of this width then keeps the length of a vector
    for images in (1, 3):
        velocity = guided(model, settings, TOKENS, repulsion)
        latent = torch.randn(images, *latent_shape(config, settings))
        context, pooled = velocity.condition(images, 1.0, 0)
        found = velocity(latent, 1.0, 0)

        def branch(i, repulsion=repulsion, images=images, context=context, pooled=pooled, latent=latent):
            own = slice(i * images, (i + 1) * images)
            given = torch.full((images,), 3.0) if config.guidance_embedding else None
            return model(latent, torch.ones(images), context[own], None if pooled is None else pooled[own], given,
                         repulsion=repulsion)

        wanted, plain = branch(0), branch(0, None)
        if config.position == "table":  # classifier-free guidance
            wanted = wanted + 3.0 * (branch(1) - wanted)
            plain = plain + 3.0 * (branch(1, None) - plain)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())
        moved = (wanted - plain).norm() / plain.norm()
        assert moved == 0 if images == 1 else moved > 1e-3, moved


def test_a_row_for_each_number_of_pictures(monkeypatch, capsys):
    monkeypatch.setitem(PUBLIC, "flux1-schnell", PUBLIC["flux1-schnell"]._replace(
        config=replace(FLUX, latent_channels=4), settings=SETTINGS))
    monkeypatch.setattr(fullsize, "autoencoder_of", lambda config: SMALL)
    fullsize.on_device("flux1-schnell", "cpu", 1, [1, 2])
    rows = [line.strip("| \n").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows] == ["1", "2"] and all(len(row) == len(fullsize.ON_GPU.split(" | ")) for row in rows)
    assert rows[0][5:9] == ["–"] * 4 and "–" not in rows[1]  # one picture is not pushed


def test_what_fails_is_named_and_the_next_is_tried(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fullsize", "--device", "nowhere", "--models", "sd3-medium", "flux2-klein-4b"])
    fullsize.main()
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| sd3-medium", "| flux2-klein-4b"]
    assert all("failed: RuntimeError: " in row and "nowhere" in row for row in rows)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_the_most_memory_is_seen_after_it_was_freed():
    with most_anonymous() as most:
        before = anonymous()
        held = torch.ones(2**25)
        until = time.monotonic() + 60  # the watcher is a thread, which a busy machine may leave waiting
        while most[-1] + 2**22 < before + 2**27 and time.monotonic() < until:
            time.sleep(0.01)
        del held
    assert before + 2**27 <= most[-1] + 2**22 and most[-1] < before + 2**28
