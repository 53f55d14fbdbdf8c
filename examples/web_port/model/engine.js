// The page's side: workers that compute the samples, and the meeting of these samples in the push.

import { connect } from "./calls.js";
import { readFiles, settings } from "./checkpoint.js";
import { startingNoise } from "./noise.js";
import { push } from "./repulsion.js";
import { Meeting, denoise, noiseLevels, pushes } from "./sampler.js";

export class Engine {
  /** The checkpoint in the folder at this address. progress(share of the files that are read). */
  static async load(folder, progress = () => {}) {
    let [begun, done] = [0, 0];
    const files = await readFiles(async (path) => {
      begun++;
      const response = await fetch(new URL(path, folder));
      if (!response.ok) throw new Error(`${new URL(path, folder)} cannot be read (${response.status}): serve the whole `
        + "repository, from its root, with python -m http.server");
      const bytes = await response.arrayBuffer();
      progress(++done / begun);
      return bytes;
    });
    const engine = new Engine();
    engine.settings = settings(files);
    engine.runs = new Map();
    engine.nextRun = 0;
    const count = Math.min(4, Math.max(1, navigator.hardwareConcurrency));
    engine.workers = Array.from({ length: count }, () => {
      const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
      return connect(worker, { arrive: (run, ...rest) => engine.runs.get(run)?.(...rest) });
    });
    await engine.all("load", files);
    return engine;
  }

  all(...call) {
    return Promise.all(this.workers.map((worker) => worker(...call)));
  }

  of(sample) {
    return this.workers[sample % this.workers.length];
  }

  /** Encodes the prompt; returns for each token of the context the number of its word, or −1. */
  async encode(prompt) {
    [this.words] = await this.all("encode", prompt);
    return this.words;
  }

  /** The map (m) of what a token attends to, for each token of the context, or undefined: n · m numbers. */
  map(row, sample, step, block) {
    return this.of(sample)("map", row, sample, step, block);
  }

  /**
   * Paints a row of pictures. repulsion: settings as in repulsion/config.py, or null. signal: aborts it.
   * seeGuess(sample, step, {pixels, width, height}): x̂₀ of a step, decoded, in the last step the picture;
   * seeContext(step, block, {before, after}): the samples' kernel before and after the push there.
   * What precedes the first push is the row "typical", if `typical`, what that row's paint returned, is given.
   */
  async paint({ row, seed, images, steps, repulsion, typical, signal, seeGuess, seeContext }) {
    const { channels, rows, columns, blocks, shift } = this.settings, levels = noiseLevels(steps, shift);
    const run = this.nextRun++, stopped = new Promise((_, stop) => {
      signal.addEventListener("abort", () => stop(new Error("stopped")));
    });
    stopped.catch(() => {});  // it may come after the end
    const acts = (step, block) => Boolean(repulsion) && pushes(repulsion, block, blocks, step);
    const meeting = new Meeting(images, (key, tokens) => {
      const [step, block] = key.split(" ").map(Number), found = push(tokens, acts(step, block) ? repulsion : null);
      if (!signal.aborted) seeContext(step, block, found);
      return found.tokens;
    });
    this.runs.set(run, (sample, step, block, tokens) => (
      Promise.race([meeting.arrive(sample, `${step} ${block}`, tokens), stopped])));
    const first = typical ? repulsion.start : 0;
    const firstBlock = typical ? Math.max(0, range(blocks).findIndex((block) => acts(first, block))) : 0;
    try {
      const decoded = [], latents = range(images).map(() => []);
      const sampleOne = async (sample) => {
        const start = first ? typical.latents[sample][first - 1]
          : startingNoise(seed, sample, channels * rows * columns);
        const velocity = (latent, sigma, step) => {
          if (signal.aborted) throw new Error("stopped");
          return this.of(sample)("velocity", { row, run, sample, step, latent, sigma, height: rows, width: columns,
            pushed: range(blocks).map((block) => acts(step, block)), from: step === first ? firstBlock : 0 });
        };
        await denoise((x, sigma, step) => velocity(x, sigma, step + first), start, levels.subarray(first),
          ({ step, x, guess }) => {
            latents[sample][step + first] = x;
            decoded.push(this.of(sample)("decode", guess, rows, columns).then((picture) => {
              if (!signal.aborted) seeGuess(sample, step + first, picture);
            }));
          });
      };
      await Promise.race([Promise.all(range(images).map(sampleOne)), stopped]);
      await Promise.all(decoded);
      return { latents };
    } finally {
      this.runs.delete(run);
    }
  }
}

const range = (size) => Array.from({ length: size }, (_, i) => i);
