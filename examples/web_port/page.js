// The page: what is asked for, what is painted, what is shown. The model is in model/.

import { curveFigure, gramFigure, number, spectrumFigure } from "./figures.js";
import { Engine } from "./model/engine.js";
import { spectrum, vendiScore } from "./model/repulsion.js";
import { noiseLevels, pushes } from "./model/sampler.js";

const CHECKPOINT = new URL("../../weights/checkpoints/tiny-turbo/", import.meta.url);
const WORDS = [  // those of tiny/captions.py: with SYNONYMS every word of the captions that the model was trained on
  ["circle", "square", "triangle", "star", "cross", "ring", "shape"],
  ["red", "orange", "yellow", "green", "blue", "purple", "white"],
  ["small", "medium", "large"],
  ["plain", "striped", "dotted", "checked"], ["navy", "pink", "teal", "gray", "brown", "sand", "ground"],
  ["left", "right", "top", "bottom", "center", "above", "below", "row", "column"],
  ["a", "an", "the", "of", "on", "at", "in", "and", ","],
];
const SYNONYMS = ["grey", "background", "middle", "violet", "big", "centre", "under"];
const ROWS = ["typical", "repelled", "control"];
const $ = (id) => document.getElementById(id);
const range = (size) => Array.from({ length: size }, (_, i) => i);

/** Of each row: canvases; kernels and scores by point of the run; what paint returned; the key it was painted for. */
const rows = Object.fromEntries(ROWS.map((row) => [row, { canvases: [], kernels: [], scores: [] }]));
let engine, working, running, encoded, opened, begun, pinned = false;

// What is asked for

function wanted() {
  const [start, steps] = $("steps").value.split(" ").map(Number), blocks = $("blocks").value;
  const push = { ...engine.settings.repulsion, strength: Number($("strength").value), start, steps,
    blocks: /\d/.test(blocks) ? blocks.split(",").map(Number) : blocks };
  const common = { prompt: $("prompt").value.trim(), seed: Number($("seed").value), images: Number($("images").value) };
  return { typical: { ...common, repulsion: null }, repelled: { ...common, repulsion: { ...push, objective: "vendi" } },
    control: { ...common, repulsion: { ...push, objective: "spread" } } };
}

/** What depends on the checkpoint. */
function fillControls({ blocks, steps, repulsion }) {
  const names = { all: "all", first: "first third", middle: "middle third", last: "last third" };
  $("blocks").append(...Object.entries(names).map(([value, name]) => new Option(name, value)),
    ...range(blocks - 1).map((i) => new Option(`only ${i + 1}`, i)));
  $("steps").append(...range(steps).map((i) => new Option(i ? `1 to ${i + 1}` : "1", `0 ${i + 1}`)),
    ...range(steps - 1).map((i) => new Option(`only ${i + 2}`, `${i + 1} 1`)));
  $("strength").value = repulsion.strength ?? 1;
  select("blocks", String(repulsion.blocks ?? "all"));
  select("steps", `${repulsion.start ?? 0} ${repulsion.steps ?? 1}`);
  $("attention-step").append(...range(steps).map((i) => new Option(i + 1, i)));
  $("attention-step").value = steps - 1;
  $("attention-block").append(new Option("mean of all", ""), ...range(blocks).map((i) => new Option(i + 1, i)));
  $("point").max = steps * (blocks - 1) - 1;
  showStrength();
}

/** Selects the checkpoint's own value, which need not be among the choices. */
function select(id, value) {
  if (![...$(id).options].some((one) => one.value === value)) $(id).append(new Option(value, value));
  $(id).value = value;
}

function showStrength() {
  $("strength-value").textContent = Number($("strength").value).toFixed(1);
  $("strength").setAttribute("aria-valuetext", $("strength-value").textContent);
}

