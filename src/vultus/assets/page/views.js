// The views of single people, one for each tab: each turns its input into faces. `app` is the page (app.js).

import { Problem, pause } from "./api.js";
import { bytesOf, newSeed, personOf, randomOf, randomPerson } from "./people.js";
import { takePhoto, toAccepted } from "./photos.js";
import { element, save } from "./tiles.js";
import { parseFile, parseText } from "./vectors.js";

const IDLE = 350; // ms without a change before similarities are requested, which take longer than the faces
const SETTLE = 250; // ms without a keystroke before numbers are parsed
const LARGEST_FILE = 64e6;
const EXAMPLES = { seed: 7, count: 6, strength: 1 };

const byId = (id) => document.getElementById(id);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const exact = (value) => Number(value.toPrecision(9)); // 9 digits represent every float32 exactly

/** Faces of people with several variants of noise; the base class of the views below. */
class PeopleView {
  source = null; // { people: [{ c, ... }], start?: number of the first, one?: their mean, photo?: of the only one }
  hint = "Noise decides what the embedding leaves open, such as light and background. Noise strength 0 turns it off.";
  counted = true; // the slider Faces has an effect

  constructor(app) {
    this.app = app;
  }

  input = () => this.source;

  async draw(controls, signal) {
    const { app, source } = this;
    if (!source) return app.present(this, { title: this.emptyTitle, empty: this });
    const { people, start = 0, one, photo } = source;
    const persons = one ? 1 : people.length;
    // The server limits the faces of a request.
    const count = Math.max(1, Math.min(controls.count, Math.floor(app.model.limits.faces / persons)));
    const options = { ...controls, count };
    const asked = { embeddings: people.map(({ c }) => c), start, weights: one ? people.map(() => 1) : undefined };
    const title = `${plural(count, "face")} ${persons > 1 ? `each of ${persons} people` : `of ${this.whose}`}`;
    const show = (faces) => {
      this.mean = faces[0].embedding;
      app.present(this, {
        title,
        photo: Boolean(photo),
        compared: true,
        back: this.back,
        faces: faces.map(({ index, variant, image, similarity }) => ({
          image,
          scores: similarity,
          alt: `synthetic face ${variant + 1} of ${persons > 1 ? `person ${index - start + 1}` : this.whose}, noise ${variant + 1} of seed ${controls.seed}`,
          file: `vultus-${this.name}-${controls.seed}-${persons > 1 ? `${index - start + 1}-` : ""}${variant + 1}.png`,
        })),
      });
    };
    show((await app.api.faces(asked, options, signal)).faces);
    const { facenet, dlib } = app.model.similarity;
    if (!facenet.available && !(dlib.available && photo)) return;
    await pause(IDLE, signal);
    show((photo ? await app.api.facesOfPhoto(photo, options, signal) : await app.api.faces(asked, options, signal, true)).faces);
  }
}

/** People who do not exist, or several faces of one of them (`source`). */
export class RandomView extends PeopleView {
  name = "random";

  constructor(app) {
    super(app);
    byId("back").addEventListener("click", () => this.back());
  }

  get whose() {
    const { seed, number } = this.source.people[0];
    return `random person ${number + 1} of seed ${seed}`;
  }

  async draw(controls, signal) {
    if (this.source) return super.draw(controls, signal);
    const { app } = this;
    const { faces } = await app.api.random(controls, signal);
    app.present(this, {
      title: faces.length === 1 ? "Someone who does not exist" : `${faces.length} people who do not exist`,
      hint: "Each seed gives other people. Noise strength 0 generates faces without noise.",
      faces: faces.map((face, index) => {
        const who = `random person ${index + 1}, seed ${controls.seed}`;
        const person = randomOf(face, controls.seed, index);
        return {
          image: face.image,
          alt: `synthetic face of ${who}`,
          file: `vultus-random-${controls.seed}-${index + 1}.png`,
          actions: [
            { text: "Vary", label: `More faces of ${who}`, act: () => this.vary(person) },
            { text: "Blend", label: `Blend ${who} with another person`, act: () => app.views.blend.add(person) },
          ],
        };
      }),
    });
  }

  /** Faces of one of the people, in place; the first one is the face that is shown already. */
  vary(person) {
    this.source = { people: [person], start: person.number };
    byId("back").hidden = false;
    byId("back").focus({ preventScroll: true }); // the button that was pressed goes away
    this.app.draw();
  }

