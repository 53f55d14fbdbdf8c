"""The transformer: latent, noise level and prompt → velocity. Ours: mmdit/model.py, blocks.py, attention.py."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .layers import Tap, Weights, attend, joined, linear, normalize, rms_norm, to_heads
from .repulsion import Repulsion

P = 2  # a patch's side; files hold a patch's c · p · p numbers as channels


def velocity(w: Weights, config: dict, latent: Array, sigma: Array, *, guidance: float, context: Array, pooled: Array,
             repulsion: Repulsion | None, groups: int, tap: Tap) -> Array:
    """latent (b, c, H, W), sigma () in [0, 1], context (b, n, ·), pooled (b, ·) → noise − image (b, c, H, W). The batch
    is `groups` groups of equal size, one after the other; samples of one group repel each other."""
    dual, single, place = config["num_layers"], config["num_single_layers"], "time_text_embed.{}_embedder.linear_{}"
    b, c, rows, columns = *latent.shape[:2], latent.shape[2] // P, latent.shape[3] // P
    inputs = {"timestep": tap("time_in.in", features(sigma, b)), "text": pooled}
    if config["guidance_embeds"]:
        inputs["guidance"] = tap("guidance_in.in", features(jnp.float32(guidance), b))
    inputs = {name: jax.nn.silu(linear(w, place.format(name, 1), x)) for name, x in inputs.items()}
    vector = tap("dual.0.vector.in", sum(linear(w, place.format(name, 2), x) for name, x in inputs.items()))
    context = tap("context_in.out", linear(w, "context_embedder", context))
    patches = latent.reshape(b, c, rows, P, columns, P).transpose(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, -1)
    image = tap("image_in.out", linear(w, "x_embedder", tap("image_in.in", patches)))
    n, rope = context.shape[1], tap("dual.0.rope.in", rotations(context.shape[1], rows, columns, config))

    def push(number: int, tokens: Array, tap: Tap, place: str) -> Array:
        """The tokens that leave an attention, after the push (Eq. 2) or as they are."""
        here = repulsion and repulsion.acts_in(number, dual + single)
        return repulsion.push(tokens, groups, lambda what, x: tap(f"{place}.{what}", x)) if here else tokens

    more = config["num_attention_heads"], vector, rope, push
    for i in range(dual):
        context, image = dual_block(w, i, context, image, *more, tap if i in (0, dual - 1) else lambda name, x: x)
    tokens = jnp.concatenate([context, image], axis=1)
    for i in range(single):
        tokens = single_block(w, i, dual + i, tokens, *more, tap if i in (0, single - 1) else lambda name, x: x)
    parts = linear(w, "norm_out.linear", jax.nn.silu(vector)).reshape(b, 2, -1)[:, ::-1]  # files hold the scale first
    shift, scale = jnp.split(tap("final_modulation", parts), 2, axis=1)
    patches = linear(w, "proj_out", tap("image_out.in", modulate(tokens[:, n:], shift, scale)))
    patches = tap("image_out.out", patches).reshape(b, rows, columns, c, P, P)
    return tap("velocity.conditional", patches.transpose(0, 3, 1, 4, 2, 5).reshape(latent.shape))


def features(level: Array, b: int) -> Array:
    """Cosines, then sines of a number counted in thousandths: () → (b, 256)."""
    angles = 1000 * level * 10_000.0 ** (-jnp.arange(128, dtype=jnp.float32) / 128)
    return jnp.repeat(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])[None], b, axis=0)


def rotations(n: int, rows: int, columns: int, config: dict) -> Array:
    """Cosine and sine of each token's angles (2, n + m, k / 2): the context's tokens are at 0, 0, 0."""
    positions = np.concatenate([np.zeros((n, 3)), np.indices((1, rows, columns)).reshape(3, -1).T])
    angles = np.concatenate([positions[:, i, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
                             for i, width in enumerate(config["axes_dims_rope"])], axis=1)
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32)


def modulate(tokens: Array, shift: Array, scale: Array) -> Array:
    return (1 + scale) * normalize(tokens, 1e-6) + shift


def modulation(w: Weights, name: str, vector: Array, parts: int, tap: Tap, place: str) -> list[Array]:  # (b, 1, d)
    values = linear(w, name, jax.nn.silu(vector)).reshape(len(vector), parts, -1)
    return jnp.split(tap(f"{place}.modulation", values), parts, axis=1)


def attention(q: Array, k: Array, v: Array, rope: Array, tap: Tap, place: str) -> Array:
    def rotate(x: Array) -> Array:
        (cos, sin), even, odd = rope, x[..., 0::2], x[..., 1::2]  # pairs of neighbors
        return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    q, k, v = (tap(f"{place}.attention.{name}", x) for name, x in zip("qkv", (rotate(q), rotate(k), v), strict=True))
    return tap(f"{place}.attention.attended", attend(q, k, v))


def dual_block(w: Weights, i: int, context: Array, image: Array, h: int, vector: Array, rope: Array, push: Callable,
               tap: Tap) -> tuple[Array, Array]:
    """Two streams, one softmax, the context first (Eq. 1): context (b, n, d), image (b, m, d) → the same."""
    name, block, n, parts, qkv = f"transformer_blocks.{i}", f"dual.{i}", context.shape[1], {}, []
    x = {"context": tap(f"{block}.context.in", context), "image": tap(f"{block}.image.in", image)}
    for stream, norm, project, added in (("context", "norm1_context", "add_{}_proj", "_added"),
                                         ("image", "norm1", "to_{}", "")):
        parts[stream] = modulation(w, f"{name}.{norm}.linear", vector, 6, tap, f"{block}.{stream}")
        y = tap(f"{block}.attention.{stream}.in", modulate(x[stream], *parts[stream][:2]))
        names = [f"{name}.attn.{project.format(part)}" for part in "qkv"]
        q, k, v = to_heads(w, names, h, y)
        qkv.append((*(rms_norm(w, f"{name}.attn.norm{added}_{part}", y) for part, y in (("q", q), ("k", k))), v))
    joint = attention(*(jnp.concatenate(pair, axis=2) for pair in zip(*qkv, strict=True)), rope, tap, block)
    attended = linear(w, f"{name}.attn.to_add_out", joined(joint[:, :, :n]))
    attended = {"context": push(i, attended, tap, f"{block}.repulsion"),
                "image": linear(w, f"{name}.attn.to_out.0", joined(joint[:, :, n:]))}
    for stream, ff in (("context", "ff_context"), ("image", "ff")):
        _, _, gate, shift, scale, mlp_gate = parts[stream]
        after = x[stream] + gate * tap(f"{block}.attention.{stream}.out", attended[stream])
        y = tap(f"{block}.{stream}.mlp.in", modulate(after, shift, scale))
        y = tap(f"{block}.{stream}.mlp.in_layer.out", linear(w, f"{name}.{ff}.net.0.proj", y))
        y = tap(f"{block}.{stream}.mlp.activation.out", jax.nn.gelu(y, True))
        y = tap(f"{block}.{stream}.mlp.out", linear(w, f"{name}.{ff}.net.2", y))
        x[stream] = tap(f"{block}.{stream}.out", after + mlp_gate * y)
    return x["context"], x["image"]


def single_block(w: Weights, i: int, number: int, tokens: Array, h: int, vector: Array, rope: Array, push: Callable,
                 tap: Tap) -> Array:
    """Context and image as one sequence, attention and MLP in parallel: (b, n + m, d) → the same."""
    name, block, tokens = f"single_transformer_blocks.{i}", f"single.{i}", tap(f"single.{i}.tokens.in", tokens)
    shift, scale, gate = modulation(w, f"{name}.norm.linear", vector, 3, tap, block)
    x = tap(f"{block}.linear_in.in", modulate(tokens, shift, scale))
    q, k, v = to_heads(w, [f"{name}.attn.to_{part}" for part in "qkv"], h, x)
    q, k = rms_norm(w, f"{name}.attn.norm_q", q), rms_norm(w, f"{name}.attn.norm_k", k)
    attended = push(number, joined(attention(q, k, v, rope, tap, block)), tap, f"{block}.repulsion")
    y = tap(f"{block}.activation.in", linear(w, f"{name}.proj_mlp", x))
    y = tap(f"{block}.activation.out", jax.nn.gelu(y, True))
    both = tap(f"{block}.linear_out.in", jnp.concatenate([attended, y], axis=-1))
    return tap(f"{block}.tokens.out", tokens + gate * linear(w, f"{name}.proj_out", both))
