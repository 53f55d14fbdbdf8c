"""Token ids → the context and the pooled vector. Ours: mmdit/clip.py, mmdit/t5.py, sampler/conditioning.py."""

import math
from dataclasses import replace

import numpy as np

from .layers import Array, Network, attend, gelu_tanh, silu

ACTIVATIONS = {  # numpy has no error function, Python has
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x * 0.5**0.5)),
    "quick_gelu": lambda x: silu(x, 1.702),
}


class Clip(Network):
    def encode(self, ids: Array) -> tuple[Array, Array]:
        """ids (b, n) → the states that enter the last layer (b, n, d), and the pooled vector (b, projection_dim)."""
        n, heads, activation = ids.shape[1], self.config["num_attention_heads"], ACTIVATIONS[self.config["hidden_act"]]
        x = self.w["text_model.embeddings.token_embedding.weight"][ids]
        x = x + self.w["text_model.embeddings.position_embedding.weight"][:n]
        causal = np.triu(np.full((n, n), -np.inf, x.dtype), 1)  # a token attends to itself and to those before it
        for i in range(self.config["num_hidden_layers"]):
            penultimate, name = x, f"text_model.encoder.layers.{i}"
            h = self.layer_norm(f"{name}.layer_norm1", x)
            q, k, v = self.to_heads([f"{name}.self_attn.{part}_proj" for part in "qkv"], heads, h)
            x = x + self.linear(f"{name}.self_attn.out_proj", attend(q, k, v, bias=causal))
            h = self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.layer_norm2", x))
            x = x + self.linear(f"{name}.mlp.fc2", activation(h))
            self.record.setdefault("layer_0", x)
        last = self.layer_norm("text_model.final_layer_norm", x)
        first_end = (ids == self.config["eos_token_id"]).argmax(axis=1)  # CLIP-L pads with the end token too
        return penultimate, self.linear("text_projection", last[np.arange(len(ids)), first_end])


class T5(Network):
    def encode(self, ids: Array) -> Array:
        """ids (b, n) → the last states (b, n, d). Padding is not masked: SD3 was trained so."""
        x, bias = self.w["shared.weight"][ids], self.position_bias(ids.shape[1])
        for i in range(self.config["num_layers"]):
            attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
            h = self.rms_norm(f"{attention}.layer_norm", x)
            names = [f"{attention}.SelfAttention.{part}" for part in "qkv"]
            heads = self.to_heads(names, self.config["num_heads"], h)
            x = x + self.linear(f"{attention}.SelfAttention.o", attend(*heads, scale=1, bias=bias))  # not divided by √k
            h = self.rms_norm(f"{mlp}.layer_norm", x)
            h = gelu_tanh(self.linear(f"{mlp}.DenseReluDense.wi_0", h)) * self.linear(f"{mlp}.DenseReluDense.wi_1", h)
            x = x + self.linear(f"{mlp}.DenseReluDense.wo", h)
            self.record.setdefault("layer_0", x)
        return self.rms_norm("encoder.final_layer_norm", x)

    def position_bias(self, n: int) -> Array:
        """The bias of the logits in every layer, (h, query, key), by the distance of key and query: half of the buckets
        for each direction; half of those for one distance each, the others of logarithmically growing width."""
        distance = np.arange(n)[None, :] - np.arange(n)[:, None]  # key − query
        half, far = self.config["relative_attention_num_buckets"] // 2, np.abs(distance)
        exact = half // 2
        span = np.float32(math.log(self.config["relative_attention_max_distance"] / exact))
        growth = np.log(np.maximum(far, 1).astype(np.float32) / exact) / span  # rounding decides at edges
        grown = np.minimum(exact + (growth * (half - exact)).astype(int), half - 1)
        bucket = np.where(far < exact, far, grown) + half * (distance > 0)
        return self.w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][bucket].transpose(2, 0, 1)


def encode(parts: dict[str, Network], inputs: dict[str, Array], record: dict[str, Array]) -> tuple[Array, Array]:
    """Ids of g prompts → context (g, N, width): the states of both CLIPs side by side, padded with zeros to T5's width,
    then T5's; and pooled (g, pooled_dim): the CLIPs' side by side."""
    encoders = {name: replace(parts[name], record={}) for name in ("clip_l", "clip_g", "t5")}
    states_l, pooled_l = encoders["clip_l"].encode(inputs["clip_l.ids"])
    states_g, pooled_g = encoders["clip_g"].encode(inputs["clip_g.ids"])
    states, clips = encoders["t5"].encode(inputs["t5.ids"]), np.concatenate([states_l, states_g], axis=2)
    clips = np.pad(clips, ((0, 0), (0, 0), (0, states.shape[2] - clips.shape[2])))
    context, pooled = np.concatenate([clips, states], axis=1), np.concatenate([pooled_l, pooled_g], axis=1)
    record.update({"clip_l.penultimate": states_l, "clip_l.pooled": pooled_l, "clip_g.penultimate": states_g,
                   "clip_g.pooled": pooled_g, "t5.states": states, "context": context, "pooled": pooled})
    record.update({f"{name}.layer_0": encoder.record["layer_0"] for name, encoder in encoders.items()})
    return context, pooled
