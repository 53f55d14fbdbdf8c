"""Prompts → token ids → the states of CLIP and T5. Ours: mmdit/tokenizers.py, clip.py, t5.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from transformers import CLIPTokenizer, T5Tokenizer

from .layers import Tap, Weights, attend, joined, layer_norm, linear, rms_norm, to_heads


def tokenize(folder: Path, prompts: list[str]) -> dict[str, np.ndarray]:
    """CLIP's and T5's ids of each prompt, padded: clip_l.ids and t5.ids (prompts, n)."""
    kinds = ("clip_l", CLIPTokenizer, "tokenizer"), ("t5", T5Tokenizer, "tokenizer_2")
    return {f"{name}.ids": np.array(kind.from_pretrained(folder / place)(
        prompts, padding="max_length", truncation=True)["input_ids"]) for name, kind, place in kinds}


def clip(w: Weights, config: dict, ids: Array, tap: Tap) -> Array:
    """ids (b, n) → the last state at the first end token, (b, d); FLUX.1 does not project it."""
    n, name = ids.shape[1], "text_model.embeddings.{}_embedding.weight"
    x = w[name.format("token")][ids] + w[name.format("position")][:n]
    causal = jnp.triu(jnp.full((n, n), -jnp.inf, x.dtype), 1)  # a token attends to itself and to earlier ones
    for i in range(config["num_hidden_layers"]):
        name = f"text_model.encoder.layers.{i}"
        names = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        q, k, v = to_heads(w, names, config["num_attention_heads"], layer_norm(w, f"{name}.layer_norm1", x))
        x = x + linear(w, f"{name}.self_attn.out_proj", joined(attend(q, k, v, bias=causal)))
        y = linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.layer_norm2", x))
        x = x + linear(w, f"{name}.mlp.fc2", y * jax.nn.sigmoid(1.702 * y))  # quick_gelu
        x = tap("clip_l.layer_0", x) if i == 0 else x
    x = layer_norm(w, "text_model.final_layer_norm", x)
    return x[jnp.arange(len(ids)), (ids == config["eos_token_id"]).argmax(axis=1)]


def t5(w: Weights, config: dict, ids: Array, tap: Tap) -> Array:
    """ids (b, n) → the last states (b, n, d). Padding is not masked."""
    x, bias = w["shared.weight"][ids], position_bias(w, config, ids.shape[1])
    for i in range(config["num_layers"]):
        first, second = (f"encoder.block.{i}.layer.{part}" for part in (0, 1))
        names = [f"{first}.SelfAttention.{part}" for part in "qkv"]
        q, k, v = to_heads(w, names, config["num_heads"], rms_norm(w, f"{first}.layer_norm", x))
        x = x + linear(w, f"{first}.SelfAttention.o", joined(attend(q, k, v, 1.0, bias)))  # not divided by √k
        y, name = rms_norm(w, f"{second}.layer_norm", x), f"{second}.DenseReluDense"
        x = x + linear(w, f"{name}.wo", jax.nn.gelu(linear(w, f"{name}.wi_0", y), True) * linear(w, f"{name}.wi_1", y))
        x = tap("t5.layer_0", x) if i == 0 else x
    return rms_norm(w, "encoder.final_layer_norm", x)


def position_bias(w: Weights, config: dict, n: int) -> Array:
    """The bias of every layer's logits, (h, query, key), by the bucket of key − query."""
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    (half, exact), far = (config["relative_attention_num_buckets"] // part for part in (2, 4)), np.abs(distance)
    span = np.float32(np.log(config["relative_attention_max_distance"] / exact))
    growth = np.log(np.maximum(far, 1).astype(np.float32) / exact) / span  # rounding decides at edges
    grown = np.minimum(exact + (growth * (half - exact)).astype(int), half - 1)
    bucket = np.where(far < exact, far, grown) + half * (distance > 0)
    return w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][bucket].transpose(2, 0, 1)
