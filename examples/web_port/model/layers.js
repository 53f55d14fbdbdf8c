// What the networks share. Tokens (n, d) are one Float32Array, row by row; a network computes one sample at a time.
// Letters, as in the whole project: n context tokens, m image tokens, d width, h heads, k head width, c channels.

import { ordered, product } from "./product.js";

export class Network {
  /** tensors: the file's, by name; config: the config.json beside it. */
  constructor(tensors, config) {
    this.tensors = tensors;
    this.config = config;
    this.right = new Map();  // weights as right-hand matrices
    this.note = () => {};  // (name, data, shape): takes intermediate tensors, by the porting kit's names
  }

  w(name) {
    if (!this.tensors[name]) throw new Error(`the checkpoint has no tensor ${name}: it is of another architecture`);
    return this.tensors[name].data;
  }

  /** (…, inputs) → (…, outputs); the file holds (outputs, inputs), of a patch (outputs, c, p, p). */
  linear(name, x) {
    const weight = this.w(`${name}.weight`), outputs = this.tensors[`${name}.weight`].shape[0];
    const inputs = weight.length / outputs, stride = outputs + 8;  // no power of two: its rows would share cache lines
    if (!this.right.has(name)) {
      const turned = new Float32Array(inputs * stride);
      for (let o = 0; o < outputs; o++) {
        for (let i = 0; i < inputs; i++) turned[i * stride + o] = weight[o * inputs + i];
      }
      this.right.set(name, turned);
    }
    const y = product(x, this.right.get(name), x.length / inputs, inputs, outputs, ordered(inputs, stride));
    const bias = this.tensors[`${name}.bias`]?.data;
    if (bias) for (let i = 0, o = 0; i < y.length; i++, o = o + 1 === outputs ? 0 : o + 1) y[i] += bias[o];
    return y;
  }

  layerNorm(name, x) {
    const weight = this.w(`${name}.weight`), bias = this.w(`${name}.bias`), d = weight.length;
    return normalize(x, d, 1e-5).map((value, i) => value * weight[i % d] + bias[i % d]);
  }

  /** Each vector, as long as the weight, divided by its root mean square. */
  rmsNorm(name, x) {
    const weight = this.w(`${name}.weight`), d = weight.length, y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += d) {
      let squares = 0;
      for (let i = start; i < start + d; i++) squares += x[i] * x[i];
      const factor = 1 / Math.sqrt(squares / d + 1e-6);
      for (let i = 0; i < d; i++) y[start + i] = x[start + i] * factor * weight[i];
    }
    return y;
  }

  embed(name, ids) {
    const table = this.w(name), d = this.tensors[name].shape[1];
    return join(...Array.from(ids, (id) => table.subarray(id * d, (id + 1) * d)));
  }
}

/** Each vector of d numbers to mean 0 and variance 1. */
export function normalize(x, d, eps) {
  const y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += d) {
    let mean = 0, variance = 0;
    for (let i = start; i < start + d; i++) mean += x[i] / d;
    for (let i = start; i < start + d; i++) variance += (x[i] - mean) ** 2 / d;
    const factor = 1 / Math.sqrt(variance + eps);
    for (let i = start; i < start + d; i++) y[i] = (x[i] - mean) * factor;
  }
  return y;
}

/**
 * softmax(scale · q kᵀ + bias) v with the heads joined again: q, k, v (n, d) → (n, d), in which d is (h k).
 * bias(head, query, key) is added to the logits; watch(weights) sees the softmax (n, n) of each head.
 */
export function attend(q, k, v, d, heads, { scale = (d / heads) ** -0.5, bias, watch } = {}) {
  const n = q.length / d, width = d / heads, out = new Float32Array(q.length);
  const [queries, keys, values] = [q, k, v].map((x) => byHead(x, d, heads));
  for (let h = 0; h < heads; h++) {
    const part = (x) => x.subarray(h * n * width, (h + 1) * n * width);
    const weights = product(part(queries), transpose(part(keys), n, width), n, width, n, ordered(width, n));
    for (let i = 0; i < n; i++) {
      const row = weights.subarray(i * n, (i + 1) * n);
      let most = -Infinity, total = 0;
      for (let j = 0; j < n; j++) {
        row[j] = row[j] * scale + (bias ? bias(h, i, j) : 0);
        if (row[j] > most) most = row[j];
      }
      for (let j = 0; j < n; j++) total += row[j] = Math.exp(row[j] - most);
      for (let j = 0; j < n; j++) row[j] /= total;
    }
    watch?.(weights);
    const mixed = product(weights, part(values), n, n, width, ordered(n, width));
    for (let i = 0; i < n; i++) out.set(mixed.subarray(i * width, (i + 1) * width), i * d + h * width);
  }
  return out;
}

/** (n, h · k) → (h, n, k). */
export function byHead(x, d, heads) {
  const n = x.length / d, width = d / heads, y = new Float32Array(x.length);
  for (let h = 0; h < heads; h++) {
    for (let i = 0; i < n; i++) y.set(x.subarray(i * d + h * width, i * d + (h + 1) * width), (h * n + i) * width);
  }
  return y;
}

/** (rows, columns) → (columns, rows). */
export function transpose(x, rows, columns) {
  const y = new Float32Array(x.length);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) y[j * rows + i] = x[i * columns + j];
  return y;
}

/** Arrays one after the other. */
export function join(...arrays) {
  const y = new Float32Array(arrays.reduce((length, x) => length + x.length, 0));
  let place = 0;
  for (const x of arrays) {
    y.set(x, place);
    place += x.length;
  }
  return y;
}

export const plus = (x, y) => {
  const sum = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) sum[i] = x[i] + y[i];
  return sum;
};

/** x · sigmoid(β x). */
export const silu = (x, beta = 1) => {
  const y = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) y[i] = x[i] / (1 + Math.exp(-beta * x[i]));
  return y;
};

/** x/2 · (1 + tanh u) = x / (1 + e⁻²ᵘ), u = √(2/π) (x + 0.044715 x³). */
export const geluTanh = (x) => {
  const y = new Float32Array(x.length), factor = -2 * Math.sqrt(2 / Math.PI);
  for (let i = 0; i < x.length; i++) y[i] = x[i] / (1 + Math.exp(factor * x[i] * (1 + 0.044715 * x[i] * x[i])));
  return y;
};

export const gelu = (x) => x.map((value) => 0.5 * value * (1 + erf(value * Math.SQRT1_2)));

/** erf x = 2/√π · e^(−x²) Σ 2ⁿ x^(2n+1) / (1 · 3 · … (2n + 1)), a sum without cancellation. */
export function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let sum = 0;
  for (let n = 0, term = x; Math.abs(term) > 1e-17 * Math.abs(sum); term *= 2 * x * x / (2 * ++n + 1)) sum += term;
  return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
}
