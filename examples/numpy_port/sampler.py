"""Noise → pictures: noise levels, guidance, Euler. Ours: sampler/schedule.py, sampler/pipeline.py."""

from dataclasses import replace

import numpy as np

from .layers import Array, Network
from .repulsion import Repulsion
from .text import encode


def paint(parts: dict[str, Network], inputs: dict[str, Array], steps: int, guidance: float, shift: float,
          repulsion: Repulsion | None = None) -> dict[str, Array]:
    """inputs: clip_l.ids, clip_g.ids, t5.ids (1 + prompts, n), row 0 the negative prompt (empty); noise (b, c, y, x),
    that of each prompt's pictures after another's → pixels (b, Y, X, 3), bytes, and every intermediate tensor by its
    name in the porting kit; those inside the transformer are of the first step that repels."""
    times = np.append(np.linspace(1, shift / (1000 + shift - 1), steps), 0)  # to 1/1000, shifted, and 0
    record = {"sigmas": (shift * times / (1 + (shift - 1) * times)).astype(np.float32)}  # shifted once more
    record |= {name: inputs[name] for name in ("clip_l.ids", "clip_g.ids", "t5.ids", "noise")}
    b, branches, prompts = len(inputs["noise"]), 2 if guidance > 1 else 1, len(inputs["t5.ids"]) - 1
    rows = np.repeat(np.arange(1, 1 + prompts), b // prompts)  # of each sample its prompt's
    rows = np.concatenate([0 * rows, rows][-branches:])  # both branches as one batch, the conditional one last
    context, pooled = (text[rows] for text in encode(parts, inputs, record))
    x = inputs["noise"].astype(context.dtype)
    for step in range(steps):
        sigma, next_sigma = record["sigmas"][step : step + 2].tolist()
        here = repulsion if repulsion and 0 <= step - repulsion.start < repulsion.steps else None
        seen = record if step == (repulsion.start if repulsion else 0) else {}
        transformer = replace(parts["transformer"], record=seen)
        v = transformer.velocity(np.concatenate([x] * branches), sigma, context, pooled, here, branches * prompts,
                                 branches)
        if branches == 2:
            seen["velocity.unconditional"], seen["velocity.conditional"] = v[:b], v[b:]
            v = v[:b] + guidance * (v[b:] - v[:b])
        x = x + (next_sigma - sigma) * v
        seen["velocity.guided"], record[f"latent.{step + 1}"] = v, x
    record["image"] = replace(parts["autoencoder"], record=record).decode(x)
    record["pixels"] = ((record["image"].clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return record
