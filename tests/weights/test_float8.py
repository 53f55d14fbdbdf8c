"""Float8 files against their widened twins, which the tests write; float8 that stays in memory; writing it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import FLUX, FLUX2, SD3, T5, TOLERANCE, VAE, difference, draw, randomize, same_tensors
from torch import nn

from mmdit import Autoencoder, MMDiT, T5Encoder
from weights import (
    CheckpointError,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)

DATA = Path(__file__).parents[1] / "data"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DUAL = replace(SD3, dual_attention_blocks=(0,))
KINDS = {  # module, load, save, layout
    "flux": (lambda: MMDiT(FLUX), load_transformer, save_transformer, "original"),
    "flux, hub": (lambda: MMDiT(FLUX), load_transformer, save_transformer, "hub"),
    "flux2": (lambda: MMDiT(FLUX2), load_transformer, save_transformer, "original"),
    "flux2, hub": (lambda: MMDiT(FLUX2), load_transformer, save_transformer, "hub"),
    "sd3": (lambda: MMDiT(DUAL), load_transformer, save_transformer, "original"),
    "sd3, hub": (lambda: MMDiT(DUAL), load_transformer, save_transformer, "hub"),
    "t5": (lambda: T5Encoder(T5), load_text_encoder, save_text_encoder, "original"),
    "autoencoder": (lambda: Autoencoder(VAE), load_autoencoder, save_autoencoder, "original"),
}
SCALES = {  # name, shape for so many rows
    "unscaled": None, "ComfyUI": (".scale_weight", lambda rows: ()), "ComfyUI, rows": (".scale_weight", lambda n: (n,)),
    "scale": (".weight_scale", lambda rows: (1,)), "row scales": (".weight_scale", lambda rows: (rows, 1)),
}


class Stored:
    """A random model stored in float8, and its widened twin in float32."""

    def __init__(self, folder, kind, float8=E4M3, scales="unscaled", only_matrices=False):
        make, self.load, save, self.layout = KINDS[kind]
        self.config = make().config
        self.path, self.twin = (folder / ("hub" if self.layout == "hub" else f"{name}.safetensors") for name in "ab")
        if self.layout == "hub":
            self.twin = folder / "twin"
        for path in (self.path, self.twin):
            save(randomize(make()), path, self.layout)
        wide, narrow = load_file(self.weights(self.path)), {}
        wide.pop("encoder.embed_tokens.weight", None)  # T5's second name for its embedding
        for i, (name, tensor) in enumerate(wide.items()):
            if only_matrices and tensor.ndim != 2:
                continue
            narrow[name] = tensor.to(float8)
            wide[name] = narrow[name].float()
            if SCALES[scales] and name.endswith(".weight") and tensor.ndim > 1:
                ending, shape = SCALES[scales]
                scale = draw(*shape(len(tensor)), seed=i).abs() + 0.1  # of each matrix its own
                narrow[name.removesuffix(".weight") + ending] = scale
                wide[name] = narrow[name].float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
        if scales.startswith("ComfyUI"):
            narrow["model.diffusion_model.scaled_fp8" if kind == "sd3" else "scaled_fp8"] = torch.zeros(2).to(float8)
        save_file({**wide, **narrow}, self.weights(self.path))
        save_file(wide, self.weights(self.twin))

    def weights(self, path):
        return next(path.glob("*.safetensors")) if path.is_dir() else path

    def __call__(self, path=None, **options):
        return self.load(path or self.path, self.config, **options)

    def run(self, model):
        if isinstance(model, T5Encoder):
            return model(torch.tensor([[7, 3, 1, 0]]))
        config = model.config
        return model(draw(2, config.latent_channels, 4, 6), torch.tensor([0.3, 0.9]), draw(2, 5, config.context_dim),
                     draw(2, config.pooled_dim) if config.pooled_dim else None)


def in_blocks(model):
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ("blocks." in name or "layers." in name)}


@pytest.mark.parametrize("only_matrices", [False, True], ids=["all", "matrices"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_float8_file_is_its_widened_twin(tmp_path, kind, scales, only_matrices):
    stored = Stored(tmp_path, kind, E5M2 if only_matrices else E4M3, scales, only_matrices)
    for dtype in (torch.float32, torch.bfloat16):
        same_tensors(stored(dtype=dtype).state_dict(), stored(stored.twin, dtype=dtype).state_dict())


@pytest.mark.parametrize("float8", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scales", ["unscaled", "ComfyUI", "row scales"])
@pytest.mark.parametrize("kind", ["flux", "flux, hub", "flux2", "flux2, hub", "sd3", "sd3, hub", "t5"])
@torch.no_grad()
def test_float8_that_stays_computes_the_same_from_a_byte_a_weight(tmp_path, kind, scales, float8):
    stored = Stored(tmp_path, kind, float8, scales)
    # the weights are the same bits (below); their products are summed in an order that hangs on threads and alignment
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        kept, wide = stored(dtype=dtype, keep_float8=True), stored(dtype=dtype)
        assert difference(stored.run(kept), stored.run(wide)) < tolerance
        slim = in_blocks(kept)
        assert slim.keys() == in_blocks(wide).keys()
        for name, module in slim.items():
            assert module.weight.dtype == float8 and module.weight.nbytes == module.weight.numel(), name
            assert torch.equal(module.widened(dtype), wide.get_submodule(name).weight), name
        assert {n for n, p in kept.named_parameters() if p.dtype != dtype} == {f"{name}.weight" for name in slim}


@pytest.mark.parametrize("comfy", [False, True], ids=["as published", "ComfyUI"])
@torch.no_grad()
def test_flux2_in_scaled_float8_gives_the_official_velocity_and_is_its_widened_twin(tmp_path, comfy):
    """The published form: `weight_scale` and `input_scale`, and per layer what it is, in the header or a tensor."""
    config = replace(FLUX2, hidden_size=72, num_heads=3, num_dual_blocks=1, latent_channels=16, context_dim=36,
                     rope_axes=(6, 6, 6, 6))
    inputs, path = load_file(DATA / "flux2-bfl-klein-fp8.io.safetensors"), DATA / "flux2-bfl-klein-fp8.safetensors"
    wanted, inputs["sigma"] = inputs.pop("velocity"), inputs.pop("timestep")
    with safe_open(path, "pt") as opened:
        assert len(json.loads(opened.metadata()["_quantization_metadata"])["layers"]) == 12
    tensors = load_file(path)
    scales = {name.removesuffix("_scale"): scale for name, scale in tensors.items() if name.endswith("weight_scale")}
    assert {name for name, tensor in tensors.items() if tensor.dtype == E4M3} == scales.keys() and len(scales) == 12
    wide = {name: tensor.float() * scales.get(name, 1) for name, tensor in tensors.items() if "t_scale" not in name}
    if comfy:
        path, quant = tmp_path / "comfy.safetensors", torch.tensor([*b'{"format": "float8_e4m3fn"}'], dtype=torch.uint8)
        tensors |= {f"{name.removesuffix('weight')}comfy_quant": quant.clone() for name in scales}
        save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, path)
    save_file(wide, tmp_path / "twin.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        same_tensors(load_transformer(path, config, dtype=dtype).state_dict(),
                     load_transformer(tmp_path / "twin.safetensors", config, dtype=dtype).state_dict())
    assert difference(load_transformer(path, config, dtype=torch.float32)(**inputs), wanted) < TOLERANCE
    kept = load_transformer(path, config, dtype=torch.float32, keep_float8=True)
    assert len([p for p in kept.parameters() if p.dtype == E4M3]) == 12
    assert difference(kept(**inputs), wanted) < TOLERANCE


def test_fused_matrices_keep_the_scale_of_each_part(tmp_path):
    stored = Stored(tmp_path, "flux, hub", scales="ComfyUI")
    qkv = stored(keep_float8=True).dual_blocks[0].attention.image.qkv
    parts = [load_file(stored.weights(stored.path))[f"transformer_blocks.0.attn.to_{x}.scale_weight"] for x in "qkv"]
    assert len(set(map(float, parts))) == 3
    assert torch.equal(qkv.scale, torch.stack(parts).repeat_interleave(64)[:, None])


def test_without_a_dtype_everything_stays_as_it_is_stored(tmp_path):
    """Float8 outside the blocks, and where q, k and v differ, is widened to bfloat16 or what holds all three."""
    stored = Stored(tmp_path, "flux, hub")
    path, attention = stored.weights(stored.path), "transformer_blocks.0.attn"
    tensors = load_file(path)
    tensors[f"{attention}.to_q.weight"] = tensors[f"{attention}.to_q.weight"].to(E5M2)
    tensors[f"{attention}.add_k_proj.weight"] = tensors[f"{attention}.add_k_proj.weight"].float()
    tensors[f"{attention}.to_out.0.bias"] = tensors[f"{attention}.to_out.0.bias"].half()
    save_file(tensors, path)
    model, block = stored(), "dual_blocks.0.attention"
    found = {name: p.dtype for name, p in model.named_parameters()}
    expected = {f"{name}.weight": E4M3 for name in in_blocks(model)} | {
        f"{block}.image.qkv.weight": torch.bfloat16, f"{block}.context.qkv.weight": torch.float32,
        f"{block}.image.out.bias": torch.float16,
    }
    assert found == dict.fromkeys(found, torch.bfloat16) | expected
    wide = stored(dtype=torch.float32).state_dict()
    same_tensors({name: tensor.float() for name, tensor in model.state_dict().items()}, wide)


@pytest.mark.parametrize(("scale", "found"), [
    (torch.ones(3), r"F32 of shape \(3,\)"), (torch.ones(1, 64), r"F32 of shape \(1, 64\)"),
    (torch.ones(64, 64), r"F32 of shape \(64, 64\)"), (torch.ones((), dtype=torch.int32), r"I32 of shape \(\)"),
    (torch.ones(0), r"F32 of shape \(0,\)"),
])
def test_a_scale_that_does_not_fit_is_named(tmp_path, scale, found):
    stored, name = Stored(tmp_path, "flux"), "double_blocks.0.img_attn.proj"
    save_file(load_file(stored.path) | {f"{name}.scale_weight": scale}, stored.path)
    message = rf"a\.safetensors: tensor {name}\.scale_weight is {found}, expected one scale for {name}\.weight, or one"
    with pytest.raises(CheckpointError, match=message):
        stored()


def test_a_scale_beside_a_wide_matrix_and_two_scales_are_refused(tmp_path):
    stored, name = Stored(tmp_path, "flux", scales="ComfyUI"), "double_blocks.0.img_attn.proj"
    tensors = load_file(stored.path)
    save_file(tensors | {f"{name}.weight": tensors[f"{name}.weight"].bfloat16()}, stored.path)
    with pytest.raises(CheckpointError, match=rf"has 1 tensors the model has no place for, first {name}\.scale_weight"):
        stored()
    save_file(tensors | {f"{name}.weight_scale": torch.ones(())}, stored.path)
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: tensor {name}\..*scale.* is F32 .*: use anoth"):
        stored()


@pytest.mark.parametrize("kind", ["flux", "flux, hub", "flux2", "flux2, hub", "sd3", "sd3, hub", "t5"])
def test_kept_float8_is_written_and_read_back_bit_for_bit(tmp_path, kind):
    stored, save = Stored(tmp_path, kind), KINDS[kind][2]
    first = stored()
    for layout, path in [("original", "1.safetensors"), ("hub", "2"), ("original", "3.safetensors")]:
        save(first, tmp_path / path, layout)
        again = stored(tmp_path / path)
        same_tensors(again.state_dict(), first.state_dict())
    same_tensors(load_file(tmp_path / "3.safetensors"), load_file(tmp_path / "1.safetensors"))
    written = tmp_path / ("2" if stored.layout == "hub" else "1.safetensors")
    source = load_file(stored.weights(stored.path))
    for name, tensor in load_file(stored.weights(written)).items():
        assert torch.equal(tensor.float(), source[name.replace("encoder.embed_tokens", "shared")].float()), name


def test_kept_float8_with_scales_is_not_written(tmp_path):
    model = Stored(tmp_path, "flux", scales="ComfyUI")()
    with pytest.raises(CheckpointError, match=r"dual_blocks\.0\..*\.scale is not written: load float8 weights in bfl"):
        save_transformer(model, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
