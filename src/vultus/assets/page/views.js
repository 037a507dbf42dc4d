// The views, one for each tab: each turns its input into faces. `app` is the page (app.js).

import { pause } from "./api.js";
import { takePhoto, toAccepted } from "./photos.js";
import { save } from "./tiles.js";
import { parseFile, parseText } from "./vectors.js";

const STRIP = 9; // images in the strip of a blend
const FINE = 4; // steps of the slider per image of the strip, once all of them are generated
const IDLE = 350; // ms without a change before similarities are requested, which take longer than the faces
const SETTLE = 250; // ms without a keystroke before numbers are parsed
const LARGEST_FILE = 64e6;
const EXAMPLES = { seed: 7, count: 6, strength: 1 };

const byId = (id) => document.getElementById(id);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const exact = (value) => Number(value.toPrecision(9)); // 9 digits represent every float32 exactly
/** A generated image (a data: URI) as a file. The content security policy forbids to fetch data: URIs. */
function asFile(uri) {
  const bytes = Uint8Array.from(atob(uri.split(",")[1]), (character) => character.charCodeAt(0));
  return new File([bytes], "example.png", { type: "image/png" });
}

const describe = (index, seed) => `A person who does not exist (number ${index + 1} of seed ${seed}).`;

export const newSeed = () => Math.floor(Math.random() * 1000);

/** People who do not exist. */
export class RandomView {
  hint = "Each seed gives other people. Noise strength 0 generates faces without noise.";

  constructor(app) {
    this.app = app;
  }

  input = () => "";

  async draw(controls, signal) {
    const { app } = this;
    const { faces } = await app.api.random(controls, signal);
    app.present(this, {
      title: faces.length === 1 ? "Someone who does not exist" : `${faces.length} people who do not exist`,
      faces: faces.map((face, index) => {
        const who = `random person ${index + 1}, seed ${controls.seed}`;
        const person = { c: face.embedding, image: face.image, text: describe(index, controls.seed) };
        return {
          image: face.image,
          alt: `synthetic face of ${who}`,
          file: `vultus-random-${controls.seed}-${index + 1}.png`,
          actions: [
            { text: "Vary", label: `More faces of ${who}`, act: () => app.views.embedding.take(person) },
            { text: "Blend", label: `Blend ${who} with another person`, act: () => app.views.blend.add(person) },
          ],
        };
      }),
    });
  }
}

/** One person, several variants of noise; the base class of the two views below. */
class PersonView {
  source = null; // { c, photo? }
  hint = "Noise decides what the embedding leaves open, such as light and background. Noise strength 0 turns it off.";

  constructor(app) {
    this.app = app;
  }

  input = () => this.source;

  async draw(controls, signal) {
    const { app, source } = this;
    if (!source) return app.present(this, { title: this.emptyTitle, empty: this });
    const common = { title: `${plural(controls.count, "face")} of ${this.whose}`, photo: Boolean(source.photo), compared: true };
    const show = (faces) =>
      app.present(this, {
        ...common,
        faces: faces.map((face, index) => ({
          image: face.image,
          scores: face.similarity,
          alt: `synthetic face ${index + 1} of ${this.whose}, noise ${index + 1} of seed ${controls.seed}`,
          file: `vultus-${this.name}-${controls.seed}-${index + 1}.png`,
        })),
      });
    show((await app.api.faces(source.c, controls, signal)).faces);
    const { facenet, dlib } = app.model.similarity;
    if (!facenet.available && !(dlib.available && source.photo)) return;
    await pause(IDLE, signal);
    const compared = source.photo
      ? await app.api.facesOfPhoto(source.photo, controls, signal)
      : await app.api.faces(source.c, controls, signal, true);
    show(compared.faces);
  }
}

/** A photo: the crop that the encoder reads, and faces of it. */
export class PhotoView extends PersonView {
  name = "photo";
  whose = "this photo";
  emptyTitle = "Faces of a photo";

  constructor(app) {
    super(app);
    byId("photo-file").addEventListener("change", ({ target }) => {
      if (target.files[0]) this.read(target.files[0]);
      target.value = "";
    });
    byId("photo-camera").addEventListener("click", async () => {
      const photo = await takePhoto();
      if (photo) this.read(photo);
    });
    byId("photo-save").addEventListener("click", () => {
      save("vultus-embedding.json", JSON.stringify({ embedding: this.source.c, encoder: app.model.encoder }));
    });
    byId("photo-blend").addEventListener("click", () => {
      app.views.blend.add({ c: this.source.c, image: this.source.crop, text: "Your photo, as the encoder sees it." });
    });
  }

