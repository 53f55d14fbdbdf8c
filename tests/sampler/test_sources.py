"""The same pipeline from every arrangement of files, one network at a time, and what is said when a part is missing."""

import gc
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipelines import TOKENIZERS, pixels, randomize

import weights
from mmdit import (
    PRESETS,
    Autoencoder,
    AutoencoderConfig,
    ClipConfig,
    ClipTextEncoder,
    MMDiT,
    T5Config,
    T5Encoder,
    trace,
)
from repulsion import Repulsion
from sampler import Pipeline
from sampler.parts import StreamedBlocks, stream_blocks
from weights import Stored
from weights.configs import LATENTS

CLIP = ClipConfig(vocab_size=668, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=1, activation="gelu",
                  max_positions=24, projection_dim=64, end_token=667)
T5 = T5Config(vocab_size=80, hidden_size=96, head_dim=12, intermediate_size=64, num_layers=2, num_heads=4)
FLUX = replace(PRESETS["flux1-dev"], hidden_size=128, num_heads=1, num_dual_blocks=2, num_single_blocks=2,
               context_dim=96, pooled_dim=64)
SD3 = replace(PRESETS["sd3.5-large"], hidden_size=128, num_heads=2, num_dual_blocks=3, context_dim=128, pooled_dim=128,
              position_table_size=24)
SD3_T5 = replace(T5, hidden_size=128)
CALL = {"prompt": "a red circle", "images": 2, "steps": 2, "height": 32, "width": 32}
PREFIXES = {"transformer": "model.diffusion_model.", "flux vae": "vae.", "sd3 vae": "first_stage_model.",
            **{role: f"text_encoders.{role}.transformer." for role in ("clip_l", "clip_g")},
            "t5": "text_encoders.t5xxl.transformer."}


def tokenizers(family):
    """What a hub folder of this family calls each, and where the bundled one is."""
    found = {"tokenizer": "tokenizer", "tokenizer_2": "tokenizer_2", "tokenizer_3": "tokenizer_3"}
    return {"tokenizer": "tokenizer", "tokenizer_2": "tokenizer_3"} if family == "flux" else found


@pytest.fixture(scope="module", params=["flux", "sd3"])
def originals(request, tmp_path_factory):
    """(family, folder): a random pipeline as original files, as a user may have downloaded them into one folder."""
    torch.manual_seed(0)
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    flux = family == "flux"
    vae = AutoencoderConfig(channels=(32, 32, 32), blocks_per_level=1, **LATENTS[family])
    weights.save_transformer(randomize(MMDiT(FLUX if flux else SD3)), folder / "transformer.safetensors")
    weights.save_autoencoder(randomize(Autoencoder(vae)), folder / "ae.safetensors")
    (folder / "text_encoders").mkdir()
    names = ("clip_l",) if flux else ("clip_l", "clip_g")
    for name in names:
        weights.save_text_encoder(randomize(ClipTextEncoder(CLIP)), folder / "text_encoders" / f"{name}.safetensors")
    weights.save_text_encoder(randomize(T5Encoder(T5 if flux else SD3_T5)), folder / "text_encoders" / "t5.safetensors")
    for name, source in tokenizers(family).items():
        shutil.copytree(TOKENIZERS / source, folder / name)
    return family, folder


def parts_of(family, folder):
    roles = ("clip_l", "t5") if family == "flux" else ("clip_l", "clip_g", "t5")
    encoders = [folder / "text_encoders" / f"{role.removesuffix('xxl')}.safetensors" for role in roles]
    return {"transformer": folder / "transformer.safetensors", "autoencoder": folder / "ae.safetensors",
            "text_encoders": encoders, "tokenizers": folder}


def merge(family, folder, target, bare=False):
    """Everything in one file, under the prefixes of ComfyUI's."""
    merged = {}
    encoders = {file.stem: file for file in (folder / "text_encoders").iterdir()}
    for name, file in {"transformer": folder / "transformer.safetensors", f"{family} vae": folder / "ae.safetensors",
                       **encoders}.items():
        for key, tensor in load_file(file).items():
            for prefix in PREFIXES.values():
                key = key.removeprefix(prefix)
            merged[key if bare and name == "transformer" else PREFIXES[name] + key] = tensor
    merged = {key: tensor for key, tensor in merged.items() if not key.endswith("encoder.embed_tokens.weight")}
    merged["text_encoders.clip_l.logit_scale"] = torch.ones(())
    save_file(merged, target)