  back = async () => {
    const [{ number }] = this.source.people;
    this.source = null;
    await this.app.draw();
    byId("faces").children[number]?.querySelector("button")?.focus({ preventScroll: true });
  };

  link() {
    return { people: this.source?.people ?? [] };
  }

  async restore(params, signal) {
    const [person] = await Promise.all(params.getAll("who").slice(0, 1).map((token) => personOf(token, this.app, signal)));
    this.source = person?.seed !== undefined ? { people: [person], start: person.number } : null;
  }
}

/** Photos: the crops that the encoder reads, and faces of those that are ticked. */
export class PhotoView extends PeopleView {
  name = "photo";
  emptyTitle = "Faces of a photo";
  found = []; // faces in the photos: { c, crop, photo, largest: in its photo, used, text }

  constructor(app) {
    super(app);
    for (const id of ["photo-file", "photo-add"]) {
      byId(id).addEventListener("change", ({ target }) => {
        if (target.files.length) this.read([...target.files], { add: id === "photo-add" });
        target.value = "";
      });
    }
    byId("photo-camera").addEventListener("click", async () => {
      const photo = await takePhoto();
      if (photo) this.read([photo]);
    });
    byId("photo-as").addEventListener("change", () => this.choose());
    byId("photo-save").addEventListener("click", () => {
      const [{ c }, ...others] = this.source.people;
      const numbers = others.length && !this.source.one ? { embeddings: this.source.people.map((person) => person.c) } : { embedding: this.mean ?? c };
      save("vultus-embedding.json", new Blob([JSON.stringify({ ...numbers, encoder: app.model.encoder })], { type: "application/json" }));
    });
    byId("photo-blend").addEventListener("click", () => {
      const { people, one } = this.source;
      app.views.blend.add(...(one ? [{ ...people[0], c: this.mean ?? people[0].c, text: "The mean of your photos." }] : people));
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

  get whose() {
    const { one, people } = this.source;
    return one ? `the mean of ${people.length} crops` : this.found.length > 1 ? "one of the crops" : "this photo";
  }

  async example({ image, embedding }) {
    if (!this.app.model.photos.available) return this.app.views.embedding.take({ c: embedding });
    // The content security policy forbids to fetch data: URIs.
    const file = new File([bytesOf(image.split(",")[1])], "example.png", { type: "image/png" });
    await this.read([file], { caption: "This is a crop of a generated face, used as a photo." });
  }

  /** Embed every face in the files; of each photo the largest is ticked. With `add` the previous faces stay. */
  async read(files, { add = false, caption } = {}) {
    const { app } = this;
    app.open("photo");
    const notes = [];
    const found = await app.reading("photo", async (signal) => {
      const faces = [];
      for (const file of files) {
        try {
          faces.push(...(await this.facesIn(file, notes, signal)));
        } catch (error) {
          if (files.length === 1 || !(error instanceof Problem)) throw error;
          notes.push(`${file.name} is left out: ${error.message}`);
        }
      }
      if (!faces.length) throw new Problem(notes.join(" "));
      return faces;
    });
    if (found === undefined) return; // other photos are being read
    this.found = found ? [...(add ? this.found : []), ...found] : add ? this.found : [];
    if (found) byId("photo-as").value = files.length > 1 || add ? "one" : "each";
    byId("photo-note").textContent = notes.join(" ");
    const [crop, is] = this.found.length > 1 ? ["These crops of your photos", "are the only images"] : ["This crop of your photo", "is the only image"];
    byId("crop-caption").textContent = `What the encoder sees. ${caption ?? `${crop} ${is} on this page not generated.`}`;
    byId("crop-image").alt = byId("crop-caption").textContent;
    byId("picks").replaceChildren(...this.found.map((face) => this.pick(face)));
    this.choose();
  }

  async facesIn(file, notes, signal) {
    const { api, model } = this.app;
    const photo = await toAccepted(file, model.limits);
    const largest = await api.embedding(photo, signal);
    const several = largest.faces_found > 1;
    const { faces } = several ? await api.embedding(photo, signal, "all") : largest;
    if (several) notes.push(`${faces.length} faces found in ${file.name}; the largest is ticked.`);
    else if (largest.note) notes.push(largest.note);
    const text = "Your photo, as the encoder sees it.";
    return faces.map(({ embedding, crop }, index) => ({ c: embedding, image: crop, text, photo, largest: !index, used: !index }));
  }

  /** A tick box with the crop of a face. */
  pick(face) {
    const number = this.found.indexOf(face) + 1;
    const box = element("input", { type: "checkbox", className: "visually-hidden", checked: face.used });
    box.setAttribute("aria-label", `Use face ${number}`);
    box.addEventListener("change", () => ((face.used = box.checked), this.choose()));
    const image = element("img", { src: face.image, width: 160, height: 160, alt: `Face ${number}, as the encoder sees it` });
    return element("li", {}, element("label", { className: "pick" }, box, image));
  }

  choose() {
    const several = this.found.length > 1;
    const used = this.found.filter((face) => face.used);
    const people = used.map(({ c, image, text }) => ({ c, image, text }));
    const one = people.length > 1 && byId("photo-as").value === "one";
    const photo = used.length === 1 && used[0].largest ? used[0].photo : undefined;
    this.source = people.length ? { people, one, photo } : null;
    byId("crop").hidden = !this.found.length;
    byId("crop-image").hidden = several;
    if (this.found.length) byId("crop-image").src = this.found[0].image;
    byId("picks-part").hidden = !several;
    byId("photo-as-part").hidden = people.length < 2;
    byId("photo-actions").hidden = !people.length;
    byId("photo-add-part").hidden = !this.found.length;
    byId("drop-text").textContent = this.found.length ? "Drop other photos" : "Drop photos here";
    this.app.draw();
  }

  /** Photos are not in a link: it opens the tab Embedding. */
  link() {
    const { people = [], one } = this.source ?? {};
    return { view: people.length ? "embedding" : "photo", people: one ? [{ c: this.mean }] : people };
  }

  restore() {}
}

/** Embeddings as numbers. */
export class EmbeddingView extends PeopleView {
  name = "embedding";
  whose = "this embedding";
  emptyTitle = "Faces of an embedding";
  emptyText = "No embedding? Try one of these people, who do not exist.";
  rows = [];
  first = 0; // number of the first row; the noise depends on it

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
      const random = await app.reading("numbers", (signal) => randomPerson(app.api, newSeed(), 0, signal));
      if (random) this.take(random);
    });
    for (const id of ["row-number", "row-all"]) byId(id).addEventListener("input", () => this.choose());
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
    this.setRows(rows ?? []);
    byId("numbers").ariaInvalid = String(!rows && Boolean(byId("numbers").value));
    this.choose(write);
  }