  /** Called once, when the model is known. */
  begin({ photos }) {
    byId("photo-missing").hidden = photos.available;
    byId("photo-in").hidden = !photos.available;
    byId("photo-missing-reason").textContent = photos.missing ? `${photos.missing[0].toUpperCase()}${photos.missing.slice(1)}.` : "";
    this.emptyText = photos.available
      ? "No photo? Try one of these people, who do not exist."
      : "These people do not exist. Choose one to see more faces of that person.";
  }

  async example({ image, embedding }) {
    if (!this.app.model.photos.available) return this.app.views.embedding.take({ c: embedding });
    await this.read(asFile(image), "This is a crop of a generated face, used as a photo.");
  }

  async read(file, caption = "This crop of your photo is the only image on this page that is not generated.") {
    const { app } = this;
    app.open("photo");
    const source = await app.reading("photo", async (signal) => {
      const photo = await toAccepted(file, app.model.limits);
      const { embedding: c, crop, note } = await app.api.embedding(photo, signal);
      return { photo, c, crop, note: note ?? "", caption };
    });
    if (source === undefined) return; // another photo is being read
    this.source = source;
    byId("crop").hidden = byId("photo-actions").hidden = !source;
    byId("drop-text").textContent = source ? "Drop another photo" : "Drop a photo here";
    byId("photo-note").textContent = source?.note ?? "";
    if (source) {
      byId("crop-image").src = source.crop;
      byId("crop-image").alt = `What the encoder sees. ${source.caption}`;
      byId("crop-caption").textContent = `What the encoder sees. ${source.caption}`;
    }
    app.draw();
  }
}

/** An embedding as numbers. */
export class EmbeddingView extends PersonView {
  name = "embedding";
  whose = "this embedding";
  emptyTitle = "Faces of an embedding";
  emptyText = "No embedding? Try one of these people, who do not exist.";
  rows = [];

  constructor(app) {
    super(app);
    const numbers = byId("numbers");
    let timer;
    numbers.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.use(() => (numbers.value.trim() ? parseText(numbers.value, app.model.c_dim) : [])), SETTLE);
    });
    byId("numbers-file").addEventListener("change", ({ target }) => {
      if (target.files[0]) this.read(target.files[0]);
      target.value = "";
    });
    byId("numbers-random").addEventListener("click", async () => {
      const random = await app.reading("numbers", (signal) => app.api.random({ seed: newSeed(), count: 1, strength: 1 }, signal));
      if (random) this.take({ c: random.faces[0].embedding });
    });
    byId("row-number").addEventListener("input", () => this.choose());
  }

  begin({ c_dim: dim, encoder }) {
    byId("numbers-label").textContent = `${dim} numbers`;
    byId("numbers").placeholder = "[0.0312, -0.0571, …]";
    byId("numbers-hint").textContent =
      `One or more embeddings of ${encoder ?? "the encoder that the model was trained with"}: JSON, CSV, numbers separated by spaces, or a .npy file.`;
  }

  example({ embedding }) {
    this.take({ c: embedding });
  }

  take({ c }) {
    this.app.open("embedding");
    byId("numbers").value = `[${c.map(exact).join(", ")}]`;
    this.use(() => [c]);
  }

  async read(file) {
    this.app.open("embedding");
    await this.use(() => parseFile(file, this.app.model.c_dim, LARGEST_FILE), true);
  }

  /** Take the rows that `parse` returns; with `write` they replace the text in the field. */
  async use(parse, write = false) {
    const rows = await this.app.reading("numbers", async () => parse());
    if (rows === undefined) return;
    this.rows = rows ?? [];
    byId("row").hidden = this.rows.length < 2;
    byId("row-number").value = 1;
    byId("row-number").max = this.rows.length;
    byId("row-count").textContent = `of ${this.rows.length}`;
    byId("numbers").ariaInvalid = String(!rows && Boolean(byId("numbers").value));
    this.choose(write);
  }

  choose(write = this.rows.length > 1) {
    const row = this.rows[Math.min(this.rows.length, Math.max(1, Math.floor(byId("row-number").value || 1))) - 1];
    this.source = row ? { c: row } : null;
    if (write) byId("numbers").value = row ? `[${row.map(exact).join(", ")}]` : "";
    byId("numbers-status").textContent = row ? `${plural(row.length, "number")} read.` : "";
    this.app.draw();
  }
}

/** Faces along the arc between two people. */
export class BlendView {
  hint = "All faces of a blend have the same noise.";
  people = [null, null]; // { c, image?, text }
  faces = [];

