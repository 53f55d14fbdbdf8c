"""Kontext: the reference picture's size and numbers, and the whole pipeline against diffusers."""

import json
import shutil

import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from einops import rearrange
from PIL import Image
from small_pipelines import assert_other_pictures, assert_same_pictures, flux, photo, saved

from repulsion import Repulsion
from sampler import Pipeline, starting_noise
from sampler.references import SIZES, TRAINED_AREA, kontext_size, read_references


def kontext_pixels(picture, area=TRAINED_AREA):
    """What Kontext reads; it paints in the same size."""
    (pixels,), size = read_references([picture], flux2=False, area=area)
    assert size == pixels.shape[2:]
    return pixels


# ---- size


def test_the_sizes_are_the_published_list():
    assert sorted(SIZES) == sorted(PREFERRED_KONTEXT_RESOLUTIONS)
    for size in PREFERRED_KONTEXT_RESOLUTIONS:
        assert kontext_size(*size) == size


@pytest.mark.parametrize("size,expected", [
    ((500, 500), (1024, 1024)), ((4032, 3024), (1184, 880)), ((3024, 4032), (880, 1184)), ((1200, 800), (1248, 832)),
    ((1420, 1000), (1184, 880)), ((1920, 1080), (1392, 752)), ((1080, 1920), (752, 1392)), ((5000, 100), (1568, 672)),
    ((1, 999), (672, 1568)),
])  # fmt: skip
def test_the_trained_size_nearest_in_aspect_ratio_is_taken(size, expected):
    assert kontext_size(*size) == expected


def test_models_of_other_sizes_get_the_same_shape_in_their_own():
    assert kontext_size(1200, 800, area=512**2) == (624, 416)  # half of 1248 × 832
    assert kontext_size(4032, 3024, multiple=32) == (1184, 864)  # 880 is no multiple of 32
    assert kontext_size(1, 999, area=64**2, multiple=32) == (32, 96)  # 42 × 98
    assert kontext_size(1, 999, area=16**2, multiple=32) == (32, 32)  # 10 × 24: never below one


# ---- numbers


def test_a_picture_of_a_trained_size_keeps_its_pixels():
    picture = photo(672, 1568)
    pixels = kontext_pixels(picture)
    found = rearrange(((pixels + 1) * 127.5).round().byte(), "1 c y x -> y x c")
    assert bytes(found.flatten().tolist()) == picture.tobytes()


def test_another_size_is_resized_as_diffusers_does():
    picture = photo(400, 300)
    processor = VaeImageProcessor(vae_scale_factor=16)
    expected = processor.preprocess(processor.resize(picture, 880, 1184), 880, 1184)
    assert (kontext_pixels(picture) - expected).abs().max() < 1e-6  # of 1; one step of 8 bits is 8e-3


def test_a_photograph_is_turned_as_its_exif_entry_says():
    picture = photo(60, 40)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # shown turned by a quarter, clockwise: as `picture`
    assert torch.equal(kontext_pixels(turned, area=64**2), kontext_pixels(picture, area=64**2))


def test_transparency_becomes_white_and_other_modes_keep_what_they_show():
    gray = photo(64, 64).convert("L")
    plain = kontext_pixels(gray.convert("RGB"), area=64**2)
    assert torch.equal(kontext_pixels(gray, area=64**2), plain)
    deep = gray.convert("I").point(lambda value: value * 257).convert("I;16")
    assert torch.equal(kontext_pixels(deep, area=64**2), plain)

    clear = photo(64, 64).convert("RGBA")
    clear.putalpha(Image.new("L", (64, 64)))
    clear.paste((10, 20, 30, 255), (0, 0, 64, 32))
    pixels = kontext_pixels(clear, area=64**2)
    assert (pixels[..., 32:, :] == 1).all()
    assert ((pixels[0, :, 0, 0] + 1) * 127.5).round().tolist() == [10, 20, 30]


# ---- the pipeline


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A small random Kontext in diffusers, and ours, loaded from what it saved. Its autoencoder divides by 16 instead
    of 8, so that a reference of a megapixel makes a quarter of the tokens."""
    folder = tmp_path_factory.mktemp("models") / "Small-Kontext"
    return *saved(flux(FluxKontextPipeline, levels=5, blocks=1), folder), folder


@pytest.fixture(scope="module")
def small(both):
    """The same checkpoint with pictures of 64 × 64 pixels for its own, and a reference of that area: quick."""
    folder = shutil.copytree(both[2], both[2].with_name("quick"))
    sampling = {"steps": 2, "guidance": 2.5, "height": 64, "width": 64, "edits": True}
    (folder / "sampling.json").write_text(json.dumps(sampling))
    return Pipeline.load(folder)


def test_the_same_reference_prompt_and_noise_give_the_same_pictures(both):
    theirs, ours, _ = both
    noise = starting_noise(1, 1, (16, 4, 6))  # 64 × 96 pixels at a sixteenth
    expected = theirs(
        image=photo(400, 300), prompt="a red circle", num_inference_steps=2, height=64, width=96, max_area=64 * 96,
        guidance_scale=2.5, max_sequence_length=24,
        latents=rearrange(noise, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2),
    ).images  # fmt: skip
    found = ours("a red circle", 1, image=photo(400, 300), steps=2, height=64, width=96, noise=noise)
    assert_same_pictures(found, expected)
    assert_other_pictures(found, ours("a red circle", 1, steps=2, height=64, width=96, noise=noise))


def test_pictures_take_the_size_of_the_reference_where_none_is_asked_for(small):
    portrait = photo(200, 400)  # 720 × 1456, the nearest trained size, at a sixteenth: 45 × 91
    sizes = [small("a star", 1, image=portrait, **side)[0].size for side in ({}, {"height": 96}, {"width": 64})]
    assert sizes == [(32, 64), (32, 96), (64, 64)]
    assert small("a star", 1)[0].size == (64, 64)


def test_the_reference_is_read_and_repulsion_works_beside_it(small):
    call = {"height": 64, "width": 64, "image": photo(64, 64)}
    base = small("a star", 2, **call)
    assert_other_pictures(small("a star", 2, **call | {"image": photo(64, 64).rotate(180)}), base)
    repelled = small("a star", 2, **call, repulsion=Repulsion(scale=1e3, iterations=3))
    assert any(a.tobytes() != b.tobytes() for a, b in zip(base, repelled, strict=True))


def test_true_guidance_reads_the_reference_in_both_branches(small):
    call = {"height": 64, "width": 64, "image": photo(64, 64), "negative_prompt": "", "true_guidance": 2.0}
    turned = call | {"image": photo(64, 64).rotate(180)}
    assert_other_pictures(small("a star", 1, **call), small("a star", 1, **turned))


def test_an_image_that_is_a_path_is_refused(small):
    with pytest.raises(ValueError, match="image must be a PIL image, got a str"):
        small("a star", 1, image="photo.png")
