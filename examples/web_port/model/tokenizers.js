// Prompts to token ids. CLIP: words as bytes, merged pair by pair (BPE). T5: SentencePiece's most likely split.
// A tokenizer returns {ids, words}: ids, padded to its length; for each the number of its word between spaces, or −1.

const utf8 = new TextEncoder(), text = new TextDecoder();
const WORD = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;

/** pieces, {id, word} each; longer text is truncated. */
function padded(pieces, { start = [], end, pad, length }) {
  const kept = pieces.slice(0, length - start.length - 1), fill = (list, rest) => (
    Int32Array.from({ length }, (_, i) => list[i] ?? rest));
  return { ids: fill([...start, ...kept.map(({ id }) => id), end], pad),
    words: fill([...start.map(() => -1), ...kept.map(({ word }) => word)], -1) };
}

/** The tokenizer of vocab.json, merges.txt and tokenizer_config.json, given as they were read. */
export function clipTokenizer(vocabulary, merges, config) {
  const pairs = merges.split("\n").filter((line) => !line.startsWith("#version"));
  const ranks = new Map(pairs.map((line, i) => [line.trim(), i]));
  const special = [config.bos_token, config.eos_token, config.pad_token];  // recognized in a prompt's text too
  const [start, end, pad] = special.map((name) => vocabulary[name]);
  const between = new RegExp(`(${special.map((name) => name.replace(/[|!]/g, "\\$&")).join("|")})`);
  // A printable character for each byte: its own where it is printable, else one from 256 on.
  const printable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  const letters = [];
  for (let byte = 0, more = 256; byte < 256; byte++) letters.push(String.fromCharCode(printable(byte) ? byte : more++));

  const split = (word) => {
    let parts = Array.from(utf8.encode(word), (byte) => letters[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      const found = parts.slice(1).map((part, i) => ranks.get(`${parts[i]} ${part}`) ?? Infinity);
      const first = Math.min(...found), merged = [];
      if (first === Infinity) return parts;
      for (let i = 0; i < parts.length; i++) merged.push(found[i] === first ? parts[i] + parts[++i] : parts[i]);
      parts = merged;
    }
  };
  return (prompt) => {
    const pieces = [];
    let before = "";
    for (const segment of prompt.normalize("NFC").replace(/\s+/g, " ").trim().split(between)) {
      const lower = segment.toLowerCase(), number = (index) => (before + lower.slice(0, index)).split(" ").length - 1;
      if (special.includes(segment)) pieces.push({ id: vocabulary[segment], word: number(0) });
      else {
        for (const { 0: word, index } of lower.matchAll(WORD)) {
          for (const part of split(word)) pieces.push({ id: vocabulary[part] ?? end, word: number(index) });
        }
      }
      before += lower;
    }
    return padded(pieces, { start: [start], end, pad, length: config.model_max_length });
  };
}

/** The tokenizer of a spiece.model, as bytes. */
export function t5Tokenizer(bytes, config) {
  const model = message(bytes), pieces = model[1].map(message), normalizer = message(model[3][0]);
  const string = (piece) => text.decode(piece[1][0]), ids = new Map(pieces.map((piece, id) => [string(piece), id]));
  const [NORMAL, UNKNOWN] = [1, 2], kind = (piece) => piece[3]?.[0] ?? NORMAL;
  const usual = new Map(pieces.flatMap((piece, id) => (
    kind(piece) === NORMAL ? [[string(piece), { id, score: piece[2][0] }]] : [])));
  const longest = Math.max(...[...usual.keys()].map((piece) => piece.length));
  const unknown = { id: pieces.findIndex((piece) => kind(piece) === UNKNOWN),
    score: Math.min(...[...usual.values()].map(({ score }) => score)) - 10 };
  const normalize = charactersMap(normalizer[2][0]);

  return (prompt) => {
    const clean = normalize(prompt).replace(/ +/g, " ").trim();
    const characters = [...(clean && `▁${clean.replaceAll(" ", "▁")}`)];
    const best = [{ score: 0 }];  // the most likely split of the text up to each character
    for (let end = 1; end <= characters.length; end++) {
      best.push({ score: -Infinity });
      for (let start = end - 1; start >= Math.max(0, end - longest); start--) {
        const piece = usual.get(characters.slice(start, end).join("")) ?? (start === end - 1 ? unknown : null);
        const score = piece && best[start].score + piece.score;
        if (piece && score > best[end].score) best[end] = { score, start, id: piece.id };
      }
    }
    const found = [];
    for (let end = characters.length; end > 0; end = best[end].start) {
      const word = characters.slice(0, best[end].start + 1).filter((x) => x === "▁").length - 1;
      const merged = best[end].id === unknown.id && found[0]?.id === unknown.id;  // a run of unknowns is one piece
      if (!merged) found.unshift({ id: best[end].id, word });
    }
    const [end, pad] = [config.eos_token, config.pad_token].map((name) => ids.get(name));
    return padded(found, { end, pad, length: config.model_max_length });
  };
}

/** A message of protocol buffers: for each field number the list of its values, numbers or bytes. */
function message(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), found = {};
  let place = 0;
  const integer = () => {  // 7 bits a byte, the least first
    for (let value = 0, unit = 1; ; unit *= 128) {
      const byte = bytes[place++];
      value += (byte & 127) * unit;
      if (byte < 128) return value;
    }
  };
  const readers = {
    0: integer, 1: () => view.getFloat64((place += 8) - 8, true), 5: () => view.getFloat32((place += 4) - 4, true),
    2: () => {
      const length = integer();
      return bytes.subarray(place, place += length);
    },
  };
  while (place < bytes.length) {
    const key = integer();
    (found[key >> 3] ??= []).push(readers[key & 7]());
  }
  return found;
}

/**
 * SentencePiece's normalization: at each place the longest sequence of bytes in the map is replaced, else a character
 * is kept. The map: the length of a double-array trie, the trie, the replacements, each ended by a zero.
 */
function charactersMap(bytes) {
  const blob = bytes.slice(), size = new DataView(blob.buffer).getUint32(0, true);
  const units = new Uint32Array(blob.buffer.slice(4, 4 + size)), replacements = blob.subarray(4 + size);
  const children = (unit) => (unit >>> 10) << ((unit & 512) >>> 6), label = (unit) => unit & 0x800000ff;
  const longestMatch = (input, start) => {
    let node = children(units[0]), match = null;
    for (let i = start; i < input.length; i++) {
      node ^= input[i];
      const unit = units[node];
      if (label(unit) !== input[i]) break;
      node ^= children(unit);
      if (unit & 256) match = { end: i + 1, from: units[node] & 0x7fffffff };  // a sequence ends here
    }
    return match;
  };
  return (prompt) => {
    const input = utf8.encode(prompt), output = [];
    for (let i = 0; i < input.length;) {
      const match = longestMatch(input, i);
      if (match) {
        output.push(...replacements.subarray(match.from, replacements.indexOf(0, match.from)));
        i = match.end;
      } else do output.push(input[i++]); while ((input[i] & 0xc0) === 0x80);  // the rest of a character
    }
    return text.decode(new Uint8Array(output));
  };
}
