// The autoencoder's decoder: a latent → a picture. Ours: mmdit/autoencoder.py. A picture is (channels, y, x).

import { Network, attend, normalize, plus, silu, transpose } from "./layers.js";
import { ordered, product } from "./product.js";

export class Decoder extends Network {
  /** latent (c, rows, columns) → {image (3, height, width), about [-1, 1], not clipped; height, width}. */
  decode(latent, rows, columns) {
    const { scaling_factor: scaling, shift_factor: shift, block_out_channels: widths, layers_per_block } = this.config;
    let x = latent.map((value) => value / scaling + shift), size = [rows, columns];
    this.note("decoder.in", x, [x.length / (rows * columns), ...size]);
    x = this.conv("decoder.conv_in", x, size);
    x = this.residual("decoder.mid_block.resnets.0", x, size);
    x = this.attention("decoder.mid_block.attentions.0", x, size);
    x = this.residual("decoder.mid_block.resnets.1", x, size);
    this.note("decoder.middle.out", x, [x.length / (rows * columns), ...size]);
    for (let level = 0; level < widths.length; level++) {
      const name = `decoder.up_blocks.${level}`;
      for (let i = 0; i <= layers_per_block; i++) x = this.residual(`${name}.resnets.${i}`, x, size);
      if (this.tensors[`${name}.upsamplers.0.conv.weight`]) {
        x = twice(x, size);
        size = size.map((side) => 2 * side);
        x = this.conv(`${name}.upsamplers.0.conv`, x, size);
      }
      this.note(`decoder.levels.${level}.out`, x, [x.length / (size[0] * size[1]), ...size]);
    }
    const image = this.conv("decoder.conv_out", silu(this.groupNorm("decoder.conv_norm_out", x)), size);
    this.note("image", image, [3, ...size]);
    return { image, height: size[0], width: size[1] };
  }

  /**
   * A convolution that keeps the size, 3 × 3 or 1 × 1: the weight times the picture, shifted to each place of the
   * kernel. The picture gets a border of zeros; the results of a row end with those for the border, which are left out.
   */
  conv(name, x, [height, width]) {
    const weight = this.w(`${name}.weight`), bias = this.w(`${name}.bias`);
    const [outputs, channels, side] = this.tensors[`${name}.weight`].shape;
    const edge = (side - 1) / 2, wide = width + 2 * edge, plane = wide * (height + 2 * edge);
    const padded = new Float32Array(channels * plane);
    for (let c = 0; c < channels; c++) {
      for (let row = 0; row < height; row++) {
        const from = (c * height + row) * width;
        padded.set(x.subarray(from, from + width), c * plane + (row + edge) * wide + edge);
      }
    }
    const starts = Int32Array.from({ length: channels * side * side }, (_, k) => {
      const [c, place] = [Math.floor(k / (side * side)), k % (side * side)];
      return c * plane + Math.floor(place / side) * wide + place % side;
    });
    const y = product(weight, padded, outputs, starts.length, height * wide, starts);
    const out = new Float32Array(outputs * height * width);
    for (let o = 0, to = 0; o < outputs; o++) {
      for (let row = 0; row < height; row++) {
        for (let from = (o * height + row) * wide, last = from + width; from < last;) out[to++] = y[from++] + bias[o];
      }
    }
    return out;
  }

  /** Each group of channels normalized over its channels and places. */
  groupNorm(name, x) {
    const weight = this.w(`${name}.weight`), bias = this.w(`${name}.bias`), places = x.length / weight.length;
    const y = normalize(x, x.length / this.config.norm_num_groups, 1e-6);
    for (let c = 0, i = 0; c < weight.length; c++) {
      for (const last = i + places; i < last; i++) y[i] = y[i] * weight[c] + bias[c];
    }
    return y;
  }

  residual(name, x, size) {
    let h = this.conv(`${name}.conv1`, silu(this.groupNorm(`${name}.norm1`, x)), size);
    h = this.conv(`${name}.conv2`, silu(this.groupNorm(`${name}.norm2`, h)), size);
    return plus(h, this.tensors[`${name}.conv_shortcut.weight`] ? this.conv(`${name}.conv_shortcut`, x, size) : x);
  }

  /** One head over all places, added to its input. */
  attention(name, x, [height, width]) {
    const places = height * width, d = x.length / places;
    const tokens = transpose(this.groupNorm(`${name}.group_norm`, x), d, places);
    const [q, k, v] = ["q", "k", "v"].map((part) => this.linear(`${name}.to_${part}`, tokens));
    return plus(x, transpose(this.linear(`${name}.to_out.0`, attend(q, k, v, d, 1)), places, d));
  }
}

/** Every value repeated in a square of 2 × 2. */
function twice(x, [, width]) {
  const y = new Float32Array(4 * x.length);
  for (let row = 0, to = 0; row < 2 * (x.length / width); row++) {
    const from = Math.floor(row / 2) * width;
    for (let column = 0; column < 2 * width; column++) y[to++] = x[from + (column >> 1)];
  }
  return y;
}
