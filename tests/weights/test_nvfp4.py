"""NVFP4 against the published velocity, a scalar reading of the format, and what is no such matrix."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import FLUX2, TOLERANCE, difference, same_tensors

from weights import CheckpointError, inspect_checkpoint, load_transformer
from weights.nvfp4 import scales_shape, widen

FILE = Path(__file__).parents[1] / "data" / "flux2-bfl-reference-nvfp4.safetensors"
CONFIG = replace(FLUX2, latent_channels=32, context_dim=48, rope_axes=(8, 4, 8, 12))
LAYER = "double_blocks.0.img_mlp.0"


def quantized_layers():
    with safe_open(FILE, "pt") as opened:
        return [*json.loads(opened.metadata()["_quantization_metadata"])["layers"]]


def number(code):
    """E2M1: sign, two bits of exponent with bias 1, one of mantissa; no infinity."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    return (-1) ** sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (130, 80), (256, 64)])
def test_each_number_is_read_by_the_format_s_definition(rows, columns):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.rand(scales_shape(rows, columns), generator=generator).to(torch.float8_e4m3fn)
    tiles, flat = scales.shape[1] // 4, scales.float().flatten()
    expected = torch.empty(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            code = int(packed[r, c // 2]) >> 4 if c % 2 == 0 else int(packed[r, c // 2]) & 15
            tile = r // 128 * tiles + c // 16 // 4
            scale = flat[512 * tile + 16 * (r % 128 % 32) + 4 * (r % 128 // 32) + c // 16 % 4]
            expected[r, c] = number(code) * float(scale) * 0.375
    # two roundings of float32
    torch.testing.assert_close(widen(packed, scales, torch.tensor(0.375)).double(), expected, rtol=2**-22, atol=0)


@torch.no_grad()
def test_the_published_velocity_and_the_widened_twin(tmp_path):
    io = load_file(FILE.with_suffix(".io.safetensors"))
    model = load_transformer(FILE, CONFIG, dtype=torch.float32)
    assert difference(model(io["latent"], io["timestep"], io["context"]), io["velocity"]) < TOLERANCE
    assert torch.equal(model.dual_blocks[0].image.mlp.in_layer.weight, io[f"widened.{LAYER}.weight"])

    tensors = load_file(FILE)
    wide = {name: tensor for name, tensor in tensors.items() if "_scale" not in name or name.endswith("norm.scale")}
    for layer in quantized_layers():
        weight, scales, scale = (tensors[f"{layer}.{name}"] for name in ("weight", "weight_scale", "weight_scale_2"))
        wide[f"{layer}.weight"] = widen(weight, scales, scale)
    save_file(wide, tmp_path / "twin.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        twin = load_transformer(tmp_path / "twin.safetensors", CONFIG, dtype=dtype)
        same_tensors(load_transformer(FILE, CONFIG, dtype=dtype).state_dict(), twin.state_dict())
    assert {p.dtype for p in load_transformer(FILE, CONFIG).parameters()} == {torch.bfloat16}  # as stored


def test_the_entry_has_the_matrix_s_own_shape_and_size():
    entry = inspect_checkpoint(FILE).parts["transformer"].entries[f"{LAYER}.weight"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("NVFP4", (384, 64), 384 * 64 // 2)
    assert len(quantized_layers()) == 20


@pytest.mark.parametrize(("name", "tensor"), [
    ("weight", torch.zeros(384, 32)), ("weight", torch.zeros(384 * 32, dtype=torch.uint8)),
    ("weight", torch.zeros(384, 28, dtype=torch.uint8)), ("weight_scale", torch.zeros(384, 4)),
    ("weight_scale", torch.zeros(256, 4).to(torch.float8_e4m3fn)), ("weight_scale", None), ("weight", None),
    ("weight_scale_2", torch.zeros(1)), ("weight_scale_2", torch.zeros((), dtype=torch.bfloat16)),
])
def test_other_matrices_are_refused_by_name(tmp_path, name, tensor):
    tensors = load_file(FILE)
    del tensors[f"{LAYER}.{name}"]
    save_file(tensors | ({} if tensor is None else {f"{LAYER}.{name}": tensor}), tmp_path / "flux.safetensors")
    with pytest.raises(CheckpointError, match=f"flux.safetensors: tensor {LAYER}.weight_scale_2 belongs to a matrix in "
                                              "nvfp4, but .*: use another release"):
        load_transformer(tmp_path / "flux.safetensors", CONFIG)
