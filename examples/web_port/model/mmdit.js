// The transformer: a sample's latent, the noise level and the prompt → its velocity. Ours: mmdit/. Samples meet in one
// place, the push of their context tokens, so each is computed by itself and waits there for the others.

import { Network, attend, byHead, geluTanh, join, normalize, plus, silu } from "./layers.js";

export class Transformer extends Network {
  /**
   * latent (c, H, W) at sigma in [0, 1], context (n, ·), pooled (·) → the velocity, noise − image, (c, H, W).
   * push(block, tokens) → promise of the context tokens to go on with; maps: where what each text token attends to is
   * put, a (n, m) for each block; entries: where the tokens that enter each block are put; from: one of these, to start
   * there instead of at the first block.
   */
  async velocity({ latent, height, width, sigma, context, pooled, push, maps, entries, from }) {
    const { patch_size: p, num_layers: layers, in_channels: c } = this.config, rows = height / p, columns = width / p;
    const vector = this.conditioning(sigma, pooled), d = vector.length;
    let { block, context: text, image } = from ?? { block: 0, ...this.embedding(latent, c, p, rows, columns, context) };
    for (; block < layers; block++) {
      entries?.push({ block, context: text, image });
      [text, image] = await this.block(block, text, image, vector, push, maps);
    }
    const [scale, shift] = this.modulation("norm_out.linear", vector, 2);  // a pair is stored scale first
    const tokens = modulate(image, shift, scale), patches = this.linear("proj_out", tokens);
    this.note("final_modulation", join(shift, scale), [2, d]);
    this.note("image_out.in", tokens, [rows * columns, d]);
    const velocity = new Float32Array(latent.length), sorted = new Float32Array(latent.length);
    eachPatch(c, p, rows, columns, (place, patch, channel, inside) => {  // in the file the channel runs fastest
      const value = patches[patch * c * p * p + inside * c + channel];
      velocity[place] = value;
      sorted[patch * c * p * p + channel * p * p + inside] = value;
    });
    this.note("image_out.out", sorted, [rows * columns, c * p * p]);
    this.note("velocity.conditional", velocity, [c, height, width]);
    this.note("velocity.guided", velocity, [c, height, width]);
    return velocity;
  }

  /** The vector (d) that modulates every block, from the noise level's features and the pooled vector. */
  conditioning(sigma, pooled) {
    const half = 128, features = new Float32Array(2 * half), f32 = Math.fround;
    for (let j = 0; j < half; j++) {
      const angle = f32(1000 * sigma * f32(Math.exp(f32(-Math.log(10_000) * j / half))));
      [features[j], features[half + j]] = [Math.cos(angle), Math.sin(angle)];
    }
    const mlp = (name, x) => (
      this.linear(`time_text_embed.${name}.linear_2`, silu(this.linear(`time_text_embed.${name}.linear_1`, x))));
    const vector = plus(mlp("timestep_embedder", features), mlp("text_embedder", pooled));
    this.note("time_in.in", features, [2 * half]);
    this.note("dual.0.vector.in", vector, [vector.length]);
    return vector;
  }

  /** Both streams as they enter the first block; the middle of the position table is added to the image's. */
  embedding(latent, c, p, rows, columns, context) {
    const size = this.config.pos_embed_max_size, m = rows * columns, patches = new Float32Array(latent.length);
    eachPatch(c, p, rows, columns, (place, patch, channel, inside) => {
      patches[patch * c * p * p + channel * p * p + inside] = latent[place];
    });
    const embedded = this.linear("pos_embed.proj", patches), text = this.linear("context_embedder", context);
    const d = embedded.length / m, table = this.w("pos_embed.pos_embed");
    const [top, left] = [Math.floor((size - rows) / 2), Math.floor((size - columns) / 2)];
    const image = embedded.map((value, i) => {
      const patch = Math.floor(i / d), [row, column] = [Math.floor(patch / columns), patch % columns];
      return value + table[((top + row) * size + left + column) * d + i % d];
    });
    this.note("image_in.in", patches, [m, c * p * p]);
    this.note("image_in.out", embedded, [m, d]);
    this.note("context_in.out", text, [text.length / d, d]);
    return { context: text, image };
  }

  /** (d) → `parts` vectors (d): shift, scale, gate of the attention, then of the MLP. */
  modulation(name, vector, parts) {
    const values = this.linear(name, silu(vector)), d = values.length / parts;
    return Array.from({ length: parts }, (_, i) => values.subarray(i * d, (i + 1) * d));
  }

