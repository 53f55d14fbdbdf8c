"""FLUX.2 as a pipeline: whole runs against diffusers, the published loop and sizes, files of several releases."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import repeat
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_flux2 import dev, klein
from small_pipelines import assert_other_pictures, assert_same_pictures, flux, latents_of, photo, saved

from mmdit import MMDiT, MMDiTConfig, TextDecoder
from repulsion import Repulsion
from sampler import Pipeline, starting_noise
from sampler.guidance import GuidedVelocity
from sampler.parts import Part
from sampler.references import flux2_size, read_references
from sampler.schedule import denoise, sigmas
from tests.mmdit.small_tekken import tekken_file
from weights import PUBLIC, CheckpointError, load_text_encoder, load_transformer, save_text_encoder, save_transformer

DATA = Path(__file__).parents[1] / "data"
SIZE = {"height": 64, "width": 80}
NOISE = starting_noise(1, 2, (32, 8, 10))
PROMPTS = ["a red circle and a star", "一只猫坐在椅子上 🦊, Öl auf Leinwand", "a long story of a cat and a dog " * 60]
MAKERS = {"klein": klein, "base": lambda: klein(is_distilled=False), "dev": dev}


@pytest.fixture(scope="module", params=MAKERS)
def both(request, tmp_path_factory):
    """A small random FLUX.2 in diffusers, ours, loaded from the folder that it saved, and the arguments for both."""
    folder = tmp_path_factory.mktemp(request.param) / f"small-{request.param}"
    theirs, ours = saved(MAKERS[request.param](), folder)
    guidance = {"klein": None, "base": 3.0, "dev": 2.5}[request.param]
    # diffusers' pipeline for klein has a guidance, and ignores it
    return theirs, ours, {"guidance_scale": guidance or 4.0}, {"guidance": guidance}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """klein alone."""
    return saved(klein(), tmp_path_factory.mktemp("klein") / "klein")[1]


def test_the_variant_is_told_by_the_folder(both):
    _, ours, _, call = both
    expected = {None: (4, None), 3.0: (50, 4.0), 2.5: (50, 4.0)}[call["guidance"]]
    assert (ours.defaults.steps, ours.defaults.guidance) == expected
    assert ours.multiple == 8  # this autoencoder halves the sides twice, and has patches of 2 × 2
    assert ours.config.guidance_embedding == (call["guidance"] == 2.5)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "other scripts", "too long"])
@pytest.mark.filterwarnings("ignore:the text encoder reads only 512")
def test_the_same_prompt_and_noise_give_the_same_pictures(both, prompt):
    theirs, ours, their_call, our_call = both
    expected = theirs(prompt=prompt, num_images_per_prompt=2, latents=NOISE, num_inference_steps=4, **their_call,
                      **SIZE).images
    assert_same_pictures(ours(prompt, 2, noise=NOISE, steps=4, **our_call, **SIZE), expected)


@pytest.mark.parametrize("references", [[(100, 83)], [(80, 64), (65, 97), (64, 64)]], ids=["one", "several"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "other scripts", "too long"])
@pytest.mark.filterwarnings("ignore:the text encoder reads only 512")
def test_the_same_references_give_the_same_pictures(both, prompt, references):
    theirs, ours, their_call, our_call = both
    pictures = [photo(*size) for size in references]
    width, height = (side // 8 * 8 for side in references[0])  # the first one's, where none is asked for
    noise = starting_noise(1, 1, (32, height // 8, width // 8))
    expected = theirs(prompt=prompt, image=pictures, latents=noise, num_inference_steps=2, **their_call).images
    found = ours(prompt, 1, image=pictures, noise=noise, steps=2, **our_call)
    assert_same_pictures(found, expected)
    assert found[0].size == (width, height)
    assert_other_pictures(found, ours(prompt, 1, noise=noise, steps=2, height=height, width=width, **our_call))


@pytest.mark.parametrize("both", ["base"], indirect=True)
def test_the_base_s_guidance_is_affine_in_its_scale(both):
    _, ours, *_ = both
    call = {"prompt": PROMPTS[0], "images": 1, "steps": 1, "noise": NOISE[:1], **SIZE}
    one, two, four, six = latents_of(ours, [call | {"guidance": weight} for weight in (1.0, 2.0, 4.0, 6.0)])
    torch.testing.assert_close(six - four, four - two, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one, two - (four - two) / 2, rtol=1e-3, atol=1e-4)  # w = 1: the prompt alone
    assert (four - two).abs().max() > 1e-2


def test_the_published_loop_with_guidance():
    """Noise to latent in four steps, with the schedule and the guidance of the official program."""
    with safe_open(DATA / "flux2-bfl-loop.io.safetensors", "pt") as file:
        about = json.loads(file.metadata()["config"])
        io = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = MMDiTConfig(hidden_size=64, num_heads=2, num_dual_blocks=1, num_single_blocks=2, latent_channels=32,
                         patch_size=1, context_dim=48, pooled_dim=None, mlp_ratio=3.0, rope_axes=(8, 8, 8, 8),
                         rope_theta=2000, bias=False, gated_mlp=True, shared_modulation=True, reference_step=10)
    model = Part(lambda: load_transformer(DATA / "flux2-bfl-loop.safetensors", config))
    texts = torch.cat([io["negative_context"], io["context"]])
    velocity = GuidedVelocity(model, lambda samples, *_: (repeat(texts, "g n d -> (g b) n d", b=samples), None),
                              steps=about["steps"], weight=about["guidance"])
    levels = sigmas(about["steps"], image_tokens=6 * 4, spacing="flux2")
    torch.testing.assert_close(levels, io["sigmas"].float(), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        found = denoise(velocity, io["noise"], levels)
    assert (found - io["latent"]).norm() / io["latent"].norm() < 1e-5


def test_references_have_the_published_sizes():
    for row in json.loads((DATA / "flux2.reference-sizes.json").read_bytes()):
        assert flux2_size(*row["size"], 2024**2 if row["references"] == 1 else 1024**2) == tuple(row["scaled_to"])
        if max(row["size"]) <= 2100:  # larger ones take long to resize
            pixels, size = read_references([photo(*row["size"])] * row["references"], flux2=True, area=1024**2)
            assert [tuple(x.shape[:1:-1]) for x in pixels] == [tuple(row["used"])] * row["references"]
            assert size[::-1] == tuple(row["diffusers"])  # which always stays within 1024², as the painted picture does


@pytest.mark.parametrize(("size", "limit"), [((63, 100), "63 × 100"), ((900, 100), "900 × 100")])
def test_references_of_unusual_shape_are_refused(small, size, limit):
    with pytest.raises(ValueError, match=f"image has {limit} pixels, but FLUX.2 takes sides of at least 64"):
        small("a star", 1, image=[photo(64, 64), photo(*size)])


def test_the_middle_of_a_reference_is_read():
    (pixels,), _ = read_references([photo(101, 90)], flux2=True, area=1024**2)
    left, top = (101 - 96) // 2, (90 - 80) // 2
    (expected,), _ = read_references([photo(101, 90).crop((left, top, left + 96, top + 80))], flux2=True, area=1024**2)
    assert torch.equal(pixels, expected)


# ---- repulsion


def test_klein_repels_by_default_in_the_steps_above_its_noise_level():
    repulsion = PUBLIC["flux2-klein-4b"].settings.repulsion
    for steps, count in ((4, 2), (8, 3), (2, 1)):
        levels = sigmas(steps, image_tokens=4096, spacing="flux2").tolist()[:-1]
        assert [repulsion.acts_at(i, level) for i, level in enumerate(levels)] == [i < count for i in range(steps)]


def test_repulsion_acts_down_to_its_noise_level(small, monkeypatch):
    calls, forward = [], MMDiT.forward
    repulsion = Repulsion(strength=1.0, until=0.9)

    def spy(self, **inputs):
        calls.append(inputs["repulsion"])
        return forward(self, **inputs)

    monkeypatch.setattr(MMDiT, "forward", spy)
    levels = small.sigmas(4, 64, 80).tolist()
    pushed = small(PROMPTS[0], 2, noise=NOISE, repulsion=repulsion, **SIZE)
    assert [call is repulsion for call in calls] == [level >= 0.9 for level in levels[:-1]]
    assert 0 < sum(call is repulsion for call in calls) < 4
    assert_other_pictures(pushed, small(PROMPTS[0], 2, noise=NOISE, **SIZE))


# ---- files


def test_single_files_paint_as_the_hub_s_folder(both, tmp_path):
    """The usual mix of klein's users: an original transformer, ComfyUI's text encoder, which holds Mistral's tokenizer,
    and the hub's autoencoder. Without a folder nothing tells the base but its name."""
    _, ours, _, our_call = both
    hub = Path(ours.files["transformer"]).parent
    file = tmp_path / ("flux-2-klein-base.safetensors" if our_call["guidance"] == 3.0 else "flux-2.safetensors")
    save_transformer(load_transformer(hub), file)
    save_text_encoder(load_text_encoder(hub / "text_encoder"), tmp_path / "text.safetensors")
    parts = {"autoencoder": hub / "vae", "text_encoders": [tmp_path / "text.safetensors"], "tokenizers": hub}
    if our_call["guidance"] == 2.5:
        tokenizer = {"tekken_model": torch.tensor([*tekken_file(tmp_path).read_bytes()], dtype=torch.uint8)}
        save_file(load_file(tmp_path / "text.safetensors") | tokenizer, tmp_path / "text.safetensors")
        del parts["tokenizers"]
    mixed = Pipeline.load(file, **parts)
    assert mixed.defaults == ours.defaults
    call = {"noise": NOISE, "steps": 2, **SIZE, **our_call}
    assert same(mixed("a star", 2, **call), ours("a star", 2, **call))


