// Embeddings from text (JSON, CSV, numbers separated by spaces) or from NumPy's .npy files.

import { Problem } from "./api.js";

// A row or rows, alone or under the names that requests and responses of the HTTP API use.
function jsonNumbers(value) {
  if (Array.isArray(value)) return value;
  if (value?.embeddings) return value.embeddings;
  if (value?.embedding) return [value.embedding];
  if (Array.isArray(value?.faces) && value.faces[0]?.embedding) return value.faces.map((face) => face.embedding);
  throw new Problem("This JSON contains no embedding; it must be a list of numbers or {\"embedding\": [...]}.");
}

function textNumbers(text) {
  if (/^\s*[[{]/.test(text)) {
    let parsed;
    try {
      parsed = JSON.parse(text);
    } catch {
      if (text.trimStart().startsWith("{")) throw new Problem("This JSON is truncated or damaged.");
      // It may be a printed NumPy array: brackets without commas.
    }
    if (parsed !== undefined) return jsonNumbers(parsed);
  }
  return text.split(/[\s,;[\]()]+/).filter(Boolean);
}

function number(value, index) {
  const parsed = typeof value === "string" && value.trim() ? Number(value) : value;
  if (typeof parsed !== "number" || !Number.isFinite(parsed)) {
    const shown = String(value === null ? "null" : value).slice(0, 20);
    throw new Problem(`Number ${index + 1} is “${shown}”; it must be a finite number.`);
  }
  return parsed;
}

/** Rows [N][dim] of a text; throws Problem. */
export function parseText(text, dim) {
  if (!text.trim()) throw new Problem(`No numbers found; an embedding has ${dim} numbers.`);
  const values = textNumbers(text);
  if (Array.isArray(values[0])) {
    return values.map((row, index) => checkRow(Array.isArray(row) ? row.map(number) : [], dim, index));
  }
  const numbers = values.map(number);
  if (numbers.length % dim || !numbers.length) checkRow(numbers, dim);
  return Array.from({ length: numbers.length / dim }, (_, row) => checkRow(numbers.slice(row * dim, row * dim + dim), dim, row));
}

function checkRow(row, dim, index = 0) {
  const prefix = index ? `Row ${index + 1} has ` : "";
  if (row.length !== dim) throw new Problem(`${prefix}${row.length} numbers; this model takes ${dim}.`);
  if (row.every((value) => value === 0)) throw new Problem(`${prefix || "The embedding has "}only zeros; it describes no face.`);
  return row;
}

const READERS = {
  f4: (view, at, little) => view.getFloat32(at, little),
  f8: (view, at, little) => view.getFloat64(at, little),
};

/** Rows [N][dim] of a .npy file of float32 or float64, shape (dim,) or (N, dim); throws Problem. */
export function parseNpy(buffer, dim) {
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  const magic = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59]; // \x93NUMPY
  if (bytes.length < 12 || magic.some((byte, index) => bytes[index] !== byte)) {
    throw new Problem("This is not a .npy file.");
  }
  const long = bytes[6] > 1;
  const begin = long ? 12 : 10;
  const start = begin + (long ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder().decode(bytes.subarray(begin, start));
  const kind = /'descr':\s*'([<>=|]?)(\w+)'/.exec(header);
  const shape = /'shape':\s*\(([\d\s,]*)\)/.exec(header)?.[1].split(",").filter((part) => part.trim()).map(Number);
  if (!kind || !shape) throw new Problem("The header of this .npy file cannot be read.");
  const read = READERS[kind[2]];
  if (!read) throw new Problem(`This .npy file contains ${kind[2]}; save it as float32 or float64.`);
  const [rows, columns] = shape.length === 1 ? [1, shape[0]] : shape;
  if (shape.length < 1 || shape.length > 2 || columns !== dim || !rows) {
    throw new Problem(`This .npy file has shape (${shape.join(", ")}); this model takes (${dim},) or (N, ${dim}).`);
  }
  const size = kind[2] === "f4" ? 4 : 8;
  if (bytes.length - start !== rows * columns * size) throw new Problem("This .npy file is truncated or damaged.");
  const fortran = /'fortran_order':\s*True/.test(header);
  return Array.from({ length: rows }, (_, row) => {
    const values = Array.from({ length: columns }, (_, column) => {
      const offset = fortran ? column * rows + row : row * columns + column;
      return number(read(view, start + offset * size, kind[1] !== ">"), column);
    });
    return checkRow(values, dim, row);
  });
}

/** Rows [N][dim] of a file, by its content, not by its name; throws Problem. */
export async function parseFile(file, dim, maxBytes) {
  if (file.size > maxBytes) {
    throw new Problem(`This file has ${(file.size / 1e6).toFixed(0)} MB; the limit is ${maxBytes / 1e6} MB.`);
  }
  const buffer = await file.arrayBuffer();
  if (new Uint8Array(buffer)[0] === 0x93) return parseNpy(buffer, dim);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(buffer);
  } catch {
    throw new Problem("This file is neither .npy nor text with numbers.");
  }
  return parseText(text, dim);
}