  /** Dual-stream block: context (n, d), image (m, d) → the same, but for the last, whose context is unused: null. */
  async block(i, context, image, vector, push, maps) {
    const name = `transformer_blocks.${i}`, last = i === this.config.num_layers - 1, d = vector.length;
    const ofImage = this.modulation(`${name}.norm1.linear`, vector, 6);
    let ofContext = this.modulation(`${name}.norm1_context.linear`, vector, last ? 2 : 6);
    if (last) ofContext = ofContext.reverse();
    for (const [stream, tokens, parts] of [["context", context, ofContext], ["image", image, ofImage]]) {
      this.note(`dual.${i}.${stream}.in`, tokens, [tokens.length / d, d]);
      this.note(`dual.${i}.${stream}.modulation`, join(...parts), [parts.length, d]);
    }
    let [text, picture] = this.attention(i, modulate(context, ...ofContext), modulate(image, ...ofImage), d, maps);
    if (!last) {
      if (push) text = await push(i, text);  // Eq. 2: the samples repel each other in the contextual space
      this.note(`dual.${i}.attention.context.out`, text, [text.length / d, d]);
    }
    image = this.feedForward(i, "image", gated(image, ofImage[2], picture), ...ofImage.slice(3));
    if (last) return [null, image];
    return [this.feedForward(i, "context", gated(context, ofContext[2], text), ...ofContext.slice(3)), image];
  }

  /** The MLP's residual step: (n, d) → (n, d). */
  feedForward(i, stream, tokens, shift, scale, gate) {
    const name = `transformer_blocks.${i}.ff${stream === "context" ? "_context" : ""}`, d = shift.length;
    const x = modulate(tokens, shift, scale), hidden = this.linear(`${name}.net.0.proj`, x), n = tokens.length / d;
    const active = geluTanh(hidden), y = this.linear(`${name}.net.2`, active), out = gated(tokens, gate, y);
    const wide = [n, hidden.length / n], noted = [["mlp.in", x, [n, d]], ["mlp.in_layer.out", hidden, wide],
      ["mlp.activation.out", active, wide], ["mlp.out", y, [n, d]], ["out", out, [n, d]]];
    for (const [what, data, shape] of noted) this.note(`dual.${i}.${stream}.${what}`, data, shape);
    return out;
  }

  /** Two streams, one softmax, the context first: (n, d), (m, d) → the same (Eq. 1). */
  attention(i, context, image, d, maps) {
    const name = `transformer_blocks.${i}.attn`, heads = this.config.num_attention_heads, n = context.length / d;
    const project = (part) => {
      const [x, y] = [this.linear(`${name}.add_${part}_proj`, context), this.linear(`${name}.to_${part}`, image)];
      if (part === "v") return join(x, y);
      return join(this.rmsNorm(`${name}.norm_added_${part}`, x), this.rmsNorm(`${name}.norm_${part}`, y));
    };
    const [q, k, v] = ["q", "k", "v"].map(project), all = q.length / d, m = all - n;
    const map = maps && new Float32Array(n * m);
    const watch = map && ((weights) => {  // the mean of the heads
      for (let t = 0; t < n; t++) for (let j = 0; j < m; j++) map[t * m + j] += weights[t * all + n + j] / heads;
    });
    const joint = attend(q, k, v, d, heads, { watch });
    if (map) maps.push(map);
    const picture = this.linear(`${name}.to_out.0`, joint.subarray(n * d));
    const last = i === this.config.num_layers - 1;
    const text = last ? null : this.linear(`${name}.to_add_out`, joint.subarray(0, n * d));
    const place = `dual.${i}.attention`;
    this.note(`${place}.context.in`, context, [n, d]);
    this.note(`${place}.image.in`, image, [m, d]);
    this.note(`${place}.image.out`, picture, [m, d]);
    for (const [what, x] of Object.entries({ q, k, v, attended: joint })) {
      this.note(`${place}.${what}`, byHead(x, d, heads), [heads, all, d / heads]);
    }
    return [text, picture];
  }
}

/** (1 + scale) · LayerNorm(tokens) + shift; what else a modulation has is not used. */
function modulate(tokens, shift, scale) {
  const d = shift.length, y = normalize(tokens, d, 1e-6);
  for (let i = 0, j = 0; i < y.length; i++, j = j + 1 === d ? 0 : j + 1) y[i] = (1 + scale[j]) * y[i] + shift[j];
  return y;
}

/** tokens + gate · update. */
function gated(tokens, gate, update) {
  const d = gate.length, y = new Float32Array(tokens.length);
  for (let i = 0, j = 0; i < y.length; i++, j = j + 1 === d ? 0 : j + 1) y[i] = tokens[i] + gate[j] * update[i];
  return y;
}

/** Every number of a latent (c, rows · p, columns · p): its place, its patch, its channel, its place in the patch. */
function eachPatch(c, p, rows, columns, visit) {
  for (let channel = 0, place = 0; channel < c; channel++) {
    for (let y = 0; y < rows * p; y++) {
      for (let x = 0; x < columns * p; x++, place++) {
        visit(place, Math.floor(y / p) * columns + Math.floor(x / p), channel, (y % p) * p + x % p);
      }
    }
  }
}
