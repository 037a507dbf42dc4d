import * as ort from "./ort/ort.wasm.min.mjs";
import { noise, readPeople, samplePerson, slerp, toImage, withText } from "./faces.js";

const PEOPLE = 12, STEPS = 9; // faces of random people; images from the first chosen person to the second
const $ = id => document.getElementById(id);

// Threads need a cross-origin isolated page (COOP and COEP headers). With a plain static server there is one thread.
ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;

let about, people, session;
let shown = []; // [{c, seed, index}] of the people on the page
let chosen = [0, 1]; // indices in `shown`: the blend goes from the first to the second
let variant = 0; // index of the noise of the blend
let turn = 0; // number of the latest drawing: earlier ones stop

/** Generate one face: c [c_dim], z [z_dim] -> ImageData. Records its time. */
export async function generate(c, z) {
  const started = performance.now();
  const feeds = {
    z: new ort.Tensor("float32", Float32Array.from(z), [1, about.z_dim]),
    c: new ort.Tensor("float32", Float32Array.from(c), [1, about.c_dim]),
  };
  const { x } = await session.run(feeds);
  const image = toImage(x.data, about.resolution);
  times.push(performance.now() - started);
  return image;
}
export const times = []; // milliseconds per face

function canvasOf(image, canvas = document.createElement("canvas")) {
  canvas.width = canvas.height = about.resolution;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

const strength = () => Number($("noise").value);
const seedOf = () => Math.min(4294967295, Math.max(0, Math.floor(Number($("seed").value)) || 0));
const noiseOf = (seed, index, number) => noise(seed, index, number, about.z_dim).map(value => value * strength());
const pause = () => new Promise(resolve => setTimeout(resolve)); // lets the page respond between two faces

function showSpeed() {
  const recent = times.slice(-PEOPLE), mean = recent.reduce((a, b) => a + b, 0) / recent.length;
  const threads = ort.env.wasm.numThreads;
  $("status").textContent = `${mean.toFixed(0)} ms per face, ${threads} thread${threads > 1 ? "s" : ""}`;
}

async function drawPeople() {
  const own = ++turn, seed = seedOf();
  shown = [];
  chosen = [0, 1];
  const buttons = Array.from({ length: PEOPLE }, (_, index) => {
    const button = document.createElement("button");
    button.append(Object.assign(document.createElement("canvas"), { width: about.resolution, height: about.resolution }));
    button.ariaLabel = `person ${index} of seed ${seed}`;
    button.addEventListener("click", () => choose(index));
    return button;
  });
  $("people").replaceChildren(...buttons);
  for (let index = 0; index < PEOPLE; index++) {
    const c = samplePerson(people, seed, index);
    shown.push({ c, seed, index });
    const image = await generate(c, noiseOf(seed, index, 0));
    if (own !== turn) return;
    canvasOf(image, buttons[index].firstChild);
    showSpeed();
    await pause();
  }
  markChosen();
  await drawStrip();
}

function markChosen() {
  [...$("people").children].forEach((button, index) => { button.ariaPressed = String(chosen.includes(index)); });
}

async function choose(index) {
  if (index >= shown.length || shown.length < PEOPLE) return;
  chosen = [chosen[1], index];
  variant = 0;
  markChosen();
  await drawStrip();
}

const embeddingAt = t => slerp(shown[chosen[0]].c, shown[chosen[1]].c, t);
const blend = () => Number($("blend").value) / 100;
const blendNoise = () => noiseOf(shown[chosen[0]].seed, shown[chosen[0]].index, variant);

async function drawFace() {
  const own = ++turn;
  const image = await generate(embeddingAt(blend()), blendNoise());
  if (own !== turn) return false;
  canvasOf(image, $("face"));
  $("caption").textContent = detail();
  showSpeed();
  return true;
}

async function drawStrip() {
  if (!(await drawFace())) return;
  const own = turn, canvases = [];
  for (let step = 0; step < STEPS; step++) {
    const image = await generate(embeddingAt(step / (STEPS - 1)), blendNoise());
    if (own !== turn) return;
    canvases.push(canvasOf(image));
    $("way").replaceChildren(...canvases);
    await pause();
  }
  document.body.dataset.done = String(Number(document.body.dataset.done || 0) + 1);
}

const chosenNumbers = () => chosen.map(place => shown[place].index);

function detail() {
  const [a, b] = chosenNumbers();
  const who = a === b ? `person ${a}` : `${100 - Math.round(100 * blend())} % person ${a}, ${Math.round(100 * blend())} % person ${b}`;
  return `${who}, noise ${variant}`;
}

export async function png() {
  const seed = shown[chosen[0]].seed;
  const plain = await new Promise(resolve => $("face").toBlob(resolve, "image/png"));
  const text = `seed ${seed} in a browser, ${detail()}`;
  const comment = `AI-generated face, snapshot ${about.model}, ${text}`;
  const file = new Uint8Array(await plain.arrayBuffer());
  return withText(file, { Software: "vultus", Comment: comment }, about.xmp.replace("@detail@", text));
}

async function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await png());
  link.download = `synthetic-face-${shown[chosen[0]].seed}-${chosenNumbers().join("-")}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function fetchFile(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

async function start() {
  about = await (await fetchFile("model.json")).json();
  const [statistics, model] = await Promise.all(
    ["people.bin", "model.onnx"].map(async name => (await fetchFile(name)).arrayBuffer()));
  people = readPeople(statistics, about.people);
  session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
  $("about").textContent =
    `Model ${about.model}, ${about.resolution}×${about.resolution} pixels. Licence: ${about.licence || "not specified"}.`;
  for (const id of ["more", "seed", "noise", "blend", "again", "save"]) $(id).disabled = false;
  $("more").addEventListener("click", () => { $("seed").value = (seedOf() + 1) % 4294967296; drawPeople(); });
  $("seed").addEventListener("change", drawPeople);
  $("noise").addEventListener("change", drawPeople);
  $("blend").addEventListener("input", drawFace);
  $("again").addEventListener("click", () => { variant++; drawStrip(); });
  $("save").addEventListener("click", save);
  await drawPeople();
}

start().catch(error => { $("status").textContent = `This page does not work in this browser: ${error.message}`; });
