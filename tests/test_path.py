"""The path from a prompt to the mixing of tokens, in the bundled checkpoints: six calls, and two places that push."""

import sys

import pytest
import torch

from mmdit import Autoencoder
from mmdit.attention import JointAttention
from mmdit.blocks import SingleBlock
from repulsion import Repulsion, repel
from sampler import Pipeline
from weights import BUNDLED

PACKAGES = {"repulsion", "mmdit", "weights", "tiny", "sampler", "training", "porting"}
PROMPT = "two red circles"
every_checkpoint = pytest.mark.parametrize("name", BUNDLED)


# ---- six calls


def own_frames(frame):
    """The functions of this project from the first call to `frame`, methods as Class.method."""
    names = []
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in PACKAGES:
            owner = frame.f_locals.get("self")
            names.append(f"{type(owner).__name__}.{frame.f_code.co_name}" if owner is not None
                         else frame.f_code.co_name)
        frame = frame.f_back
    return tuple(reversed(names))


def paths_to_repel(call):
    """The frames of this project between `call` and `repel`, each time it is entered."""
    body, paths, before = repel.__wrapped__.__code__, [], sys.getprofile()  # without the decorator's frame

    def profile(frame, event, _):
        if event == "call" and frame.f_code is body:
            paths.append(own_frames(frame))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return paths


TO_A_BLOCK = ("Pipeline.__call__", "denoise", "GuidedVelocity.__call__", "MMDiT.forward")
THROUGH_DUAL = (*TO_A_BLOCK, "DualBlock.forward", "JointAttention.forward", "repel")
THROUGH_SINGLE = (*TO_A_BLOCK, "SingleBlock.forward", "repel")


@every_checkpoint
def test_from_the_prompt_to_the_mixing_of_tokens_in_six_calls(name):
    pipeline = Pipeline.load(name)
    paths = paths_to_repel(lambda: pipeline(PROMPT, images=2, steps=1, repulsion=Repulsion(strength=1.0)))
    dual = pipeline.config.num_dual_blocks - pipeline.config.context_ends_early  # SD3 computes no last context
    assert paths == [THROUGH_DUAL] * dual + [THROUGH_SINGLE] * pipeline.config.num_single_blocks
    assert len(THROUGH_DUAL) - 1 == 6


# ---- two places


@pytest.fixture
def without_push(monkeypatch):
    """Calling it takes the push away from the two places; returns a list of what they are given from then on."""

    def replace():
        dropped, joint, single = [], JointAttention.forward, SingleBlock.forward

        def joint_forward(self, context, image, rope=None, push=None):
            dropped.append(push)
            return joint(self, context, image, rope, None)

        def single_forward(self, tokens, vector, rope=None, push=None):
            dropped.append(push)
            return single(self, tokens, vector, rope, None)

        monkeypatch.setattr(JointAttention, "forward", joint_forward)
        monkeypatch.setattr(SingleBlock, "forward", single_forward)
        return dropped

    return replace


@every_checkpoint
def test_repulsion_acts_in_the_two_attentions_and_nowhere_else(name, without_push, monkeypatch):
    pipeline, latents, decode = Pipeline.load(name), [], Autoencoder.decode
    settings, blocks = pipeline.defaults.repulsion, pipeline.config.num_blocks
    monkeypatch.setattr(Autoencoder, "decode", lambda self, latent: latents.append(latent) or decode(self, latent))

    def batch(repulsion=None):
        latents.clear()
        pictures = pipeline(PROMPT, images=2, steps=settings.start + 2, repulsion=repulsion)
        return torch.cat(latents), b"".join(picture.tobytes() for picture in pictures)

    typical, typical_pictures = batch()
    repelled, repelled_pictures = batch(settings)
    assert all(not torch.equal(a, b) for a, b in zip(typical, repelled, strict=True))
    assert repelled_pictures != typical_pictures

    dropped = without_push()
    found, pictures = batch(settings)
    assert torch.equal(found, typical) and pictures == typical_pictures
    acting = sum(settings.acts_in(block, blocks) for block in range(blocks))
    assert sum(push is not None for push in dropped) == min(settings.steps, 2) * acting > 0