@pytest.fixture(scope="module")
def reference(originals):
    pipeline = Pipeline.load(**parts_of(*originals))
    found = pixels(pipeline(**CALL))
    assert found.std() > 5
    return pipeline, found


def test_the_parts_are_what_each_loader_gives(originals, reference):
    family, folder = originals
    pipeline, _ = reference
    assert len(pipeline.text.clips) == (1 if family == "flux" else 2)
    same = weights.load_transformer(folder / "transformer.safetensors").state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in pipeline.transformer.state_dict().items())
    # an original file does not say how its latents are scaled: the family does
    latents = pipeline.autoencoder.config
    assert {"shift": latents.shift, "scaling": latents.scaling} == LATENTS[family]
    assert pipeline.schedule.shift == (None if family == "flux" else 3.0)
    assert pipeline.files["autoencoder"] == str(folder / "ae.safetensors")
    unprojected = pipeline.text.clips[0][1].module(pipeline.text.clips[0][0](["a star"])).unprojected
    pooled = pipeline.text("a star")[1]
    assert torch.equal(pooled[:, :64], unprojected) == (family == "flux")


def arrangements(family, folder, tmp_path):
    merged, bare = tmp_path / "merged.safetensors", tmp_path / "bare.safetensors"
    merge(family, folder, merged)
    merge(family, folder, bare, bare=True)
    hub, parts = tmp_path / "hub", parts_of(family, folder)
    weights.save_transformer(weights.load_transformer(parts["transformer"]), hub / "transformer", "hub", 300_000)
    shutil.copy(folder / "ae.safetensors", hub)
    shutil.copytree(folder / "text_encoders", hub / "text_encoders")
    yield {"name_or_path": folder}
    yield {"name_or_path": folder / "transformer.safetensors"}
    yield {"name_or_path": merged, "tokenizers": folder}
    yield {"name_or_path": bare, "tokenizers": folder}
    yield {"name_or_path": hub, "tokenizers": folder}
    yield {"name_or_path": merged, **parts}
    yield {"name_or_path": merged, "tokenizers": folder, "text_encoders": [merged]}


def test_every_arrangement_paints_the_same_pictures(originals, reference, tmp_path):
    for arrangement in arrangements(*originals, tmp_path):
        # Mapped from another file, tensors lie at other addresses, where products may be summed in another order.
        assert abs(pixels(Pipeline.load(**arrangement)(**CALL)) - reference[1]).max() <= 1, arrangement


def test_offloaded_parts_are_in_memory_one_at_a_time(originals, reference, monkeypatch):
    alive, load = [], Stored.load

    def watched(self, *arguments, **named):
        gc.collect()
        assert not [module for module in alive if module() is not None]
        module = load(self, *arguments, **named)
        alive.append(weakref.ref(module))
        return module

    monkeypatch.setattr(Stored, "load", watched)
    pipeline = Pipeline.load(**parts_of(*originals), offload="parts")
    assert not alive  # nothing is read before it is needed
    assert (pixels(pipeline(**CALL)) == reference[1]).all()
    assert len(alive) == len(pipeline.text.clips) + 3