function checkWords() {
  const known = [...WORDS.flat(), ...SYNONYMS];
  const said = $("prompt").value.toLowerCase().match(/[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu) ?? [];
  const unknown = [...new Set(said.filter((word) => !known.includes(word)))];
  $("hint").textContent = unknown.length
    ? `The model was not trained on ${unknown.map((word) => `“${word}”`).join(", ")}: its pictures may not fit.` : "";
}

// Painting

const key = (row) => JSON.stringify(wanted()[row]);
const shown = (row) => row !== "control" || $("with-control").checked;

/** Something else is asked for: stops the row that is being painted if it is no longer wanted, and paints what is. */
function change() {
  $("control").hidden = !shown("control");
  if (!engine || !$("form").checkValidity()) return;
  begun = performance.now();
  if (running && running.key !== key(running.row)) running.stop.abort();
  working ??= work().finally(() => { [working, running] = []; });
}

async function work() {
  delete document.body.dataset.done;
  try {
    const stale = () => ROWS.find((row) => shown(row) && rows[row].key !== key(row));
    for (let row; (row = stale());) await paintRow(row, key(row));
    const seconds = ((performance.now() - begun) / 1000).toFixed(1);
    $("status").textContent = `${$("images").value} pictures a row, ${seconds} s`;
    document.body.dataset.done = "";
  } catch (error) {
    $("status").textContent = error.message;
    throw error;
  }
}

async function paintRow(row, asked) {
  const { prompt, seed, images, repulsion } = JSON.parse(asked), { steps, blocks } = engine.settings, here = rows[row];
  const stop = new AbortController(), perStep = blocks - 1;  // the last block's context is not used
  running = { row, key: asked, stop };
  if (encoded?.prompt !== prompt) {
    encoded = { prompt, words: await engine.encode(prompt) };
    const read = Math.max(...encoded.words) + 1;
    if (read < prompt.split(/\s+/).length) $("hint").textContent = `The model reads the first ${read} words alone.`;
  }
  const typical = row === "typical" ? null : rows.typical;
  // up to the first push the row is the typical one
  const points = typical ? range(steps * perStep) : [];
  const first = points.findIndex((point) => pushes(repulsion, point % perStep, blocks, Math.floor(point / perStep)));
  const [kernels, scores] = ["kernels", "scores"].map((what) => typical?.[what].slice(0, first) ?? []);
  Object.assign(here, { key: null, kernels, scores });
  prepareCanvases(row, images);
  try {
    here.painted = await engine.paint({
      row, seed, images, steps, repulsion, typical: typical?.painted, signal: stop.signal,
      seeGuess(sample, step, { pixels, width, height }) {
        $("status").textContent = `${row}, step ${step + 1} of ${steps}`;
        const canvas = Object.assign(here.canvases[sample], { width, height });
        canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
      },
      seeContext(step, block, { after }) {
        const point = step * perStep + block;
        [here.kernels[point], here.scores[point]] = [after, vendiScore(after)];
        if (!pinned) $("point").value = point;
        requestFigures();
      },
    });
    here.key = asked;
  } catch (error) {
    if (!stop.signal.aborted) throw error;
  }
}

function prepareCanvases(row, images) {
  const here = rows[row];
  if (here.canvases.length === images) return;
  here.canvases = range(images).map(() => document.createElement("canvas"));
  for (const canvas of here.canvases) Object.assign(canvas, engine.settings.picture);
  $(row).querySelector(".pictures").replaceChildren(...here.canvases.map((canvas, sample) => {
    const button = document.createElement("button");
    button.setAttribute("aria-label", `Picture ${sample + 1}, ${row}: what each word attends to`);
    button.append(canvas);
    button.addEventListener("click", () => open(row, sample));
    return button;
  }));
}

// Figures

let requested;

function requestFigures() {
  requested ??= requestAnimationFrame(() => {
    requested = null;
    showFigures();
  });
}

function showFigures() {
  if (!engine) return;
  const { steps, blocks, shift } = engine.settings, perStep = blocks - 1, point = Number($("point").value);
  const visible = ROWS.filter(shown), kernels = visible.map((row) => rows[row].kernels[point]);
  const low = Math.min(0, ...kernels.filter(Boolean).flat(2)), from = low < 0 ? number(low, 2) : "0";
  const [step, block] = [Math.floor(point / perStep) + 1, point % perStep + 1];
  visible.forEach((row, i) => {
    if (kernels[i]) $(row).querySelector(".figures").innerHTML = `
      <figure>${gramFigure(kernels[i], low)}<figcaption>cosines, ${from} to 1</figcaption></figure>
      <figure>${spectrumFigure(spectrum(kernels[i]))}<figcaption>eigenvalues</figcaption></figure>
      <p class="score"><b>${vendiScore(kernels[i]).toFixed(2)}</b>Vendi score in step ${step},
        block ${block}, at most ${kernels[i].length}</p>`;
  });
  const name = `Step ${step}, block ${block}`;
  $("point-name").textContent = name;
  $("point").setAttribute("aria-valuetext", name);
  const scores = Object.fromEntries(visible.map((row) => [row, rows[row].scores]));
  $("curve").innerHTML = curveFigure(scores, [...noiseLevels(steps, shift)].slice(0, -1), steps * perStep, point,
    Math.max(320, $("curve").clientWidth));
}

// What each word attends to

function open(row, sample) {
  opened = { row, sample };
  $("attention-title").textContent = `What each word attends to in picture ${sample + 1}, ${row}`;
  if (!$("attention").open) $("attention").showModal();
  return showMaps();
}

async function showMaps() {
  const here = opened = { ...opened }, { row, sample } = here, { words } = encoded;
  const { blocks, rows: height, columns, patch } = engine.settings;
  const which = $("attention-block").value, step = Number($("attention-step").value);
  const chosen = which ? [Number(which)] : range(blocks);
  const found = await Promise.all(chosen.map((block) => engine.map(row, sample, step, block)));
  const maps = found.filter(Boolean), across = columns / patch, down = height / patch, places = across * down;
  if (!maps.length || here !== opened) return;  // not painted yet, or others were asked for since
  const said = encoded.prompt.split(/\s+/);
  const captioned = (canvas, ...caption) => {
    const figure = document.createElement("figure"), line = document.createElement("figcaption");
    line.append(...caption);
    figure.append(canvas, line);
    return figure;
  };
  const picture = rows[row].canvases[sample];
  const whole = overlay(picture, new Float64Array(places).fill(1), across, down);
  $("maps").replaceChildren(captioned(whole, "the picture"), ...said.flatMap((word, number) => {
    const tokens = range(words.length).filter((token) => words[token] === number), mean = new Float64Array(places);
    if (!tokens.length) return [];  // beyond what the encoders read
    for (const map of maps) {
      for (const token of tokens) {
        mean.forEach((_, i) => { mean[i] += map[token * places + i] / (maps.length * tokens.length); });
      }
    }
    const share = document.createElement("span");
    share.textContent = `${Math.round(100 * mean.reduce((x, y) => x + y))} %`;
    return [captioned(overlay(picture, mean, across, down), word, share)];
  }));
}

/** The picture, dark where the map is low. */
function overlay(picture, map, across, down) {
  const mask = Object.assign(document.createElement("canvas"), { width: across, height: down });
  const shade = new ImageData(across, down), most = Math.max(...map);
  map.forEach((value, i) => { shade.data[4 * i + 3] = 225 * (1 - value / most); });
  mask.getContext("2d").putImageData(shade, 0, 0);
  const [width, height] = [2 * picture.width, 2 * picture.height];
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);
  context.drawImage(mask, 0, 0, width, height);
  return canvas;
}

// The page itself

$("words").append(...WORDS.map((group) => {
  const line = document.createElement("div");
  line.append(...group.map((word) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: word });
    button.addEventListener("click", () => {
      $("prompt").value = `${$("prompt").value.trimEnd()}${word === "," ? "" : " "}${word}`.trimStart();
      checkWords();
    });
    return button;
  }));
  return line;
}));
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  change();
});
$("prompt").addEventListener("input", checkWords);
for (const id of ["seed", "images", "with-control", "blocks", "steps"]) $(id).addEventListener("change", change);
$("strength").addEventListener("input", () => {
  showStrength();
  change();
});
$("point").addEventListener("input", () => {
  pinned = $("point").value !== $("point").max;
  requestFigures();
});
for (const id of ["attention-step", "attention-block"]) $(id).addEventListener("change", showMaps);
addEventListener("resize", requestFigures);

try {
  engine = await Engine.load(CHECKPOINT, (share) => { $("progress").value = share; });
  fillControls(engine.settings);
  $("progress").hidden = true;
  $("paint").disabled = false;
  change();
} catch (error) {
  $("status").textContent = error.message;
  throw error;
}
