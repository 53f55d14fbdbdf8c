// A checkpoint's folder: its files, its networks and its settings. `get(path)` → promise of a file's bytes.

import { Decoder } from "./autoencoder.js";
import { Transformer } from "./mmdit.js";
import { check } from "./repulsion.js";
import { read } from "./safetensors.js";
import { Clip, T5 } from "./text.js";
import { clipTokenizer, t5Tokenizer } from "./tokenizers.js";

const CLIP = { architectures: [["CLIPTextModelWithProjection"]], hidden_act: ["gelu", "quick_gelu"] };
const PARTS = {  // folder, file, network, and the values in the folder's config.json that this port supports
  transformer: ["transformer", "diffusion_pytorch_model", Transformer,
    { _class_name: ["SD3Transformer2DModel"], qk_norm: ["rms_norm"], dual_attention_layers: [undefined, []] }],
  autoencoder: ["vae", "diffusion_pytorch_model", Decoder, { use_post_quant_conv: [false] }],
  clip_l: ["text_encoder", "model", Clip, CLIP],
  clip_g: ["text_encoder_2", "model", Clip, CLIP],
  t5: ["text_encoder_3", "model", T5, { feed_forward_proj: ["gated-gelu"] }],
};
const TOKENIZERS = { clip_l: "tokenizer", clip_g: "tokenizer_2", t5: "tokenizer_3" };
const FILES = [
  ...Object.values(PARTS).flatMap(([folder, file]) => [`${folder}/config.json`, `${folder}/${file}.safetensors`]),
  ...["tokenizer", "tokenizer_2"].flatMap((folder) => ["vocab.json", "merges.txt", "tokenizer_config.json"].map(
    (file) => `${folder}/${file}`)),
  "tokenizer_3/spiece.model", "tokenizer_3/tokenizer_config.json", "scheduler/scheduler_config.json", "sampling.json",
];

/** All files of the folder: {path: ArrayBuffer}. */
export async function readFiles(get) {
  return Object.fromEntries(await Promise.all(FILES.map(async (path) => [path, await get(path)])));
}

const json = (files, path) => JSON.parse(new TextDecoder().decode(files[path]));

/** The networks of these names. Throws for what this port does not support, such as rotary positions. */
export function networks(files, names) {
  return Object.fromEntries(names.map((name) => {
    const [folder, file, kind, supported] = PARTS[name], config = json(files, `${folder}/config.json`);
    for (const [key, values] of Object.entries(supported)) {
      if (!values.some((value) => JSON.stringify(value) === JSON.stringify(config[key]))) {
        throw new Error(`${folder}/config.json has ${key} ${JSON.stringify(config[key])}, but this port supports only `
          + `${values.map((value) => JSON.stringify(value)).join(" or ")}: use the project itself`);
      }
    }
    const path = `${folder}/${file}.safetensors`;
    return [name, new kind(read(files[path], path), config)];
  }));
}

/** {clip_l, clip_g, t5}: prompt → {ids, words}. */
export function tokenizers(files) {
  return Object.fromEntries(Object.entries(TOKENIZERS).map(([name, folder]) => {
    const config = json(files, `${folder}/tokenizer_config.json`);
    if (name === "t5") return [name, t5Tokenizer(new Uint8Array(files[`${folder}/spiece.model`]), config)];
    const merges = new TextDecoder().decode(files[`${folder}/merges.txt`]);
    return [name, clipTokenizer(json(files, `${folder}/vocab.json`), merges, config)];
  }));
}

/** Defaults and sizes: steps, shift, repulsion, blocks, a latent's channels, rows, columns, patch, a picture's sides */
export function settings(files) {
  const { steps, guidance, height, width, repulsion } = json(files, "sampling.json");
  if (guidance > 1) throw new Error(`sampling.json has guidance ${guidance}, which this port lacks: use tiny-turbo`);
  const transformer = json(files, "transformer/config.json"), vae = json(files, "vae/config.json");
  const scale = 2 ** (vae.block_out_channels.length - 1), { shift } = json(files, "scheduler/scheduler_config.json");
  return { steps, shift, repulsion: check(repulsion ?? { strength: 1 }), picture: { height, width },
    blocks: transformer.num_layers, channels: transformer.in_channels, patch: transformer.patch_size,
    rows: height / scale, columns: width / scale };
}
