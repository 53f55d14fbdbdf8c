// A run as the porting kit records it, from text to pictures, tensor by tensor, under node:
// node examples/web_port/record.js KIT OUT.safetensors [CHECKPOINT], then python -m porting check KIT OUT.safetensors

import { readFile, writeFile } from "node:fs/promises";

import { networks, readFiles, settings, tokenizers } from "./model/checkpoint.js";
import { startingNoise } from "./model/noise.js";
import { gradientMatrix, mix, push, spectrum } from "./model/repulsion.js";
import { write } from "./model/safetensors.js";
import { Meeting, denoise, noiseLevels, pushes, toPixels } from "./model/sampler.js";
import { encode } from "./model/text.js";

const [kit, out, folder = "weights/checkpoints/tiny-turbo"] = process.argv.slice(2);
const { run, tensors: wanted } = JSON.parse(await readFile(`${kit}/manifest.json`, "utf8"));
const files = await readFiles(async (path) => new Uint8Array(await readFile(`${folder}/${path}`)).buffer);
const parts = networks(files, ["transformer", "autoencoder", "clip_l", "clip_g", "t5"]);
const { channels, rows, columns, shift, blocks } = settings(files), repulsion = run.repulsion, images = run.images;

const names = new Set(wanted.map(({ name }) => name)), recorded = {};
/** Takes a tensor; those of a sample are put together in the samples' order. */
function note(name, data, shape, sample = 0) {
  if (names.has(name)) (recorded[name] ??= [])[sample] = { data, shape };
}
const whole = {};
const prompt = run.prompts.at(-1), ids = {};
for (const [name, tokenize] of Object.entries(tokenizers(files))) {
  ids[name] = tokenize(prompt).ids;
  note(`${name}.ids`, BigInt64Array.from(ids[name], BigInt), [ids[name].length]);
}
const text = encode(parts, ids, note), levels = noiseLevels(run.steps, shift);
whole.sigmas = { data: levels, shape: [levels.length] };

const meeting = new Meeting(images, (key, tokens) => {
  const [step, block] = key.split(" ").map(Number), place = `dual.${block}.repulsion`;
  const here = pushes(repulsion, block, blocks, step);
  const pushed = push(tokens, here ? repulsion : null), shape = [1, images, images];
  if (step !== repulsion.start || !pushed.mixing) return pushed.tokens;
  const { objective, kernel_reg: reg } = repulsion, d = tokens[0].length / text.n;
  const gradient = gradientMatrix(pushed.gram, objective, reg);
  const float64 = (matrix, ...size) => ({ data: Float64Array.from(matrix.flat()), shape: size });
  const minusOne = gradient.map((row, i) => row.map((x, j) => x - (i === j ? 1 : 0)));  // since mix adds the tokens
  const along = mix(tokens.map((x) => Float64Array.from(x)), minusOne);
  const inside = { gram: float64(pushed.gram, ...shape), kernel: float64(pushed.before, ...shape),
    spectrum: float64(spectrum(pushed.before, reg), 1, images), mixing: float64(pushed.mixing, ...shape),
    gradient: float64(along.map((x) => [...x]), images, text.n, d) };
  for (const [what, tensor] of Object.entries(inside)) {
    if (names.has(`${place}.${what}`)) whole[`${place}.${what}`] = tensor;
  }
  tokens.forEach((x, sample) => note(`${place}.in`, x, [text.n, d], sample));
  pushed.tokens.forEach((x, sample) => note(`${place}.out`, x, [text.n, d], sample));
  return pushed.tokens;
});
text.n = ids.clip_l.length + ids.t5.length;

for (let sample = 0; sample < images; sample++) {
  note("noise", startingNoise(run.seed, sample, channels * rows * columns), [channels, rows, columns], sample);
}
await Promise.all(Array.from({ length: images }, async (_, sample) => {
  const transformer = Object.create(parts.transformer), noise = recorded.noise[sample].data;
  const latent = await denoise((x, sigma, step) => {
    transformer.note = step === repulsion.start ? (name, data, shape) => note(name, data, shape, sample) : () => {};
    return transformer.velocity({ latent: x, height: rows, width: columns, sigma, ...text,
      push: (block, tokens) => meeting.arrive(sample, `${step} ${block}`, tokens) });
  }, noise, levels, ({ step, x }) => note(`latent.${step + 1}`, x, [channels, rows, columns], sample));
  const decoder = Object.create(parts.autoencoder);
  decoder.note = (name, data, shape) => note(name, data, shape, sample);
  const { image, height, width } = decoder.decode(latent, rows, columns);
  const rgb = toPixels(image).filter((__, i) => i % 4 < 3);
  note("pixels", new Uint8Array(rgb), [height, width, 3], sample);
}));

for (const [name, samples] of Object.entries(recorded)) {
  const { data, shape } = samples[0], all = new data.constructor(samples.length * data.length);
  samples.forEach((sample, i) => all.set(sample.data, i * data.length));
  whole[name] = { data: all, shape: [samples.length, ...shape] };
}
await writeFile(out, write(whole));