  setRows(rows, first = 0, all = false) {
    this.rows = rows;
    this.first = first;
    byId("row").hidden = rows.length < 2;
    byId("row-all").checked = all;
    byId("row-number").value = 1;
    byId("row-number").max = rows.length;
    byId("row-count").textContent = `of ${rows.length}`;
  }

  choose(write) {
    this.update(write);
    this.app.draw();
  }

  update(write = this.rows.length > 1) {
    const all = byId("row-all").checked;
    const number = Math.min(this.rows.length, Math.max(1, Math.floor(byId("row-number").value || 1)));
    const chosen = all ? this.rows : this.rows.slice(number - 1, number);
    byId("row-number").disabled = all;
    this.source = chosen.length ? { people: chosen.map((c) => ({ c })), start: this.first + (all ? 0 : number - 1) } : null;
    const texts = chosen.map((row) => `[${row.map(exact).join(", ")}]`);
    if (write) byId("numbers").value = all ? `[${texts.join(",\n")}]` : texts.join("");
    const numbers = chosen.length ? plural(chosen[0].length, "number") : "";
    byId("numbers-status").textContent = numbers && `${chosen.length > 1 ? `${chosen.length} rows of ` : ""}${numbers} read.`;
  }

  link() {
    const { people = [], start = 0 } = this.source ?? {};
    return { people, more: [["start", start]] };
  }

  async restore(params, signal) {
    const people = await Promise.all(params.getAll("who").map((token) => personOf(token, this.app, signal)));
    this.setRows(people.map(({ c }) => c), Math.max(0, Math.floor(Number(params.get("start")) || 0)), people.length > 1);
    this.update(true);
  }
}

/** Random people as examples, generated once, when a view without input needs them. */
export function examples(app) {
  app.examples ??= app.model.random.available ? app.api.random(EXAMPLES).then(({ faces }) => faces) : Promise.resolve([]);
  return app.examples;
}