def test_streamed_blocks_compute_the_same(originals, reference):
    pipeline, _ = reference
    model, config = pipeline.transformer, pipeline.config
    generator = torch.Generator().manual_seed(0)
    shapes = {"latent": (3, 16, 8, 8), "context": (3, 5, config.context_dim), "pooled": (3, config.pooled_dim)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs |= {"sigma": torch.full((3,), 0.5), "repulsion": Repulsion(strength=0.1)}
    if config.guidance_embedding:
        inputs["guidance"] = torch.full((3,), 3.5)
    with torch.no_grad():
        expected = model(**inputs)
        again = weights.load_transformer(originals[1] / "transformer.safetensors")
        streamed = stream_blocks(again, torch.device("cpu"))
        assert isinstance(streamed.dual_blocks, StreamedBlocks)
        assert torch.equal(streamed(**inputs), expected)
    assert streamed.state_dict().keys() == model.state_dict().keys()


def test_blocks_stay_as_narrow_as_they_are_stored_and_compute_the_same(originals, tmp_path):
    # Widening is exact, so blocks that are widened at each visit give the very numbers of blocks that are kept wide.
    family, folder = originals
    shutil.copytree(folder, tmp_path / "narrow")
    (file,) = (tmp_path / "narrow").rglob("transformer.safetensors")
    weights.save_transformer(weights.load_transformer(file, dtype=torch.bfloat16), file)
    call = parts_of(family, tmp_path / "narrow") | {"dtype": torch.float64, "device": "cpu"}
    kept, streamed = Pipeline.load(**call), Pipeline.load(**call, offload="blocks")
    model = streamed.transformer
    assert {p.dtype for p in model.dual_blocks.parameters()} == {torch.bfloat16}
    assert model.image_in.weight.dtype == torch.float64
    with trace(model, "velocity") as found, trace(kept.transformer, "velocity") as wanted:
        streamed(**CALL), kept(**CALL)
    assert all(torch.equal(a["velocity.out"], b["velocity.out"]) for a, b in zip(found, wanted, strict=True))


def test_offload_in_blocks_paints_the_same_pictures(originals, reference):
    pipeline = Pipeline.load(**parts_of(*originals), offload="blocks", device="cpu")
    assert (pixels(pipeline(**CALL)) == reference[1]).all()


def test_sd3_may_do_without_t5_and_nothing_else(originals, tmp_path):
    family, folder = originals
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "text_encoders" / "t5.safetensors").unlink()
    if family == "sd3":
        assert Pipeline.load(tmp_path / "copy").text.t5 is None
    else:
        with pytest.raises(FileNotFoundError, match=r"lacks t5 \(text_encoder_2/ or t5xxl_fp16\.safetensors\)"):
            Pipeline.load(tmp_path / "copy")
    (tmp_path / "copy" / "ae.safetensors").unlink()
    shutil.rmtree(tmp_path / "copy" / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"lacks autoencoder \(vae/.* tokenizer of clip_l \(tokenizer/\)"):
        Pipeline.load(tmp_path / "copy")


def test_wrong_parts_are_named(originals):
    family, folder = originals
    parts = parts_of(family, folder)
    clip = folder / "text_encoders" / "clip_l.safetensors"
    t5 = folder / "text_encoders" / "t5.safetensors"
    for change, error, message in [
        ({"transformer": clip}, ValueError, r"clip_l.safetensors holds no transformer but clip_l \(CLIP\)"),
        ({"autoencoder": parts["transformer"]}, ValueError, "transformer.safetensors holds no autoencoder but"),
        ({"text_encoders": [clip, t5, t5]}, ValueError, "t5.safetensors holds another t5, after .*t5.safetensors"),
        ({"tokenizers": folder / "tokenizer"}, FileNotFoundError, r"lacks tokenizer of clip_l \(tokenizer/\)"),
        ({"variant": "flux"}, ValueError, "variant must be one of .*flux1-dev, .*, got 'flux'"),
        ({"offload": "disk"}, ValueError, 'offload must be "parts" or "blocks"'),
    ]:
        with pytest.raises(error, match=message):
            Pipeline.load(**parts | change)


def test_an_autoencoder_of_another_family_is_refused(originals, tmp_path):
    family, folder = originals
    other = {"flux": "sd3", "sd3": "flux"}[family]  # as wide, but other latents
    model = Autoencoder(AutoencoderConfig(channels=(32, 32, 32), blocks_per_level=1, **LATENTS[other]))
    weights.save_autoencoder(model, tmp_path / "vae", "hub")
    with pytest.raises(ValueError, match=f"vae is an autoencoder of {other}, but the transformer .* is of {family}"):
        Pipeline.load(**parts_of(family, folder) | {"autoencoder": tmp_path / "vae"})
