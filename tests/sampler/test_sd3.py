"""Every kind of SD3 as a whole pipeline: small random checkpoints saved by diffusers, the same prompt and noise."""

from dataclasses import replace

import pytest
from small_pipelines import assert_other_pictures, assert_same_pictures, saved, sd3

from mmdit import MMDiT
from repulsion import Repulsion
from sampler import SkipLayerGuidance, starting_noise
from sampler.methods import IntervalGuidance

PROMPT, SIZE = "a red circle and a star", {"height": 32, "width": 48}
NOISE = starting_noise(1, 2, (16, 8, 12))  # 32 × 48 pixels at a quarter
KINDS = {
    "sd3-medium": {}, "sd3-medium without T5": {"with_t5": False}, "sd3.5-large": {"qk_norm": "rms_norm"},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention": (0, 1)},
}  # fmt: skip
SKIP = SkipLayerGuidance(layers=(1, 2), scale=2.8, start=0.01, stop=0.5)  # of 6 steps: in 1 and 2


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A kind's name → its pipeline in diffusers, and ours, loaded from what it saved; each made once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = saved(sd3(**KINDS[kind]), tmp_path_factory.mktemp("sd3") / kind.replace(" ", "-"))
        return made[kind]

    return make


@pytest.fixture
def medium(pipelines):
    return pipelines("sd3.5-medium")[1]


def diffusers_pictures(pipe, guidance=4.5, **call):
    length = 256 if pipe.text_encoder_3 is None else 24
    return pipe(PROMPT, num_images_per_prompt=2, num_inference_steps=6, guidance_scale=guidance, latents=NOISE,
                max_sequence_length=length, **SIZE, **call).images


def our_pictures(pipe, guidance=4.5, **call):
    return pipe(PROMPT, 2, noise=NOISE, steps=6, guidance=guidance, **SIZE, **call)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_and_noise_give_the_same_pictures(pipelines, kind):
    theirs, ours = pipelines(kind)
    assert (ours.text.t5 is None) == (theirs.text_encoder_3 is None)
    assert_same_pictures(our_pictures(ours), diffusers_pictures(theirs))


@pytest.mark.parametrize("kind", ["sd3-medium without T5", "sd3.5-large"])
def test_a_negative_prompt_gives_the_same_pictures(pipelines, kind):
    theirs, ours = pipelines(kind)
    guided = diffusers_pictures(theirs, negative_prompt="a blue square")
    assert_same_pictures(our_pictures(ours, negative_prompt="a blue square"), guided)
    assert_other_pictures(guided, our_pictures(ours))


@pytest.mark.parametrize("kind", ["sd3-medium", "sd3.5-medium"])
def test_without_guidance_as_turbo_is_used(pipelines, kind):
    theirs, ours = pipelines(kind)
    assert_same_pictures(our_pictures(ours, guidance=1.0), diffusers_pictures(theirs, guidance=1.0))


# ---- skip-layer guidance


def test_skip_layer_guidance_gives_the_same_pictures(pipelines):
    theirs, ours = pipelines("sd3.5-medium")
    guided = diffusers_pictures(theirs, skip_guidance_layers=[1, 2], skip_layer_guidance_scale=2.8,
                                skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.5)
    assert_same_pictures(our_pictures(ours, skip_layer_guidance=SKIP), guided)
    assert_other_pictures(guided, our_pictures(ours))


def test_a_scale_of_zero_is_no_skip_layer_guidance(medium):
    plain, zero = (our_pictures(medium, skip_layer_guidance=skip) for skip in (None, replace(SKIP, scale=0.0)))
    assert [p.tobytes() for p in plain] == [p.tobytes() for p in zero]


def test_the_third_branch_repels_like_the_conditional_one(medium, monkeypatch):
    calls, forward = [], MMDiT.forward

    def spy(self, **inputs):
        calls.append((len(inputs["latent"]), inputs["repulsion"], inputs.get("groups", 1),
                      inputs.get("skip_layers", ())))
        return forward(self, **inputs)

    monkeypatch.setattr(MMDiT, "forward", spy)
    push = Repulsion(scale=1e3, iterations=2, steps=2)
    our_pictures(medium, skip_layer_guidance=SKIP, repulsion=push)
    both, skipped = (4, push, 2, ()), (2, push, 1, (1, 2))
    calm, calm_skipped = (4, None, 2, ()), (2, None, 1, (1, 2))
    assert calls == [both, both, skipped, calm, calm_skipped, calm, calm, calm]
    calls.clear()
    our_pictures(medium, skip_layer_guidance=SKIP, method=IntervalGuidance(1.0))
    assert calls == [(2, None, 1, ())] * 6  # without guidance the prompt alone


def test_it_acts_in_the_steps_that_the_original_takes():
    # Stability's condition is start · n < i < stop · n, with 0.01 and 0.2
    acting = {steps: [i for i in range(steps) if SkipLayerGuidance().acts_in(i, steps)] for steps in (5, 28, 40)}
    assert acting == {5: [], 28: [1, 2, 3, 4, 5], 40: [1, 2, 3, 4, 5, 6, 7]}


@pytest.mark.parametrize("change,message", [
    ({"layers": ()}, "needs layers"), ({"layers": (-1,)}, "indices from 0 on"), ({"layers": ("7",)}, "needs layers"),
    ({"scale": -1.0}, "scale must be"), ({"scale": float("nan")}, "scale must be"),
    ({"start": 0.3}, "start ≤ stop"), ({"stop": 1.1}, "stop ≤ 1"), ({"start": -0.1}, "0 ≤ start"),
])  # fmt: skip
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SkipLayerGuidance(), **change)


@pytest.mark.parametrize("call,message", [
    ({"skip_layer_guidance": SkipLayerGuidance()}, "skips layer 9, but this model's dual-stream blocks end at 3"),
    ({"skip_layer_guidance": SKIP, "guidance": 1.0}, "skip_layer_guidance needs classifier-free guidance"),
    ({"true_guidance": 3.0}, "true_guidance is for distilled FLUX"),
])  # fmt: skip
def test_calls_that_cannot_be_right_are_named(medium, call, message):
    with pytest.raises(ValueError, match=message):
        our_pictures(medium, **call)