  constructor(app) {
    this.app = app;
    this.slots = ["first person", "second person"].map((who, index) => {
      const slot = byId("slot").content.firstElementChild.cloneNode(true);
      const find = (selector) => slot.querySelector(selector);
      find("legend").textContent = `${who[0].toUpperCase()}${who.slice(1)}`;
      for (const [name, what] of Object.entries({ random: "Random person as the", file: "Photo of the", camera: "Camera for the" })) {
        find(`.slot-${name}`).setAttribute("aria-label", `${what} ${who}`);
      }
      find(".slot-random").addEventListener("click", () => this.random(index));
      find(".slot-file").addEventListener("change", ({ target }) => {
        if (target.files[0]) this.read(index, target.files[0]);
        target.value = "";
      });
      find(".slot-camera").addEventListener("click", async () => {
        const photo = await takePhoto();
        if (photo) this.read(index, photo);
      });
      return slot;
    });
    byId("slots").append(...this.slots);
    byId("way").addEventListener("input", () => this.show());
  }

  begin({ photos }) {
    for (const part of document.querySelectorAll(".slot-camera, .slot .button:has(.slot-file)")) part.hidden = !photos.available;
    byId("blend-missing").textContent = photos.available ? "" : "This server cannot read photos; the tab Photo says why.";
  }

  input = () => this.people;

  /** Add a first person; the previous first person becomes the second. */
  add(person) {
    this.people = [person, this.people[0] ?? this.people[1]];
    this.app.open("blend");
    this.app.draw();
  }

  put(index, person) {
    this.people = this.people.with(index, person);
    this.app.draw();
  }

  async randomPerson(signal) {
    const seed = newSeed();
    const { faces } = await this.app.api.random({ seed, count: 1, strength: 1 }, signal);
    return { c: faces[0].embedding, text: describe(0, seed) };
  }

  async random(index) {
    const person = await this.app.reading(`slot ${index}`, (signal) => this.randomPerson(signal));
    if (person) this.put(index, person);
  }

  async read(index, file) {
    const { app } = this;
    const embedded = await app.reading(`slot ${index}`, async (signal) => app.api.embedding(await toAccepted(file, app.model.limits), signal));
    if (!embedded) return;
    const text = ["Your photo, as the encoder sees it.", embedded.note].filter(Boolean).join(" ");
    this.put(index, { c: embedded.embedding, image: embedded.crop, text });
  }

  async draw(controls, signal) {
    const { app } = this;
    const chosen = await Promise.all(this.people.map((person) => person ?? this.randomPerson(signal)));
    this.people = this.people.map((person, index) => person ?? chosen[index]);
    const [a, b] = this.people;
    const strip = Math.min(STRIP, app.model.limits.faces);
    const fine = (strip - 1) * FINE + 1;
    for (const steps of fine <= app.model.limits.faces ? [strip, fine] : [strip]) {
      if (steps > strip) await pause(IDLE, signal);
      const { faces } = await app.api.between(a.c, b.c, steps, controls, signal);
      this.faces = faces.map((face) => face.image);
      app.present(this, { title: "From one person to another", blend: this, count: strip });
    }
  }

  /** Show the images that have been generated. */
  show() {
    const last = this.faces.length - 1;
    const position = Number(byId("way").value);
    const step = Math.round(position * last);
    const percent = Math.round((100 * step) / last);
    const [image, link] = ["blend-image", "blend-save"].map(byId);
    image.src = link.href = this.faces[step];
    image.alt = `synthetic face, ${percent} % of the way from the first person to the second`;
    link.download = `vultus-blend-${percent}.png`;
    byId("blend-first").src = this.faces[0];
    byId("blend-second").src = this.faces[last];
    byId("blend-first").alt = "synthetic face of the first person";
    byId("blend-second").alt = "synthetic face of the second person";
    byId("way-value").textContent = `${percent} %`;
    byId("way").setAttribute("aria-valuetext", `${percent} % of the way to the second person`);
    this.slots.forEach((slot, index) => {
      const person = this.people[index];
      const image = slot.querySelector(".slot-image");
      image.src = person.image ?? this.faces[index * last];
      image.alt = person.text;
      image.hidden = false;
      slot.querySelector(".slot-text").textContent = person.text;
    });
  }

  /** The images of the strip: { image, position }. */
  strip() {
    const every = (this.faces.length - 1) / (Math.min(STRIP, this.app.model.limits.faces) - 1);
    return this.faces.filter((_, index) => index % every === 0).map((image, index, all) => ({ image, position: index / (all.length - 1) }));
  }
}

/** Random people as examples, generated once, when a view without input needs them. */
export function examples(app) {
  app.examples ??= app.model.random.available ? app.api.random(EXAMPLES).then(({ faces }) => faces) : Promise.resolve([]);
  return app.examples;
}
