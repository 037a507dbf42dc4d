// People as a link names them: a random person by seed and number, anybody else by the embedding.

import { Problem } from "./api.js";

/** A random seed from 0 to 999 other than `current`: with the same seed, "New" would do nothing. */
export const newSeed = (current = 0) => ((current % 1000) + 1 + Math.floor(Math.random() * 999)) % 1000;

/** A random person; `number` counts from 0, as in `vultus generate` and the HTTP API. */
export function randomOf({ embedding, image }, seed, number) {
  return { c: embedding, face: image, seed, number, text: `A person who does not exist (number ${number + 1} of seed ${seed}).` };
}

export async function randomPerson(api, seed, number, signal) {
  const { faces } = await api.random({ seed, count: 1, strength: 1 }, signal, number);
  return randomOf(faces[0], seed, number);
}

/** SEED.NUMBER of a random person; of others the embedding, float32, in base64url. */
export function tokenOf({ c, seed, number }) {
  if (seed !== undefined) return `${seed}.${number}`;
  const characters = Array.from(new Uint8Array(Float32Array.from(c).buffer), (byte) => String.fromCharCode(byte));
  return btoa(characters.join("")).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The person of a token; throws Problem unless it is one of `dim` numbers. */
export async function personOf(token, { api, model }, signal) {
  const random = /^(\d{1,15})\.(\d{1,15})$/.exec(token);
  if (random) return randomPerson(api, Number(random[1]), Number(random[2]), signal);
  let c = [];
  try {
    c = [...new Float32Array(bytesOf(token.replaceAll("-", "+").replaceAll("_", "/")).buffer)];
  } catch {
    // Not base64, or not a multiple of four bytes.
  }
  if (c.length !== model.c_dim || !c.every(Number.isFinite)) throw new Problem("This link is damaged, or for another model.");
  return { c, text: "A person whose embedding is in the link." };
}

/** The bytes of base64 text. */
export function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
