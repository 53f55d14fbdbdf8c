"""Token ids and noise → pictures: noise levels and Euler steps. Ours: sampler/schedule.py, sampler/pipeline.py."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.flax import load_file

from .autoencoder import decode
from .flux import velocity
from .layers import Weights
from .repulsion import Repulsion
from .text import clip, t5

PARTS = {"transformer": "transformer/diffusion_pytorch_model", "clip_l": "text_encoder/model",
         "t5": "text_encoder_2/model", "autoencoder": "vae/diffusion_pytorch_model"}


def load(folder: Path) -> tuple[dict[str, Weights], dict]:
    """The weights of each network in float32; and the settings of `paint`: configs, steps, guidance, repulsion, shift."""
    def read(name: str) -> dict:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    weights = {part: {name: x.astype(jnp.float32) for name, x in load_file(folder / f"{place}.safetensors").items()}
               for part, place in PARTS.items()}
    sampling, configs = read("sampling.json"), {part: read(f"{place.split('/')[0]}/config.json") for part, place in PARTS.items()}
    return weights, {"configs": configs, "steps": sampling["steps"], "guidance": sampling["guidance"],
                     "repulsion": Repulsion(**sampling["repulsion"]), "schedule": read("scheduler/scheduler_config.json")}


def levels(steps: int, image_tokens: int, schedule: dict) -> np.ndarray:
    """The noise levels from 1 to 0: evenly spaced times, shifted towards noise, more so for larger pictures."""
    low, high = schedule["base_image_seq_len"], schedule["max_image_seq_len"]
    slope = (schedule["max_shift"] - schedule["base_shift"]) / (high - low)
    s, t = math.exp(schedule["base_shift"] + slope * (image_tokens - low)), np.linspace(1, 0, steps + 1)
    return (s * t / (1 + (s - 1) * t)).astype(np.float32)


@partial(jax.jit, static_argnames=("steps", "guidance", "repulsion", "checked", "frozen"))
def painted(weights: dict[str, Weights], inputs: dict[str, Array], kit: dict[str, Array], *, frozen: str, steps: int,
            guidance: float, repulsion: Repulsion | None, checked: bool) -> dict[str, Array]:
    """`paint` without its preparations; `frozen` are configs and schedule as JSON."""
    mine, (configs, schedule) = {}, json.loads(frozen)

    def tap(name: str, x: Array) -> Array:
        mine[name] = x
        return kit.get(name, x)

    noise = tap("noise", inputs["noise"])
    pooled = tap("pooled", tap("clip_l.pooled", clip(
        weights["clip_l"], configs["clip_l"], tap("clip_l.ids", inputs["clip_l.ids"]), tap)))
    states = tap("context", tap("t5.states", t5(weights["t5"], configs["t5"], tap("t5.ids", inputs["t5.ids"]), tap)))
    sigmas = tap("sigmas", jnp.asarray(levels(steps, noise[0, 0].size // 4, schedule)))
    context, pooled = (jnp.repeat(x, len(noise) // len(x), axis=0) for x in (states, pooled))  # prompt after prompt
    start, stop = (repulsion.start, repulsion.start + repulsion.steps) if repulsion else (0, 0)

    def v(x: Array, sigma: Array, push: Repulsion | None, *tap) -> Array:
        more = guidance, context, pooled, push, len(states), *tap
        return velocity(weights["transformer"], configs["transformer"], x, sigma, *more)

    def step(push: Repulsion | None, x: Array, given: tuple) -> tuple[Array, Array]:
        number, sigma, after, kits = given
        x = x if kits is None else kits
        x = x + (after - sigma) * v(x, sigma, push)
        return x, x

    kits = jnp.stack([kit[f"latent.{i}" if i else "noise"] for i in range(steps)]) if kit else None
    numbers, x = jnp.arange(steps), noise
    for first, last, push in ((0, start, None), (start, min(stop, steps), repulsion), (min(stop, steps), steps, None)):
        given = jax.tree.map(lambda y: y[first:last], (numbers, sigmas[:-1], sigmas[1:], kits))
        x, latents = jax.lax.scan(partial(step, push), x, given)
        mine |= {f"latent.{first + i + 1}": latents[i] for i in range(last - first)}
    if checked:  # once more the first step that repels, to see inside
        x = (kit or mine)[f"latent.{start}" if start else "noise"]
        guided = tap("velocity.guided", v(x, sigmas[start], repulsion, tap))
        mine[f"latent.{start + 1}"] = x + (sigmas[start + 1] - sigmas[start]) * guided
    image = decode(weights["autoencoder"], configs["autoencoder"], (kit or mine)[f"latent.{steps}"], tap)
    mine["pixels"] = jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8).transpose(0, 2, 3, 1)
    return mine if checked else {"pixels": mine["pixels"]}


def paint(weights: dict[str, Weights], inputs: dict[str, Array], *, configs: dict, schedule: dict,
          kit: dict[str, Array] | None = None, checked: bool = False, **settings) -> dict[str, Array]:
    """inputs: clip_l.ids and t5.ids (prompts, n), noise (prompts · B, c, y, x), prompt after prompt → pixels
    (prompts · B, Y, X, 3), bytes. `checked`: and every tensor of the porting kit, each computed from those of `kit`
    where that is given (fed)."""
    return painted(weights, inputs, kit or {}, frozen=json.dumps([configs, schedule]), checked=checked, **settings)
