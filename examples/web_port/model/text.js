// Token ids → the context and the pooled vector. Ours: mmdit/clip.py, mmdit/t5.py, sampler/conditioning.py.

import { Network, attend, gelu, geluTanh, join, plus, silu } from "./layers.js";

export class Clip extends Network {
  /** ids (n) → states: those that enter the last layer (n, d); pooled (projection_dim). */
  encode(ids, first = () => {}) {
    const { hidden_size: d, num_attention_heads: heads, num_hidden_layers: layers, hidden_act } = this.config;
    const activation = { gelu, quick_gelu: (x) => silu(x, 1.702) }[hidden_act], embeddings = "text_model.embeddings";
    const positions = this.w(`${embeddings}.position_embedding.weight`);
    let states, x = this.embed(`${embeddings}.token_embedding.weight`, ids).map((value, i) => value + positions[i]);
    for (let i = 0; i < layers; i++) {
      states = x;
      const name = `text_model.encoder.layers.${i}`, h = this.layerNorm(`${name}.layer_norm1`, x);
      const [q, k, v] = ["q", "k", "v"].map((part) => this.linear(`${name}.self_attn.${part}_proj`, h));
      const causal = (head, query, key) => (key > query ? -Infinity : 0);  // to itself and to the tokens before it
      x = plus(x, this.linear(`${name}.self_attn.out_proj`, attend(q, k, v, d, heads, { bias: causal })));
      const inner = this.linear(`${name}.mlp.fc1`, this.layerNorm(`${name}.layer_norm2`, x));
      x = plus(x, this.linear(`${name}.mlp.fc2`, activation(inner)));
      if (i === 0) first(x);
    }
    const end = ids.indexOf(this.config.eos_token_id);  // the first: CLIP-L pads with the end token too
    const last = this.layerNorm("text_model.final_layer_norm", x).subarray(end * d, (end + 1) * d);
    return { states, pooled: this.linear("text_projection", last) };
  }
}

export class T5 extends Network {
  /** ids (n) → the last states (n, d). Padding is not masked: SD3 was trained so. */
  encode(ids, first = () => {}) {
    const { num_layers: layers, num_heads: heads, d_kv: width } = this.config;
    let x = this.embed("shared.weight", ids);
    const bias = this.positionBias();
    for (let i = 0; i < layers; i++) {
      const attention = `encoder.block.${i}.layer.0`, mlp = `encoder.block.${i}.layer.1`;
      let h = this.rmsNorm(`${attention}.layer_norm`, x);
      const [q, k, v] = ["q", "k", "v"].map((part) => this.linear(`${attention}.SelfAttention.${part}`, h));
      const attended = attend(q, k, v, heads * width, heads, { scale: 1, bias });  // not divided by √k
      x = plus(x, this.linear(`${attention}.SelfAttention.o`, attended));
      h = this.rmsNorm(`${mlp}.layer_norm`, x);
      const value = this.linear(`${mlp}.DenseReluDense.wi_1`, h);
      h = geluTanh(this.linear(`${mlp}.DenseReluDense.wi_0`, h)).map((gate, j) => gate * value[j]);
      x = plus(x, this.linear(`${mlp}.DenseReluDense.wo`, h));
      if (i === 0) first(x);
    }
    return this.rmsNorm("encoder.final_layer_norm", x);
  }

  /**
   * The bias by the distance key − query: half of the buckets for each direction; half of those for one distance each,
   * the others of logarithmically growing width, in float32, whose rounding decides at the edges.
   */
  positionBias() {
    const { relative_attention_num_buckets: buckets, relative_attention_max_distance: farthest } = this.config;
    const table = this.w("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
    const half = buckets / 2, exact = half / 2, heads = this.config.num_heads, f32 = Math.fround;
    return (head, query, key) => {
      const far = Math.abs(key - query), span = f32(Math.log(farthest / exact));
      const growth = f32(f32(Math.log(f32(far / exact))) / span);
      const grown = Math.min(exact + Math.trunc(f32(growth * (half - exact))), half - 1);
      return table[((far < exact ? far : grown) + (key > query ? half : 0)) * heads + head];
    };
  }
}

/** A prompt → context (N, width): both CLIPs' states side by side, zeros up to T5's width, then T5's; pooled (d). */
export function encode({ clip_l, clip_g, t5 }, ids, note = () => {}) {
  const first = (name) => (x) => note(`${name}.layer_0`, x, [ids[name].length, x.length / ids[name].length]);
  const l = clip_l.encode(ids.clip_l, first("clip_l")), g = clip_g.encode(ids.clip_g, first("clip_g"));
  const states = t5.encode(ids.t5, first("t5"));
  const widths = [clip_l, clip_g].map((clip) => clip.config.hidden_size);
  const width = t5.config.d_model, n = ids.clip_l.length;
  const clips = new Float32Array(n * width);
  for (let i = 0; i < n; i++) {
    clips.set(l.states.subarray(i * widths[0], (i + 1) * widths[0]), i * width);
    clips.set(g.states.subarray(i * widths[1], (i + 1) * widths[1]), i * width + widths[0]);
  }
  const context = join(clips, states), pooled = join(l.pooled, g.pooled);
  note("clip_l.penultimate", l.states, [n, widths[0]]);
  note("clip_g.penultimate", g.states, [n, widths[1]]);
  note("clip_l.pooled", l.pooled, [l.pooled.length]);
  note("clip_g.pooled", g.pooled, [g.pooled.length]);
  note("t5.states", states, [ids.t5.length, width]);
  note("context", context, [context.length / width, width]);
  note("pooled", pooled, [pooled.length]);
  return { context, pooled };
}
