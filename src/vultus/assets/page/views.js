// What the tabs do: each view turns what it was given into faces. `app` is the page (app.js).

import { pause } from "./api.js";
import { fitToSend, takePicture } from "./photos.js";
import { save } from "./tiles.js";
import { parseFile, parseText } from "./vectors.js";

const STRIP = 9;
const FINE = 4; // pictures from one of the strip to the next, once the strip is there
const IDLE = 350; // ms without a change before faces are compared, which takes longer than drawing them
const SETTLE = 250; // ms without a key before numbers are read
const LARGEST_FILE = 64e6;
const EXAMPLES = { seed: 7, count: 6, strength: 1 };

const byId = (id) => document.getElementById(id);
const times = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const exact = (value) => Number(value.toPrecision(9)); // float32, no digit lost
/** A picture of the server as a file. (Fetching a data: address is not among what this page may do.) */
function asFile(address) {
  const bytes = Uint8Array.from(atob(address.split(",")[1]), (one) => one.charCodeAt(0));
  return new File([bytes], "example.png", { type: "image/png" });
}

export const newSeed = () => Math.floor(Math.random() * 1000);

/** People who do not exist. */
export class RandomView {
  hint = "Each seed is another crowd. Strength 0 leaves the noise out.";

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
        const person = { c: face.embedding, image: face.image, words: `Does not exist: ${who}.` };
        return {
          image: face.image,
          alt: `synthetic face of ${who}`,
          file: `vultus-random-${controls.seed}-${index + 1}.png`,
          actions: [
            { words: "Vary", label: `More faces of ${who}`, act: () => app.views.embedding.take(person) },
            { words: "Blend", label: `Blend ${who} with another`, act: () => app.views.blend.add(person) },
          ],
        };
      }),
    });
  }
}

/** One person, several noises; the base of the two views below. */
class PersonView {
  source = null; // { c, photo? }
  hint = "Noise is what the numbers leave open, such as light and background. Strength 0 leaves it out.";

  constructor(app) {
    this.app = app;
  }

  input = () => this.source;

  async draw(controls, signal) {
    const { app, source } = this;
    if (!source) return app.present(this, { title: this.emptyTitle, empty: this });
    const told = { title: `${times(controls.count, "face")} of ${this.whose}`, photo: Boolean(source.photo), compared: true };
    const show = (faces) =>
      app.present(this, {
        ...told,
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
      const picture = await takePicture();
      if (picture) this.read(picture);
    });
    byId("photo-save").addEventListener("click", () => {
      save("vultus-embedding.json", JSON.stringify({ embedding: this.source.c, encoder: app.model.encoder }));
    });
    byId("photo-blend").addEventListener("click", () => {
      app.views.blend.add({ c: this.source.c, image: this.source.crop, words: "Your photo, as the encoder sees it." });
    });
  }

  /** Once the model is known. */
  begin({ photos }) {
    byId("photo-missing").hidden = photos.available;
    byId("photo-in").hidden = !photos.available;
    byId("photo-missing-why").textContent = photos.missing ? `${photos.missing[0].toUpperCase()}${photos.missing.slice(1)}.` : "";
    this.emptyWords = photos.available
      ? "No photo at hand? These people do not exist; take the picture of one of them."
      : "Meanwhile: these people do not exist; see more of one of them.";
  }

  async example({ image, embedding }) {
    if (!this.app.model.photos.available) return this.app.views.embedding.take({ c: embedding });
    await this.read(asFile(image), "Part of an example: a drawn face, taken as a photo.");
  }

  async read(file, caption = "Part of your photo, and the only picture here that is not drawn.") {
    const { app } = this;
    app.open("photo");
    const source = await app.reading("photo", async (signal) => {
      const photo = await fitToSend(file, app.model.limits);
      const { embedding: c, crop, note } = await app.api.embedding(photo, signal);
      return { photo, c, crop, note: note ?? "", caption };
    });
    if (source === undefined) return; // a newer one is being read
    this.source = source;
    byId("crop").hidden = byId("photo-actions").hidden = !source;
    byId("drop-words").textContent = source ? "Drop another photo" : "Drop a photo here";
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
  emptyWords = "No numbers at hand? Take those of somebody who does not exist.";
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
      const found = await app.reading("numbers", (signal) => app.api.random({ seed: newSeed(), count: 1, strength: 1 }, signal));
      if (found) this.take({ c: found.faces[0].embedding });
    });
    byId("row-number").addEventListener("input", () => this.choose());
  }

  begin({ c_dim: dim, encoder }) {
    byId("numbers-label").textContent = `${dim} numbers`;
    byId("numbers").placeholder = "[0.0312, -0.0571, …]";
    byId("numbers-hint").textContent =
      `Of the encoder ${encoder ?? "that the model was trained with"}: as JSON, CSV or with spaces, or .npy; one row or more.`;
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

  /** Take rows from `parse`; with `write` they replace what stands in the field. */
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
    byId("numbers-status").textContent = row ? `${times(row.length, "number")} read.` : "";
    this.app.draw();
  }
}

