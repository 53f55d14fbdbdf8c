"""Repelled attention scores, the paper's ablation: against attention written out, and in the pipeline."""

import math

import pytest
import torch
from test_pipeline import pixels

from mmdit.attention import JointAttention, attend
from repulsion import Repulsion, repel


@pytest.mark.parametrize("scale", [0.0, 50.0])
def test_repelled_scores_are_the_attention_of_repelled_logits(scale):
    torch.manual_seed(0)
    attention, (b, n, m) = JointAttention(16, 2, qk_norm=True).double(), (6, 3, 5)
    context, image = torch.randn(b, n, 16).double(), torch.randn(b, m, 16).double()
    found = attention(context, image, None, Repulsion(scale, tokens="scores"), groups=2)
    plain = attention(context, image)

    streams = attention.context.to_qkv(context), attention.image.to_qkv(image)
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(*streams, strict=True))
    logits = torch.einsum("bhik,bhjk->bhij", q[:, :, :n], k) / math.sqrt(8)
    apart = [repel(group.reshape(3, 2 * n, n + m), scale, 50) for group in logits.chunk(2)]
    read = torch.einsum("bhij,bhjk->bihk", torch.cat(apart).view_as(logits).softmax(-1), v).flatten(2)
    torch.testing.assert_close(found[0], attention.context.out(read))
    torch.testing.assert_close(found[1], attention.image.out(attend(q, k, v)[:, n:]))
    torch.testing.assert_close(found[1], plain[1])
    assert ((found[0] - plain[0]).norm() / plain[0].norm() > 0.01) == (scale > 0)


def test_repelled_scores_change_the_pictures(pipeline):
    call = {"prompt": "a ring", "images": 3, "steps": 4}
    push = Repulsion(diversity=0.5, steps=2, tokens="scores")
    assert (pixels(pipeline(**call, repulsion=push)) != pixels(pipeline(**call))).any()
