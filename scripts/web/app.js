import * as ort from "./ort/ort.wasm.min.mjs";
import { noise, readPeople, samplePerson, slerp, toImage, withText } from "./faces.js";

const PEOPLE = 12, STEPS = 9;
const $ = id => document.getElementById(id);

// Threads need a page that is isolated from others (COOP and COEP headers); a plain static server gives one.
ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;

let about, people, session;
let shown = []; // [{c, name, seed, index}] of the people on the page
let chosen = [0, 1]; // places in `shown`; the blend goes from the first to the second
let variant = 0; // of the noise of the blend
let turn = 0; // counts drawings begun, so that an older one stops

/** One face: c, z of length c_dim, z_dim -> ImageData. Counts its time. */
export async function draw(c, z) {
  const begun = performance.now();
  const feeds = {
    z: new ort.Tensor("float32", Float32Array.from(z), [1, about.z_dim]),
    c: new ort.Tensor("float32", Float32Array.from(c), [1, about.c_dim]),
  };
  const { x } = await session.run(feeds);
  const image = toImage(x.data, about.resolution);
  times.push(performance.now() - begun);
  return image;
}
export const times = []; // milliseconds of each face

function canvasOf(image, canvas = document.createElement("canvas")) {
  canvas.width = canvas.height = about.resolution;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

const strength = () => Number($("noise").value);
const seedOf = () => Math.min(4294967295, Math.max(0, Math.floor(Number($("seed").value)) || 0));
const noiseOf = (seed, index, number) => noise(seed, index, number, about.z_dim).map(value => value * strength());
const pause = () => new Promise(resolve => setTimeout(resolve)); // lets the page answer between two faces

function say() {
  const recent = times.slice(-PEOPLE), mean = recent.reduce((a, b) => a + b, 0) / recent.length;
  const threads = ort.env.wasm.numThreads;
  $("status").textContent = `${mean.toFixed(0)} ms a face, ${threads} thread${threads > 1 ? "s" : ""}`;
}

async function drawPeople() {
  const mine = ++turn, seed = seedOf();
  shown = [];
  chosen = [0, 1];
  const buttons = Array.from({ length: PEOPLE }, (_, place) => {
    const button = document.createElement("button");
    button.append(Object.assign(document.createElement("canvas"), { width: about.resolution, height: about.resolution }));
    button.ariaLabel = `person ${place} of seed ${seed}`;
    button.addEventListener("click", () => choose(place));
    return button;
  });
  $("people").replaceChildren(...buttons);
  for (let place = 0; place < PEOPLE; place++) {
    const c = samplePerson(people, seed, place);
    shown.push({ c, seed, index: place });
    const image = await draw(c, noiseOf(seed, place, 0));
    if (mine !== turn) return;
    canvasOf(image, buttons[place].firstChild);
    say();
    await pause();
  }
  mark();
  await drawWay();
}

function mark() {
  [...$("people").children].forEach((button, place) => { button.ariaPressed = String(chosen.includes(place)); });
}

async function choose(place) {
  if (place >= shown.length || shown.length < PEOPLE) return;
  chosen = [chosen[1], place];
  variant = 0;
  mark();
  await drawWay();
}

const at = t => slerp(shown[chosen[0]].c, shown[chosen[1]].c, t);
const blend = () => Number($("blend").value) / 100;
const noiseHere = () => noiseOf(shown[chosen[0]].seed, shown[chosen[0]].index, variant);

async function drawFace() {
  const mine = ++turn;
  const image = await draw(at(blend()), noiseHere());
  if (mine !== turn) return false;
  canvasOf(image, $("face"));
  $("caption").textContent = detail();
  say();
  return true;
}

async function drawWay() {
  if (!(await drawFace())) return;
  const mine = turn, canvases = [];
  for (let step = 0; step < STEPS; step++) {
    const image = await draw(at(step / (STEPS - 1)), noiseHere());
    if (mine !== turn) return;
    canvases.push(canvasOf(image));
    $("way").replaceChildren(...canvases);
    await pause();
  }
  document.body.dataset.done = String(Number(document.body.dataset.done || 0) + 1);
}

function detail() {
  const [a, b] = chosen.map(place => shown[place].index);
  const who = a === b ? `person ${a}` : `${100 - Math.round(100 * blend())} % person ${a}, ${Math.round(100 * blend())} % person ${b}`;
  return `${who}, noise ${variant}`;
}

export async function png() {
  const seed = shown[chosen[0]].seed;
  const plain = await new Promise(resolve => $("face").toBlob(resolve, "image/png"));
  const words = `seed ${seed} in a browser, ${detail()}`;
  const comment = `AI-generated face, snapshot ${about.model}, ${words}`;
  const file = new Uint8Array(await plain.arrayBuffer());
  return withText(file, { Software: "vultus", Comment: comment }, about.xmp.replace("@detail@", words));
}

async function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await png());
  link.download = `synthetic-face-${shown[chosen[0]].seed}-${chosen.map(place => shown[place].index).join("-")}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function fetched(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
  return answer;
}

async function start() {
  about = await (await fetched("model.json")).json();
  const [statistics, model] = await Promise.all(
    ["people.bin", "model.onnx"].map(async name => (await fetched(name)).arrayBuffer()));
  people = readPeople(statistics, about.people);
  session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
  $("about").textContent =
    `Model ${about.model}, ${about.resolution}×${about.resolution} pixels. Licence: ${about.licence || "not named"}.`;
  for (const id of ["more", "seed", "noise", "blend", "again", "save"]) $(id).disabled = false;
  $("more").addEventListener("click", () => { $("seed").value = (seedOf() + 1) % 4294967296; drawPeople(); });
  $("seed").addEventListener("change", drawPeople);
  $("noise").addEventListener("change", drawPeople);
  $("blend").addEventListener("input", drawFace);
  $("again").addEventListener("click", () => { variant++; drawWay(); });
  $("save").addEventListener("click", save);
  await drawPeople();
}

start().catch(error => { $("status").textContent = `It does not work here: ${error.message}`; });
