"""The same pipeline code on FLUX.1: small random checkpoints saved by diffusers, the same prompt and noise."""

import pytest
import torch
from einops import rearrange
from small_pipelines import assert_other_pictures, assert_same_pictures, flux, latents_of, saved

from mmdit import MMDiT
from repulsion import Repulsion
from sampler import starting_noise

PROMPT, SIZE = "a red circle and a star", {"height": 32, "width": 48}
NOISE = starting_noise(1, 3, (16, 8, 12))  # 32 × 48 pixels at a quarter


@pytest.fixture(scope="module", params=["dev", "schnell"])
def both(request, tmp_path_factory):
    """A small random FLUX.1 pipeline in diffusers, and ours, loaded from what it saved."""
    dev = request.param == "dev"
    return *saved(flux(guidance=dev), tmp_path_factory.mktemp(request.param)), dev


def diffusers_pictures(pipe, **call):
    return pipe(PROMPT, num_images_per_prompt=3, num_inference_steps=5, guidance_scale=2.5, max_sequence_length=24,
                latents=rearrange(NOISE, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2), **SIZE, **call).images


def our_pictures(pipe, dev, **call):
    return pipe(PROMPT, 3, noise=NOISE, steps=5, **({"guidance": 2.5} if dev else {}), **SIZE, **call)


def test_the_same_prompt_and_noise_give_the_same_pictures(both):
    theirs, ours, dev = both
    assert_same_pictures(our_pictures(ours, dev), diffusers_pictures(theirs))


def test_true_guidance_gives_the_same_pictures(both):
    theirs, ours, dev = both
    guided = diffusers_pictures(theirs, negative_prompt="a blue square", true_cfg_scale=3.0)
    assert_same_pictures(our_pictures(ours, dev, negative_prompt="a blue square", true_guidance=3.0), guided)
    assert_other_pictures(guided, our_pictures(ours, dev))


def test_true_guidance_is_affine_in_its_scale(both):
    _, ours, _ = both
    call = {"prompt": PROMPT, "images": 1, "steps": 1, "noise": NOISE[:1], **SIZE}
    guided = [{"negative_prompt": "", "true_guidance": scale} for scale in (2.0, 4.0, 6.0)]
    one, two, four, six = latents_of(ours, [call, *(call | more for more in guided)])
    # one step from the same noise; the transformer in float32, and differences of latents of about 1
    torch.testing.assert_close(six - four, four - two, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one, two - (four - two) / 2, rtol=1e-3, atol=1e-4)  # w = 1: the prompt alone
    assert (four - two).abs().max() > 1e-2


def test_both_branches_are_one_batch_and_repel_in_their_own_group(both, monkeypatch):
    _, ours, dev = both
    calls, forward = [], MMDiT.forward

    def spy(self, **inputs):
        told = inputs["guidance"]
        calls.append((len(inputs["latent"]), None if told is None else told.tolist(), inputs["repulsion"],
                      inputs["groups"]))
        return forward(self, **inputs)

    monkeypatch.setattr(MMDiT, "forward", spy)
    push = Repulsion(scale=1e3, iterations=2)
    ours(PROMPT, 2, steps=2, **SIZE, negative_prompt="a star", true_guidance=2.0, repulsion=push)
    distilled = [3.5] * 4 if dev else None
    assert calls == [(4, distilled, push, 2), (4, distilled, None, 2)]


def test_repulsion_moves_the_pictures(both):
    _, ours, _ = both
    calm, moved = (ours("a star", 2, steps=2, height=32, width=32, repulsion=push)
                   for push in (None, Repulsion(scale=1e3, iterations=3)))
    assert any(a.tobytes() != b.tobytes() for a, b in zip(calm, moved, strict=True))


@pytest.mark.parametrize("call,message", [
    ({"negative_prompt": "a circle"}, "negative_prompt needs .*a true_guidance above 1"),
    ({"negative_prompt": "a circle", "true_guidance": 1.0}, "negative_prompt needs"),
    ({"true_guidance": 3.0}, "true_guidance needs a negative_prompt"),
    ({"true_guidance": float("nan"), "negative_prompt": ""}, "true_guidance must be a finite number"),
])  # fmt: skip
def test_guidance_that_cannot_be_right_is_named(both, call, message):
    _, ours, _ = both
    with pytest.raises(ValueError, match=message):
        ours("a star", 1, steps=1, height=32, width=32, **call)


def test_a_guidance_that_the_model_cannot_hear_is_refused(both):
    _, ours, dev = both
    if not dev:
        with pytest.raises(ValueError, match="guidance 3.5 has no meaning for a distilled FLUX without guidance"):
            ours("a star", 1, steps=1, height=32, width=32, guidance=3.5)
