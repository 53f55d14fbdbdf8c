// Noise → pictures: noise levels and Euler's steps. Ours: sampler/schedule.py, sampler/pipeline.py.

/** steps + 1 noise levels from 1 to 0: evenly spaced times from 1 to the shifted 1/1000, shifted, and 0. */
export function noiseLevels(steps, shift) {
  const shifted = (t) => shift * t / (1 + (shift - 1) * t), last = shifted(1 / 1000);
  const times = Array.from({ length: steps }, (_, i) => (steps === 1 ? 1 : 1 + (last - 1) * i / (steps - 1)));
  return Float32Array.from([...times.map(shifted), 0]);
}

/** Whether block number `block` of `blocks` pushes in step number `step`; settings as in repulsion/config.py. */
export function pushes({ blocks: which = "all", start = 0, steps = 1 }, block, blocks, step) {
  const inside = Array.isArray(which) ? which.includes(block)
    : ["all", ["first", "middle", "last"][Math.floor(3 * block / blocks)]].includes(which);
  return inside && step >= start && step < start + steps;
}

/**
 * One sample from noise to its latent: x ← x + (σ′ − σ) v. velocity(x, sigma, step) → promise of v;
 * see({step, x, guess}) is told the latent after each step and the guess of its end, x̂₀ = x − σ v.
 */
export async function denoise(velocity, noise, levels, see = () => {}) {
  let x = noise;
  for (let step = 0; step + 1 < levels.length; step++) {
    const v = await velocity(x, levels[step], step), now = x;
    x = now.map((value, i) => value + (levels[step + 1] - levels[step]) * v[i]);
    see({ step, x, guess: now.map((value, i) => value - levels[step] * v[i]) });
  }
  return x;
}

/** Where samples meet: arrive(sample, key, tokens) → what meet(key, the tokens of all) returns for that sample. */
export class Meeting {
  constructor(size, meet) {
    Object.assign(this, { size, meet, waiting: new Map() });
  }

  arrive(sample, key, tokens) {
    const there = this.waiting.get(key) ?? this.waiting.set(key, []).get(key);
    return new Promise((go) => {
      there[sample] = { tokens, go };
      if (Object.keys(there).length < this.size) return;
      this.waiting.delete(key);
      const together = this.meet(key, there.map((one) => one.tokens));
      there.forEach((one, i) => one.go(together[i]));
    });
  }
}

/** A picture (3, height, width), about [-1, 1] → RGBA bytes, row by row. */
export function toPixels(image) {
  const places = image.length / 3, pixels = new Uint8ClampedArray(4 * places).fill(255);
  for (let c = 0; c < 3; c++) {
    for (let i = 0; i < places; i++) {
      const clipped = Math.min(1, Math.max(-1, image[c * places + i]));
      pixels[4 * i + c] = (clipped + 1) * 127.5;  // this array rounds, halves to even
    }
  }
  return pixels;
}
