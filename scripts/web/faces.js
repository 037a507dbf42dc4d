// Random people, noise, interpolation and PNG files: everything but the network. Uses no DOM.
//
// A seed gives the same person in every browser, but not the person of `vultus generate --random`, whose random numbers
// come from NumPy. The distribution is the same.

const PEOPLE = 1, NOISE = 2; // independent streams of one seed

// sfc32 by Chris Doty-Humphrey (PractRand), seeded with a hash of the key. Numbers in (0, 1).
function uniform(...key) {
  let h = 0x811c9dc5;
  const words = [0, 1, 2].map(word => {
    for (const part of [word, ...key]) h = Math.imul(h ^ part ^ (h >>> 15), 0x2c1b3c6d) ^ Math.imul(part + 1, 0x297a2d39);
    return h >>> 0;
  });
  let [a, b, c] = words, counter = 1;
  const next = () => {
    const t = (a + b + counter++) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + t) | 0;
    return ((t >>> 0) + 0.5) / 4294967296;
  };
  for (let i = 0; i < 16; i++) next();
  return next;
}

// Standard normal numbers (Box and Muller 1958).
function normals(count, ...key) {
  const next = uniform(...key), values = new Float64Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(next())), angle = 2 * Math.PI * next();
    values[i] = radius * Math.cos(angle);
    if (i + 1 < count) values[i + 1] = radius * Math.sin(angle);
  }
  return values;
}

function unit(x) {
  const length = Math.hypot(...x) || 1;
  return x.map(value => value / length);
}

/** Noise z of one face, Float64Array [z_dim]. */
export function noise(seed, index, variant, size) {
  return normals(size, NOISE, seed, index, variant);
}

/** The tensors of people.bin: {name: {shape, data: Float32Array}}. */
export function readPeople(buffer, entries) {
  return Object.fromEntries(entries.map(({ name, shape, offset }) => {
    const size = shape.reduce((a, b) => a * b, 1);
    return [name, { shape, data: new Float32Array(buffer, offset, size) }];
  }));
}

/** Person number `index` of `seed`: a unit vector, Float64Array [c_dim]. As sampling/population.py samples. */
export function samplePerson(people, seed, index) {
  const [rows, columns] = people.factor.shape;
  const normal = normals(columns, PEOPLE, seed, index, 0);
  if (people.weights) {
    const weights = people.weights.data, rank = people.means.shape[1];
    let left = uniform(PEOPLE, seed, index, 1)() * weights.reduce((a, b) => a + b, 0), k = 0;
    while (k < weights.length - 1 && (left -= weights[k]) > 0) k++;
    const old = normal.slice(0, rank), factors = people.factors.data;
    for (let i = 0; i < rank; i++) {
      let sum = people.means.data[k * rank + i];
      for (let j = 0; j < rank; j++) sum += factors[(k * rank + i) * rank + j] * old[j];
      normal[i] = sum;
    }
  }
  const c = Float64Array.from(people.mean.data);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) c[i] += people.factor.data[i * columns + j] * normal[j];
  }
  return unit(c);
}

/** The point at fraction t of the arc from a to b, unit vectors (Shoemake 1985). */
export function slerp(a, b, t) {
  const cosine = Math.min(1, Math.max(-1, a.reduce((sum, value, i) => sum + value * b[i], 0)));
  const angle = Math.acos(cosine), sine = Math.sin(angle);
  if (sine < 1e-6) return unit(a.map((value, i) => value * (1 - t) + b[i] * t));
  const [s, e] = [Math.sin((1 - t) * angle) / sine, Math.sin(t * angle) / sine];
  return unit(a.map((value, i) => s * value + e * b[i]));
}

/** x Float32Array [3, side, side] in [-1, 1] -> ImageData. */
export function toImage(x, side) {
  const size = side * side, pixels = new Uint8ClampedArray(4 * size);
  for (let i = 0; i < size; i++) {
    for (let channel = 0; channel < 3; channel++) pixels[4 * i + channel] = (x[channel * size + i] + 1) * 127.5;
    pixels[4 * i + 3] = 255;
  }
  return new ImageData(pixels, side, side);
}

// --- PNG --------------------------------------------------------------------------------------------------------------

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function chunk(kind, data) {
  const bytes = new Uint8Array(12 + data.length), view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(kind), 4);
  bytes.set(data, 8);
  let crc = 0xffffffff;
  for (const byte of bytes.subarray(4, 8 + data.length)) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  view.setUint32(8 + data.length, ~crc >>> 0);
  return bytes;
}

/** A PNG file (Uint8Array) with text {keyword: ASCII} and an XMP packet behind its header (PNG, third edition, 11.3.3). */
export function withText(png, text, xmp) {
  const encoder = new TextEncoder(), header = 8 + 25; // signature, IHDR
  const parts = Object.entries(text).map(([key, value]) => chunk("tEXt", encoder.encode(`${key}\0${value}`)));
  parts.push(chunk("iTXt", encoder.encode(`XML:com.adobe.xmp\0\0\0\0\0${xmp}`)));
  return new Blob([png.slice(0, header), ...parts, png.slice(header)], { type: "image/png" });
}
