// Standard normal noise as torch.randn draws it on the CPU, so that a seed gives the project's own pictures.
// The numbers: M. Matsumoto, T. Nishimura, "Mersenne Twister", 1998. The pairing in blocks of 16 is torch's.

/** A function that returns the next 32 bits of MT19937. */
function mersenneTwister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let next = 624;
  return () => {
    if (next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      next = 0;
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** The noise of picture `image`, `count` numbers, a multiple of 16; as sampler.starting_noise for seeds below 2³². */
export function startingNoise(seed, image, count) {
  if (count % 16) throw new Error(`noise comes in blocks of 16 numbers, and a latent of ${count} is no multiple of it`);
  const draw = mersenneTwister(Number((BigInt(seed) * 1_000_003n + BigInt(image)) & 0xffffffffn));
  const x = Float32Array.from({ length: count }, () => (draw() & 0xffffff) / 2 ** 24);
  for (let start = 0; start < count; start += 16) {
    for (let j = start; j < start + 8; j++) {  // Box and Muller's pairs
      const radius = Math.sqrt(-2 * Math.log(1 - x[j])), angle = 2 * Math.PI * x[j + 8];
      [x[j], x[j + 8]] = [radius * Math.cos(angle), radius * Math.sin(angle)];
    }
  }
  return x;
}