/** From one person to another. */
export class BlendView {
  hint = "The noise stays the same along the way.";
  people = [null, null]; // { c, image?, words }
  faces = [];

  constructor(app) {
    this.app = app;
    this.slots = ["first person", "second person"].map((who, place) => {
      const slot = byId("slot").content.firstElementChild.cloneNode(true);
      const one = (name) => slot.querySelector(name);
      one("legend").textContent = `${who[0].toUpperCase()}${who.slice(1)}`;
      for (const [name, what] of Object.entries({ random: "Random person as the", file: "Photo of the", camera: "Camera for the" })) {
        one(`.slot-${name}`).setAttribute("aria-label", `${what} ${who}`);
      }
      one(".slot-random").addEventListener("click", () => this.random(place));
      one(".slot-file").addEventListener("change", ({ target }) => {
        if (target.files[0]) this.read(place, target.files[0]);
        target.value = "";
      });
      one(".slot-camera").addEventListener("click", async () => {
        const picture = await takePicture();
        if (picture) this.read(place, picture);
      });
      return slot;
    });
    byId("slots").append(...this.slots);
    byId("way").addEventListener("input", () => this.show());
  }

  begin({ photos }) {
    for (const part of document.querySelectorAll(".slot-camera, .slot .button:has(.slot-file)")) part.hidden = !photos.available;
    byId("blend-missing").textContent = photos.available ? "" : "Photos cannot be read here yet; the tab Photo says why.";
  }

  input = () => this.people;

  /** One more person; the one before moves on to be the second. */
  add(person) {
    this.people = [person, this.people[0] ?? this.people[1]];
    this.app.open("blend");
    this.app.draw();
  }

  put(place, person) {
    this.people = this.people.with(place, person);
    this.app.draw();
  }

  async someone(signal) {
    const seed = newSeed();
    const { faces } = await this.app.api.random({ seed, count: 1, strength: 1 }, signal);
    return { c: faces[0].embedding, words: `Does not exist: random person, seed ${seed}.` };
  }

  async random(place) {
    const person = await this.app.reading(`slot ${place}`, (signal) => this.someone(signal));
    if (person) this.put(place, person);
  }

  async read(place, file) {
    const { app } = this;
    const found = await app.reading(`slot ${place}`, async (signal) => app.api.embedding(await fitToSend(file, app.model.limits), signal));
    if (!found) return;
    const words = ["Your photo, as the encoder sees it.", found.note].filter(Boolean).join(" ");
    this.put(place, { c: found.embedding, image: found.crop, words });
  }

  async draw(controls, signal) {
    const { app } = this;
    const found = await Promise.all(this.people.map((person) => person ?? this.someone(signal)));
    this.people = this.people.map((person, place) => person ?? found[place]);
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

  /** Put the pictures that are there on the page. */
  show() {
    const last = this.faces.length - 1;
    const at = Number(byId("way").value);
    const step = Math.round(at * last);
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
    this.slots.forEach((slot, place) => {
      const person = this.people[place];
      const picture = slot.querySelector(".slot-image");
      picture.src = person.image ?? this.faces[place * last];
      picture.alt = person.words;
      picture.hidden = false;
      slot.querySelector(".slot-words").textContent = person.words;
    });
  }

  /** The pictures of the strip: { image, at }. */
  strip() {
    const every = (this.faces.length - 1) / (Math.min(STRIP, this.app.model.limits.faces) - 1);
    return this.faces.filter((_, index) => index % every === 0).map((image, index, all) => ({ image, at: index / (all.length - 1) }));
  }
}

/** Made once, when a view without anything to show asks for them. */
export function examples(app) {
  app.examples ??= app.model.random.available ? app.api.random(EXAMPLES).then(({ faces }) => faces) : Promise.resolve([]);
  return app.examples;
}
