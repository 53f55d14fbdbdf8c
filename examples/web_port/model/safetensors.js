// The format of the weights: the header's length in 8 bytes, the header in JSON, then one tensor after the other.

const STORED = { F64: Float64Array, F32: Float32Array, I64: BigInt64Array, I32: Int32Array, U8: Uint8Array };

/** The tensors of a file by name, {data, shape}; bfloat16 becomes float32. Throws for a file that is not whole. */
export function read(buffer, file) {
  const wrong = (why) => new Error(`${file} is not a whole safetensors file (${why}): download it again`);
  const tensors = {};
  let header, start;
  try {
    start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
  } catch (error) {
    throw wrong(error.message);
  }
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [first, last] }] of Object.entries(header)) {
    if (start + last > buffer.byteLength) throw wrong(`${name} is cut off`);
    const bytes = buffer.slice(start + first, start + last);
    if (dtype === "BF16") {  // the upper half of a float32
      const data = new Float32Array(bytes.byteLength / 2), bits = new Uint32Array(data.buffer);
      new Uint16Array(bytes).forEach((half, i) => { bits[i] = half << 16; });
      tensors[name] = { data, shape };
    } else if (STORED[dtype]) {
      tensors[name] = { data: new STORED[dtype](bytes), shape };
    } else {
      throw wrong(`${name} is ${dtype}, and this port reads BF16, ${Object.keys(STORED).join(", ")}`);
    }
  }
  return tensors;
}

/** A file of these tensors, as bytes. */
export function write(tensors) {
  const header = {};
  let place = 0;
  for (const [name, { data, shape }] of Object.entries(tensors)) {
    const dtype = Object.keys(STORED).find((key) => data instanceof STORED[key]);
    header[name] = { dtype, shape, data_offsets: [place, place += data.byteLength] };
  }
  const text = new TextEncoder().encode(JSON.stringify(header)), file = new Uint8Array(8 + text.length + place);
  new DataView(file.buffer).setBigUint64(0, BigInt(text.length), true);
  file.set(text, 8);
  for (const [name, { data }] of Object.entries(tensors)) {
    const [first] = header[name].data_offsets;
    file.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), 8 + text.length + first);
  }
  return file;
}
