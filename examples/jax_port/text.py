"""Prompts → token ids → the context and the pooled vector. Ours: mmdit/tokenizers.py, mmdit/clip.py, mmdit/t5.py."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from .layers import Tap, Weights, attend, joined, layer_norm, linear, mlp, rms_norm, to_heads

WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
ACTIVATIONS = {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x), "gelu": lambda x: jax.nn.gelu(x, False)}


def tokenize(folder: Path, prompts: list[str]) -> dict[str, np.ndarray]:
    """CLIP's and T5's ids of each prompt, padded: clip_l.ids and t5.ids (prompts, n)."""
    places = folder / "tokenizer", folder / "tokenizer_2"
    n, m = (json.loads((place / "tokenizer_config.json").read_text())["model_max_length"] for place in places)
    files = [str(places[0] / name) for name in ("vocab.json", "merges.txt")]
    clip = Tokenizer(models.BPE.from_file(*files, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    clip.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    clip.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORD), "removed", invert=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    start, end = (clip.token_to_id(f"<|{name}oftext|>") for name in ("start", "end"))
    t5 = SentencePieceProcessor(str(places[1] / "spiece.model"))
    words = [[start, *clip.encode(prompt).ids[: n - 2], end] for prompt in prompts]
    pieces = [[*t5.encode(prompt)[: m - 1], t5.eos_id()] for prompt in prompts]
    return {"clip_l.ids": np.array([row + [end] * (n - len(row)) for row in words]),
            "t5.ids": np.array([row + [t5.pad_id()] * (m - len(row)) for row in pieces])}


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
        y = layer_norm(w, f"{name}.layer_norm2", x)
        x = x + mlp(w, f"{name}.mlp.fc1", f"{name}.mlp.fc2", y, ACTIVATIONS[config["hidden_act"]])
        x = tap("clip_l.layer_0", x) if i == 0 else x
    first_end = (ids == config["eos_token_id"]).argmax(axis=1)
    return layer_norm(w, "text_model.final_layer_norm", x)[jnp.arange(len(ids)), first_end]


def t5(w: Weights, config: dict, ids: Array, tap: Tap) -> Array:
    """ids (b, n) → the last states (b, n, d). Padding is not masked."""
    x, bias = w["shared.weight"][ids], position_bias(w, config, ids.shape[1])
    for i in range(config["num_layers"]):
        first, second = (f"encoder.block.{i}.layer.{part}" for part in (0, 1))
        names = [f"{first}.SelfAttention.{part}" for part in "qkv"]
        q, k, v = to_heads(w, names, config["num_heads"], rms_norm(w, f"{first}.layer_norm", x))
        x = x + linear(w, f"{first}.SelfAttention.o", joined(attend(q, k, v, 1.0, bias)))  # not divided by √k
        y, name = rms_norm(w, f"{second}.layer_norm", x), f"{second}.DenseReluDense"
        y = jax.nn.gelu(linear(w, f"{name}.wi_0", y), True) * linear(w, f"{name}.wi_1", y)
        x = x + linear(w, f"{name}.wo", y)
        x = tap("t5.layer_0", x) if i == 0 else x
    return rms_norm(w, "encoder.final_layer_norm", x)


def position_bias(w: Weights, config: dict, n: int) -> Array:
    """The bias of every layer's logits, (h, query, key), by key − query: half of the buckets for each direction; half
    of those for one distance each, the others of logarithmically growing width."""
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    half, far = config["relative_attention_num_buckets"] // 2, np.abs(distance)
    exact = half // 2
    span = np.float32(np.log(config["relative_attention_max_distance"] / exact))
    growth = np.log(np.maximum(far, 1).astype(np.float32) / exact) / span  # rounding decides at edges
    grown = np.minimum(exact + (growth * (half - exact)).astype(int), half - 1)
    bucket = np.where(far < exact, far, grown) + half * (distance > 0)
    return w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][bucket].transpose(2, 0, 1)
