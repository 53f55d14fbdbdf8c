"""The autoencoder's decoder: a latent → a picture. Ours: mmdit/autoencoder.py. Shapes are (b, channels, y, x)."""

import numpy as np

from .layers import Array, Network, attend, normalize, silu


class Decoder(Network):
    def decode(self, latent: Array) -> Array:
        """(b, c, y, x) → (b, 3, Y, X), about [-1, 1], not clipped."""
        x = latent / self.config["scaling_factor"] + self.config["shift_factor"]
        self.note("decoder.", {"in": x})
        x = self.conv("decoder.conv_in", x)
        x = self.residual("decoder.mid_block.resnets.0", x)
        x = self.attention("decoder.mid_block.attentions.0", x)
        x = self.residual("decoder.mid_block.resnets.1", x)
        self.note("decoder.", {"middle.out": x})
        for level in range(len(self.config["block_out_channels"])):
            for i in range(self.config["layers_per_block"] + 1):
                x = self.residual(f"decoder.up_blocks.{level}.resnets.{i}", x)
            up = f"decoder.up_blocks.{level}.upsamplers.0.conv"
            x = self.conv(up, x.repeat(2, axis=2).repeat(2, axis=3)) if f"{up}.weight" in self.w else x
            self.note("decoder.", {f"levels.{level}.out": x})
        return self.conv("decoder.conv_out", silu(self.group_norm("decoder.conv_norm_out", x)))

    def conv(self, name: str, x: Array) -> Array:
        """A convolution that keeps the size, 3 × 3 or 1 × 1: for each place a matrix times the shifted picture."""
        weight, (b, c, height, width) = self.w[f"{name}.weight"], x.shape  # (outputs, inputs, rows, columns)
        edge = weight.shape[2] // 2
        x = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
        y = sum(weight[:, :, i, j] @ x[:, :, i : i + height, j : j + width].reshape(b, c, -1)
                for i in range(weight.shape[2]) for j in range(weight.shape[3]))
        return y.reshape(b, -1, height, width) + self.w[f"{name}.bias"][:, None, None]

    def group_norm(self, name: str, x: Array) -> Array:
        """Each group of channels normalized over its channels and places."""
        y = normalize(x.reshape(len(x), self.config["norm_num_groups"], -1), 1e-6).reshape(x.shape)
        return y * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def residual(self, name: str, x: Array) -> Array:
        h = self.conv(f"{name}.conv1", silu(self.group_norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", silu(self.group_norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.w else x)

    def attention(self, name: str, x: Array) -> Array:
        """One head over all places, added to its input."""
        tokens = self.group_norm(f"{name}.group_norm", x).reshape(*x.shape[:2], -1).swapaxes(1, 2)  # (b, y · x, c)
        attended = attend(*self.to_heads([f"{name}.to_{part}" for part in "qkv"], 1, tokens))
        return x + self.linear(f"{name}.to_out.0", attended).swapaxes(1, 2).reshape(x.shape)