def same(some, others):
    return all(one.tobytes() == other.tobytes() for one, other in zip(some, others, strict=True))


def test_offloading_blocks_paints_the_same(small):
    hub = Path(small.files["transformer"]).parent
    streamed = Pipeline.load(hub, offload="blocks")
    call = {"noise": NOISE, "steps": 2, **SIZE, "repulsion": Repulsion(strength=1.0)}
    assert same(small("a star", 2, **call), streamed("a star", 2, **call))


# ---- calls that make no sense


def test_guidance_is_refused_where_it_was_distilled_away(small):
    with pytest.raises(ValueError, match="guidance 4.0 has no meaning for a distilled FLUX without guidance embedding"):
        small("a star", 1, guidance=4.0)


def test_parts_of_another_model_are_refused(small, tmp_path):
    hub, other = Path(small.files["transformer"]).parent, saved(flux(), tmp_path / "flux1")[1]
    with pytest.raises(CheckpointError, match=r"vae makes latents of width 16, but the transformer .* reads 32: give"):
        Pipeline.load(hub, autoencoder=other.files["autoencoder"])
    encoder = load_text_encoder(hub / "text_encoder")
    wide = TextDecoder(replace(encoder.config, hidden_size=24))
    save_text_encoder(wide, tmp_path / "qwen_3_8b.safetensors")
    with pytest.raises(CheckpointError, match=r"qwen_3_8b.safetensors makes context of width 72, but .* reads 48"):
        Pipeline.load(hub, text_encoders=[tmp_path / "qwen_3_8b.safetensors"])


def test_references_are_refused_where_they_are_read_otherwise(small):
    kv = Pipeline.load(Path(small.files["transformer"]).parent, variant="flux2-klein-9b-kv")
    with pytest.raises(ValueError, match="image: this checkpoint edits no pictures.*klein-9B-kv"):
        kv("a star", 1, image=photo(64, 64))
    assert same(kv("a star", 1, noise=NOISE[:1], **SIZE), small("a star", 1, noise=NOISE[:1], **SIZE))


def test_a_long_prompt_is_cut_with_a_warning(small):
    with pytest.warns(UserWarning, match="the text encoder reads only 512 of the prompt's"):
        small(PROMPTS[2], 1, steps=1, **SIZE)


def test_the_text_encoder_is_never_float16(tmp_path):
    saved(klein(), tmp_path / "klein")
    half = Pipeline.load(tmp_path / "klein", dtype=torch.float16)
    assert next(half.text.decoder.module.parameters()).dtype == torch.bfloat16
