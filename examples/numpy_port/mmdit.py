"""The transformer: latent, noise level and prompt → velocity. Ours: mmdit/model.py, blocks.py, attention.py."""

import math

import numpy as np

from .layers import Array, Network, attend, gelu_tanh, normalize, silu
from .repulsion import Repulsion


class Transformer(Network):
    def velocity(self, latent: Array, sigma: float, context: Array, pooled: Array, repulsion: Repulsion | None = None,
                 groups: int = 1, branches: int | None = None) -> Array:
        """latent (b, c, H, W), sigma in [0, 1], context (b, n, ·), pooled (b, ·) → noise − image (b, c, H, W). The
        batch is `groups` groups of equal size, one after the other; samples of one group repel each other. Each of the
        `branches` of guidance has as many of them, the conditional one last; None: a group is a branch."""
        p, size, layers = (self.config[key] for key in ("patch_size", "pos_embed_max_size", "num_layers"))
        b, c, height, width = latent.shape
        rows, columns = height // p, width // p
        vector, context = self.conditioning(sigma, pooled), self.linear("context_embedder", context)
        patches = latent.reshape(b, c, rows, p, columns, p).transpose(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, -1)
        embedded = self.linear("pos_embed.proj", patches)
        top, left = (size - rows) // 2, (size - columns) // 2  # the middle of the position table is added
        table = self.w["pos_embed.pos_embed"].reshape(size, size, -1)[top : top + rows, left : left + columns]
        image = embedded + table.reshape(rows * columns, -1)
        self.note("", {"dual.0.vector.in": vector, "context_in.out": context, "image_in.in": patches,
                       "image_in.out": embedded})
        for i in range(layers):
            here = repulsion if repulsion and repulsion.acts_in(i, layers) else None
            context, image = self.block(i, context, image, vector, here, groups, branches)
            self.note(f"dual.{i}.", {"context.out": context, "image.out": image})
        shift, scale = self.modulation("norm_out.linear", vector, 2)
        image = modulate(image, shift, scale)
        patches = self.linear("proj_out", image).reshape(b, -1, p, p, c).transpose(0, 1, 4, 2, 3)  # file: channel last
        self.note("", {"final_modulation": np.concatenate([shift, scale], axis=1), "image_out.in": image,
                       "image_out.out": patches.reshape(b, rows * columns, -1)})
        return patches.reshape(b, rows, columns, c, p, p).transpose(0, 3, 1, 4, 2, 5).reshape(latent.shape)

    def conditioning(self, sigma: float, pooled: Array) -> Array:
        """The vector that modulates every block, (b, d), from the noise level's features and the pooled vector."""
        angles = 1000 * np.float32(sigma) * np.exp(-math.log(10_000) * np.arange(128, dtype=np.float32) / 128)
        features = np.concatenate([np.cos(angles), np.sin(angles)])[None].astype(pooled.dtype)
        self.note("time_in.", {"in": np.repeat(features, len(pooled), axis=0)})
        time = silu(self.linear("time_text_embed.timestep_embedder.linear_1", features))
        text = silu(self.linear("time_text_embed.text_embedder.linear_1", pooled))
        return (self.linear("time_text_embed.timestep_embedder.linear_2", time)
                + self.linear("time_text_embed.text_embedder.linear_2", text))

    def modulation(self, name: str, vector: Array, parts: int) -> list[Array]:
        """(b, d) → shift, scale, gate of the attention, then of the MLP: (b, 1, d) each. A pair is stored reversed."""
        values = np.split(self.linear(name, silu(vector))[:, None], parts, axis=2)
        return values[::-1] if parts == 2 else values

    def block(self, i: int, context: Array, image: Array, vector: Array, repulsion: Repulsion | None, groups: int,
              branches: int | None = None) -> tuple[Array | None, Array]:
        """Dual-stream block i: context (b, n, d), image (b, m, d) → the same; the last, whose context output is unused,
        returns None for it and does not repel."""
        last = i == self.config["num_layers"] - 1
        c_parts = self.modulation(f"transformer_blocks.{i}.norm1_context.linear", vector, 2 if last else 6)
        parts = self.modulation(f"transformer_blocks.{i}.norm1.linear", vector, 6)
        self.note(f"dual.{i}.", {"context.in": context, "context.modulation": np.concatenate(c_parts, axis=1),
                                 "image.in": image, "image.modulation": np.concatenate(parts, axis=1)})
        context_attended, image_attended = self.attention(
            i, modulate(context, *c_parts[:2]), modulate(image, *parts[:2]))
        if repulsion and not last:  # Eq. 2
            context_attended, inside = repulsion.push(context_attended, groups, branches)
            self.note(f"dual.{i}.repulsion.", inside)
        self.note(f"dual.{i}.attention.", {"context.out": context_attended, "image.out": image_attended})
        image = self.feed_forward(i, "image", image + parts[2] * image_attended, *parts[3:])
        if last:
            return None, image
        return self.feed_forward(i, "context", context + c_parts[2] * context_attended, *c_parts[3:]), image

    def feed_forward(self, i: int, stream: str, tokens: Array, shift: Array, scale: Array, gate: Array) -> Array:
        """The MLP's residual step: (b, n, d) → (b, n, d)."""
        name, x = f"transformer_blocks.{i}.ff" + "_context" * (stream == "context"), modulate(tokens, shift, scale)
        hidden = self.linear(f"{name}.net.0.proj", x)
        active = gelu_tanh(hidden)
        out = self.linear(f"{name}.net.2", active)
        self.note(f"dual.{i}.{stream}.mlp.", {"in": x, "in_layer.out": hidden, "activation.out": active, "out": out})
        return tokens + gate * out

    def attention(self, i: int, context: Array, image: Array) -> tuple[Array | None, Array]:
        """Two streams, one softmax, the context first: (b, n, d), (b, m, d) → the same (Eq. 1)."""
        name, heads, n = f"transformer_blocks.{i}.attn", self.config["num_attention_heads"], context.shape[1]
        streams = []
        for tokens, projection, norm in ((context, "add_{}_proj", "norm_added"), (image, "to_{}", "norm")):
            q, k, v = self.to_heads([f"{name}.{projection.format(part)}" for part in "qkv"], heads, tokens)
            streams.append((self.rms_norm(f"{name}.{norm}_q", q), self.rms_norm(f"{name}.{norm}_k", k), v))
        q, k, v = (np.concatenate(pair, axis=2) for pair in zip(*streams, strict=True))
        joint = attend(q, k, v)
        self.note(f"dual.{i}.attention.", {"context.in": context, "image.in": image, "q": q, "k": k, "v": v,
                                           "attended": joint.reshape(*joint.shape[:2], heads, -1).swapaxes(1, 2)})
        context = self.linear(f"{name}.to_add_out", joint[:, :n]) if f"{name}.to_add_out.weight" in self.w else None
        return context, self.linear(f"{name}.to_out.0", joint[:, n:])


def modulate(tokens: Array, shift: Array, scale: Array) -> Array:
    return (1 + scale) * normalize(tokens, 1e-6) + shift
