"""Token ids and noise → pictures: noise levels and Euler steps. Ours: sampler/schedule.py, sampler/pipeline.py."""

import json
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

PARTS = "transformer", "text_encoder", "text_encoder_2", "vae"


def load(folder: Path) -> tuple[dict[str, Weights], dict]:
    """The weights of each network, and the settings of `paint`; `model` has the configs as JSON."""
    def read(name: str) -> dict:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    weights = {part: load_file(next((folder / part).glob("*.safetensors"))) for part in PARTS}
    model = {part: read(f"{part}/config.json") for part in PARTS} | read("scheduler/scheduler_config.json")
    settings = {key: value for key, value in read("sampling.json").items() if key in ("steps", "guidance")}
    repulsion = Repulsion(**read("sampling.json")["repulsion"])
    return jax.tree.map(jnp.float32, weights), settings | {"model": json.dumps(model), "repulsion": repulsion}


@partial(jax.jit, static_argnames=("model", "steps", "guidance", "repulsion", "checked"))
def paint(weights: dict[str, Weights], inputs: dict[str, Array], kit: dict[str, Array], *, model: str, steps: int,
          guidance: float, repulsion: Repulsion, checked: bool = False) -> dict[str, Array]:
    """inputs: clip_l.ids, t5.ids (prompts, n), noise (prompts · B, c, y, x), prompt after prompt → pixels (prompts · B,
    Y, X, 3), bytes. `checked`: and every tensor of the porting kit, each from those of `kit`, if it has any (fed)."""
    mine, configs, (start, stop) = {}, json.loads(model), (repulsion.start, repulsion.start + repulsion.steps)

    def tap(name: str, x: Array) -> Array:
        mine[name] = x
        return kit.get(name, x)

    encoders = ("clip_l", clip, "text_encoder"), ("t5", t5, "text_encoder_2")
    text = {name: encoder(weights[part], configs[part], tap(f"{name}.ids", inputs[f"{name}.ids"]), tap)
            for name, encoder, part in encoders}
    pooled, states = tap("clip_l.pooled", text["clip_l"]), tap("t5.states", text["t5"])
    pooled, states, noise = tap("pooled", pooled), tap("context", states), tap("noise", inputs["noise"])
    low, high, first, last = (configs[key] for key in (
        "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
    s = np.exp(first + (last - first) / (high - low) * (noise[0, 0].size // 4 - low))  # the larger, the more noise
    times = np.linspace(1, 0, steps + 1)
    sigmas = tap("sigmas", jnp.asarray(s * times / (1 + (s - 1) * times), jnp.float32))
    context, pooled = (jnp.repeat(y, len(noise) // len(y), axis=0) for y in (states, pooled))  # prompt after prompt
    v = partial(velocity, weights["transformer"], configs["transformer"], guidance=guidance, context=context,
                pooled=pooled, groups=len(states))
    free, pushed = (partial(v, repulsion=push, tap=lambda name, x: x) for push in (None, repulsion))

    def step(x: Array, given: tuple) -> tuple[Array, Array]:
        number, sigma, after, fed = given
        x = x if fed is None else fed
        x = x + (after - sigma) * jax.lax.cond((number >= start) & (number < stop), pushed, free, x, sigma)
        return x, x

    fed = jnp.stack([kit[f"latent.{i}" if i else "noise"] for i in range(steps)]) if kit else None
    _, latents = jax.lax.scan(step, noise, (jnp.arange(steps), sigmas[:-1], sigmas[1:], fed))
    mine |= {f"latent.{i + 1}": x for i, x in enumerate(latents)}
    if checked:  # the first step that repels once more, to see inside
        x = (kit or mine)[f"latent.{start}" if start else "noise"]
        guided = tap("velocity.guided", v(x, sigmas[start], repulsion=repulsion, tap=tap))
        mine[f"latent.{start + 1}"] = x + (sigmas[start + 1] - sigmas[start]) * guided
    image = decode(weights["vae"], configs["vae"], (kit or mine)[f"latent.{steps}"], tap)
    mine["pixels"] = jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8).transpose(0, 2, 3, 1)
    return mine if checked else {"pixels": mine["pixels"]}
