// The one expensive operation: c[i, j] = Σ_k a[i, k] · b[rows[k] + j], a matrix product whose right-hand rows may start
// anywhere. With rows[k] = k · n it is the ordinary product; a convolution is the same product over shifted rows.
// It is computed four numbers at a time in WebAssembly, which is assembled below, instruction by instruction.

/** a (m, k), b any, rows (k): the places in b at which its rows begin → c (m, n), all float32. */
export function product(a, b, m, k, n, rows) {
  const height = 4 * Math.ceil(m / 4), width = 8 * Math.ceil(n / 8);  // the kernel computes tiles of 4 × 8
  const places = [k, height * k, b.length + width, height * width];  // rows, a, b, c, in 4 bytes each
  const [rowsAt, aAt, bAt, cAt, end] = [0, 1, 2, 3, 4].map((i) => places.slice(0, i).reduce((x, y) => x + y + 4, 0));
  const missing = 4 * end - memory.buffer.byteLength;
  if (missing > 0) memory.grow(Math.ceil(missing / 65536));
  const floats = new Float32Array(memory.buffer), offsets = new Int32Array(memory.buffer, 4 * rowsAt, k);
  for (let x = 0; x < k; x++) offsets[x] = 4 * rows[x];
  floats.set(a, aAt);
  floats.set(b, bAt);
  kernel(4 * rowsAt, 4 * aAt, 4 * bAt, 4 * cAt, 4 * k, height, 4 * width);
  if (width === n) return floats.slice(cAt, cAt + m * n);
  const c = new Float32Array(m * n);
  for (let i = 0; i < m; i++) c.set(floats.subarray(cAt + i * width, cAt + i * width + n), i * n);
  return c;
}

const orderedRows = new Map();

/** 0, n, 2n, …: where the rows of a matrix (k, n) begin. */
export function ordered(k, n) {
  const key = `${k} ${n}`;
  if (!orderedRows.has(key)) orderedRows.set(key, Int32Array.from({ length: k }, (_, x) => x * n));
  return orderedRows.get(key);
}

// WebAssembly in its binary form. An instruction is a list of bytes, a piece of code a list of those; each name is that
// of the instruction in the text format. https://webassembly.github.io/spec/core/binary/instructions.html
const leb = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...leb(n >>> 7)]);
const signed = (n) => (n < 64 ? [n] : [(n & 127) | 128, ...signed(n >> 7)]);  // of numbers from 0 on
const get = (x) => [0x20, x], set = (x) => [0x21, x], add = [0x6a], lessThan = [0x49];
const constant = (n) => [0x41, ...signed(n)];
const load = (offset) => [0x28, 2, ...leb(offset)];
const vector = {
  load: (offset) => [0xfd, 0x00, 0, ...leb(offset)], store: (offset) => [0xfd, 0x0b, 0, ...leb(offset)],
  loadSplat: [0xfd, 0x09, 0, 0], zero: [0xfd, 0x0c, ...Array(16).fill(0)],
  add: [0xfd, 0xe4, 0x01], multiply: [0xfd, 0xe6, 0x01],
};
const increase = (x, ...by) => [...get(x), ...by.flat(), ...add, ...set(x)];
/** Repeats the body while x < end. */
const repeat = (x, end, ...body) => [0x03, 0x40, ...body.flat(), ...get(x), ...get(end), ...lessThan, 0x0d, 0, 0x0b];

/** The kernel (rows, a, b, c, bytes of a row of a, rows of a, bytes of a row of c); all but the rows of a in bytes. */
function assemble() {
  const [rows, a, b, c, aRow, height, cRow] = [0, 1, 2, 3, 4, 5, 6];  // parameters
  const [i, j, k, end, left, right, here, out] = [7, 8, 9, 10, 11, 12, 13, 14];  // of type i32
  const [b0, b1, factor] = [15, 16, 17], sum = [18, 19, 20, 21, 22, 23, 24, 25];  // of type v128
  const tile = [0, 1, 2, 3];
  const multiplyAdd = (into, by) => [
    ...get(into), ...get(factor), ...get(by), ...vector.multiply, ...vector.add, ...set(into)];
  const body = [
    get(rows), get(aRow), add, set(end),  // one offset of 4 bytes for each number in a row of a
    constant(0), set(j),
    repeat(j, cRow,
      constant(0), set(i), get(a), set(left), get(c), get(j), add, set(out),
      repeat(i, height,
        sum.flatMap((x) => [...vector.zero, ...set(x)]),
        get(rows), set(k),
        repeat(k, end,
          get(b), get(j), add, get(k), load(0), add, set(right),
          get(right), vector.load(0), set(b0), get(right), vector.load(16), set(b1),
          get(left), set(here),
          tile.flatMap((row) => [
            ...get(here), ...vector.loadSplat, ...set(factor),
            ...multiplyAdd(sum[2 * row], b0), ...multiplyAdd(sum[2 * row + 1], b1),
            ...increase(here, get(aRow))]),
          increase(left, constant(4)), increase(k, constant(4))),
        tile.flatMap((row) => [
          ...get(out), ...get(sum[2 * row]), ...vector.store(0),
          ...get(out), ...get(sum[2 * row + 1]), ...vector.store(16), ...increase(out, get(cRow))]),
        // a row of a has passed: the three others of the tile come next
        tile.slice(1).flatMap(() => increase(left, get(aRow))),
        increase(i, constant(4))),
      increase(j, constant(32))),
  ].flat();
  const [i32, v128] = [0x7f, 0x7b], sized = (bytes) => [...leb(bytes.length), ...bytes];
  const text = (word) => sized([...new TextEncoder().encode(word)]);
  const section = (id, ...items) => [id, ...sized([items.length, ...items.flat()])];
  return new Uint8Array([
    0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
    ...section(1, [0x60, 7, ...Array(7).fill(i32), 0]),  // one type: seven integers → nothing
    ...section(3, [0]),  // one function of that type
    ...section(5, [0, 1]),  // one memory, of one page at first
    ...section(7, [...text("memory"), 2, 0], [...text("kernel"), 0, 0]),
    ...section(10, sized([2, 8, i32, 11, v128, ...body, 0x0b])),
  ]);
}

const { memory, kernel } = new WebAssembly.Instance(new WebAssembly.Module(assemble())).exports;
