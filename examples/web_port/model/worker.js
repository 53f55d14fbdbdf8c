// A web worker: the networks, for some of a batch's samples. It keeps what the page may ask for again.

import { connect } from "./calls.js";
import { networks, tokenizers } from "./checkpoint.js";
import { toPixels } from "./sampler.js";
import { encode } from "./text.js";

let parts, tokenize, text;
const maps = new Map();  // by "row sample step": a (n, m) for each block, where the text tokens attend to
const entries = new Map();  // by "sample step": the tokens that enter each block of the typical run

const call = connect(self, {
  load(files) {
    parts = networks(files, ["transformer", "autoencoder", "clip_l", "clip_g", "t5"]);
    tokenize = tokenizers(files);
  },

  /** Encodes the prompt for the runs to come; returns for each token of the context the number of its word, or −1. */
  encode(prompt) {
    const found = Object.entries(tokenize).map(([name, tokenizer]) => [name, tokenizer(prompt)]);
    text = encode(parts, Object.fromEntries(found.map(([name, { ids }]) => [name, ids])));
    entries.clear();
    const words = Object.fromEntries(found.map(([name, tokens]) => [name, [...tokens.words]]));
    return [...words.clip_l, ...words.t5];  // both CLIPs' tokens lie side by side
  },

  /** The velocity of a sample. `pushed` has a 1 for each block that pushes; `from`: the block to start at. */
  velocity({ row, run, sample, step, latent, height, width, sigma, pushed, from }) {
    const here = maps.set(`${row} ${sample} ${step}`, []).get(`${row} ${sample} ${step}`);
    const kept = row === "typical" ? entries.set(`${sample} ${step}`, []).get(`${sample} ${step}`) : undefined;
    if (from) here.push(...maps.get(`typical ${sample} ${step}`).slice(0, from));
    return parts.transformer.velocity({ latent, height, width, sigma, ...text, maps: here, entries: kept,
      from: from ? entries.get(`${sample} ${step}`)[from] : undefined,
      push(block, tokens) {
        const answer = call("arrive", run, sample, step, block, tokens);
        if (pushed[block]) return answer;
        answer.catch(() => {});  // it is told, and waits for nobody
        return tokens;
      } });
  },

  decode(latent, rows, columns) {
    const { image, height, width } = parts.autoencoder.decode(latent, rows, columns);
    return { pixels: toPixels(image), width, height };
  },

  map: (row, sample, step, block) => maps.get(`${row} ${sample} ${step}`)?.[block],
});
