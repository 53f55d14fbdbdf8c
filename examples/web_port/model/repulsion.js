// Contextual repulsion (arXiv:2603.28762) in Gram space, in float64. Ours: repulsion/. A sample's tokens are one vector
// c_i; matrices are arrays of rows (B, B). Settings are those of repulsion/config.py, as far as `check` lets them pass.

const PARALLEL = 1e-14;  // samples whose cosine is this close to 1 are equal as far as float64 can tell

/** Settings of a push. Throws for what this port does not support. */
export function check(settings) {
  const { strength, objective = "vendi", until, kernel_reg = 1e-4 } = settings;
  if (!(strength >= 0) || !["vendi", "spread"].includes(objective) || !(kernel_reg > 0) || (until ?? null) !== null) {
    throw new Error(`this port pushes with a strength and steps, the objective "vendi" or "spread", not with ${
      JSON.stringify(settings)}: use the project itself`);
  }
  return settings;
}

/** Matrix of f(i, j), i and j below size. */
const matrix = (size, f) => Array.from({ length: size }, (_, i) => Array.from({ length: size }, (__, j) => f(i, j)));
const sum = (values) => values.reduce((x, y) => x + y, 0);
const multiply = (a, b) => matrix(a.length, (i, j) => sum(a[i].map((x, k) => x * b[k][j])));
const identity = (size) => matrix(size, (i, j) => (i === j ? 1 : 0));

/** Inner products of every pair of vectors: G = C Cᵀ. */
export function gramMatrix(vectors) {
  return matrix(vectors.length, (i, j) => {
    let inner = 0;
    for (let k = 0; k < vectors[i].length; k++) inner += vectors[i][k] * vectors[j][k];
    return inner;
  });
}

/** Cosines of every pair (Eq. 3). A zero vector has no direction: its cosine with every other is 0. */
export function cosineKernel(gram) {
  const r = gram.map((row, i) => (row[i] > 0 ? row[i] ** -0.5 : 0));
  return matrix(gram.length, (i, j) => (i === j ? 1 : gram[i][j] * r[i] * r[j]));
}

/** K̃ = (K + ε I) / (B (1 + ε)), of trace 1. */
const density = (kernel, reg) => matrix(kernel.length, (i, j) => (
  (kernel[i][j] + (i === j ? reg : 0)) / (kernel.length * (1 + reg))));

/** Eigenvalues of K̃, ascending. */
export const spectrum = (kernel, reg = 0) => eigen(density(kernel, reg)).values.sort((x, y) => x - y);

/** The effective number of samples, exp H, H = −Σ λ log λ (Eq. 4): from 1 (all alike) to B. */
export const vendiScore = (kernel) => Math.exp(-sum(spectrum(kernel).map((x) => (x > 0 ? x * Math.log(x) : 0))));

/** G → E with which the pushed samples are C + E C: M steps A ← A + L D A, each s / M as long as C (Frobenius norm). */
export function mixingMatrix(gram, { strength, iterations = 1, objective = "vendi", kernel_reg = 1e-4 }) {
  let a = identity(gram.length), now = gram;
  for (let step = 0; step < iterations; step++) {
    const d = gradientMatrix(now, objective, kernel_reg), along = multiply(d, now);
    const moved = sum(d.map((row, i) => sum(row.map((x, j) => x * along[i][j]))));  // ‖D A C‖²
    const length = moved > 0 ? strength / iterations * Math.sqrt(sum(gram.map((row, i) => row[i])) / moved) : 0;
    const turned = multiply(d, a);
    a = a.map((row, i) => row.map((x, j) => x + length * turned[i][j]));
    now = multiply(multiply(a, gram), matrix(a.length, (i, j) => a[j][i]));
  }
  return { mixing: a.map((row, i) => row.map((x, j) => x - (i === j ? 1 : 0))), pushed: now };
}

/**
 * D with ∂H/∂c_i = Σ_j D_ij c_j. With r_i = 1 / ‖c_i‖ and W = ∂H/∂K, ∂H/∂c_i = 2 r_i Σ_j W_ij (r_j c_j − K_ij r_i c_i);
 * W_ii is 0, since K_ii is 1 whatever c_i is, and W_ij of a pair that coincides. "spread" goes straight from the mean.
 */
export function gradientMatrix(gram, objective, reg) {
  const size = gram.length;
  if (objective === "spread") return matrix(size, (i, j) => (i === j ? 1 : 0) - 1 / size);
  const kernel = cosineKernel(gram), { values, vectors } = eigen(density(kernel, reg));
  const r = gram.map((row, i) => (row[i] > 0 ? row[i] ** -0.5 : 0));
  const w = matrix(size, (i, j) => (kernel[i][j] < 1 - PARALLEL
    ? -sum(values.map((x, k) => vectors[i][k] * (Math.log(x) + 1) * vectors[j][k])) / (size * (1 + reg)) : 0));
  return matrix(size, (i, j) => (i === j ? -2 * r[i] * r[i] * sum(w[i].map((x, k) => x * kernel[i][k]))
    : 2 * r[i] * w[i][j] * r[j]));
}

/** C + E C, each sample as a Float32Array. */
export function mix(vectors, mixing) {
  return vectors.map((vector, i) => vector.map((x, k) => {
    let moved = x;
    for (let j = 0; j < vectors.length; j++) moved += mixing[i][j] * vectors[j][k];
    return moved;
  }));
}

/** Eigenvalues and eigenvectors (in columns) of a symmetric matrix, by Jacobi's rotations. */
export function eigen(symmetric) {
  const a = symmetric.map((row) => [...row]), v = identity(a.length);
  for (let sweep = 0; sweep < 50; sweep++) {
    const off = sum(a.flatMap((row, i) => row.filter((_, j) => j < i).map((x) => x * x)));
    if (off < 1e-40) break;
    for (let p = 0; p < a.length; p++) {
      for (let q = p + 1; q < a.length; q++) {
        if (a[p][q] === 0) continue;
        const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
        const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.hypot(theta, 1)), c = 1 / Math.hypot(t, 1), s = t * c;
        for (const m of [a, v]) {
          for (const row of m) [row[p], row[q]] = [c * row[p] - s * row[q], s * row[p] + c * row[q]];
        }
        for (let k = 0; k < a.length; k++) [a[p][k], a[q][k]] = [c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]];
      }
    }
  }
  return { values: a.map((row, i) => row[i]), vectors: v };
}

/** The pushed tokens (settings null: no push), the Gram matrix before, and the kernel before and after. */
export function push(vectors, settings) {
  const gram = gramMatrix(vectors), before = cosineKernel(gram);
  if (!settings || vectors.length < 2) return { tokens: vectors, gram, before, after: before };
  const { mixing, pushed } = mixingMatrix(gram, check(settings));
  return { tokens: mix(vectors, mixing), gram, mixing, before, after: cosineKernel(pushed) };
}
