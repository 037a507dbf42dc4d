// ZIP archives without compression: PNG files are compressed already. Layout: PKWARE's APPNOTE.TXT, 4.3.7 to 4.3.16.

const NEW_YEAR_1980 = 0x21; // the earliest date that the format can hold; the same faces give the same archive
const UTF8 = 1 << 11; // names are UTF-8

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** Numbers as bytes, little-endian: [[value, bytes], ...]. */
function packed(...fields) {
  return Uint8Array.from(fields.flatMap(([value, size]) => Array.from({ length: size }, (_, index) => (value >>> (8 * index)) & 255)));
}

/** An archive of files: [{ name, data: Uint8Array }] -> Blob. */
export function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, data } of files) {
    const path = new TextEncoder().encode(name);
    const sizes = [[crc32(data), 4], [data.length, 4], [data.length, 4], [path.length, 2], [0, 2]];
    const about = [[20, 2], [UTF8, 2], [0, 2], [0, 2], [NEW_YEAR_1980, 2], ...sizes]; // version, flags, method, time, date
    const header = packed([0x04034b50, 4], ...about);
    parts.push(header, path, data);
    directory.push(packed([0x02014b50, 4], [20, 2], ...about, [0, 2], [0, 2], [0, 2], [0, 4], [offset, 4]), path);
    offset += header.length + path.length + data.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = packed([0x06054b50, 4], [0, 2], [0, 2], [files.length, 2], [files.length, 2], [size, 4], [offset, 4], [0, 2]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
