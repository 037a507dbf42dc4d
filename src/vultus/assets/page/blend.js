// The tab Blend: the arc between two people, or the weighted mean of more.

import { Problem, pause } from "./api.js";
import { newSeed, personOf, randomPerson, tokenOf } from "./people.js";
import { onDrop, takePhoto, toAccepted } from "./photos.js";

const NAMES = ["first", "second", "third", "fourth", "fifth", "sixth"];
const STRIP = 9; // images in the strip of two people
const FINE = 4; // steps of the slider per image of the strip, once all of them are generated
const IDLE = 350; // ms without a change before the finer steps are requested
const SETTLE = 120; // ms without a change of a weight before faces are generated
const PORTRAIT = { seed: 0, count: 1, strength: 1 }; // of a person of whom no image is known

const byId = (id) => document.getElementById(id);

export class BlendView {
  people = [null, null]; // { c, image?: of a photo, face?: generated, text, seed?, number? }
  weights = [1, 1]; // used from three people on
  faces = []; // images along the arc of two people
  slots = [];

  constructor(app) {
    this.app = app;
    byId("way").addEventListener("input", () => this.show());
    byId("blend-add").addEventListener("click", () => {
      this.set([...this.people, null], [...this.weights, 1]);
      this.app.draw();
    });
    this.set(this.people, this.weights);
  }

  begin({ photos }) {
    this.photos = photos.available;
    for (const slot of this.slots) this.showPhotoButtons(slot);
    byId("blend-missing").textContent = photos.available ? "" : "This server cannot read photos; the tab Photo says why.";
  }

  get hint() {
    return this.several ? "The faces are of the weighted mean of the embeddings." : "All faces of a blend have the same noise.";
  }

  get several() {
    return this.people.length > 2;
  }

  get counted() {
    return this.several;
  }

  input = () => [this.people, this.weights];

  set(people, weights) {
    [this.people, this.weights] = [people, weights];
    while (this.slots.length > people.length) this.slots.pop().remove();
    while (this.slots.length < people.length) {
      this.slots.push(this.newSlot(this.slots.length));
      byId("slots").append(this.slots.at(-1));
    }
    byId("blend-add").hidden = people.length === NAMES.length;
    this.slots.forEach((slot, index) => {
      slot.querySelector(".slot-weight").hidden = slot.querySelector(".slot-remove").hidden = !this.several;
      slot.querySelector(".slot-weight input").value = weights[index];
      slot.querySelector("output").textContent = Number(weights[index]).toFixed(2);
    });
  }

  newSlot(index) {
    const slot = byId("slot").content.firstElementChild.cloneNode(true);
    const find = (selector) => slot.querySelector(selector);
    const who = `${NAMES[index]} person`;
    find("legend").textContent = `${who[0].toUpperCase()}${who.slice(1)}`;
    for (const [name, what] of Object.entries({ random: "Random person as the", file: "Photo of the", camera: "Camera for the", remove: "Remove the" })) {
      find(`.slot-${name}`).setAttribute("aria-label", `${what} ${who}`);
    }
    find(".slot-weight input").setAttribute("aria-label", `Weight of the ${who}`);
    find(".slot-random").addEventListener("click", () => this.random(index));
    find(".slot-file").addEventListener("change", ({ target }) => {
      if (target.files[0]) this.read(index, target.files[0]);
      target.value = "";
    });
    find(".slot-camera").addEventListener("click", async () => {
      const photo = await takePhoto();
      if (photo) this.read(index, photo);
    });
    find(".slot-remove").addEventListener("click", () => {
      this.set(this.people.toSpliced(index, 1), this.weights.toSpliced(index, 1));
      this.showSlots();
      this.app.draw();
      byId("blend-add").focus();
    });
    find(".slot-weight input").addEventListener("input", ({ target }) => {
      this.set(this.people, this.weights.with(index, Number(target.value)));
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.app.draw(), SETTLE);
    });
    onDrop(slot, ([file]) => this.photos && this.read(index, file));
    this.showPhotoButtons(slot);
    return slot;
  }

  showPhotoButtons(slot) {
    for (const part of slot.querySelectorAll(".slot-camera, .button:has(.slot-file)")) part.hidden = !this.photos;
  }

  /** Add people in front; as many of the previous ones stay as there is room for. */
  add(...added) {
    const previous = this.people.filter(Boolean);
    const count = Math.max(this.people.length, Math.min(added.length, NAMES.length));
    const people = [...added, ...previous, null, null].slice(0, count);
    this.set(people, people.map(() => 1));
    this.app.open("blend");
    this.app.draw();
  }

  put(index, person) {
    this.set(this.people.with(index, person), this.weights);
    this.app.draw();
  }

  newPerson = (signal) => randomPerson(this.app.api, newSeed(), 0, signal);

  async random(index) {
    const person = await this.app.reading(`slot ${index}`, this.newPerson);
    if (person) this.put(index, person);
  }

  async read(index, file) {
    const { app } = this;
    const embedded = await app.reading(`slot ${index}`, async (signal) => app.api.embedding(await toAccepted(file, app.model.limits), signal));
    if (!embedded) return;
    const text = ["Your photo, as the encoder sees it.", embedded.note].filter(Boolean).join(" ");
    this.put(index, { c: embedded.embedding, image: embedded.crop, text });
  }

  link() {
    const more = this.several ? this.weights.map((weight) => ["weight", weight]) : [["position", byId("way").value]];
    return { people: this.people.filter(Boolean), more };
  }

  async restore(params, signal) {
    const tokens = params.getAll("who").slice(0, NAMES.length);
    const people = await Promise.all(tokens.map((token) => personOf(token, this.app, signal)));
    const weights = params.getAll("weight").map((weight) => Math.min(1, Math.max(0, Number(weight) || 0)));
    while (people.length < 2) people.push(null);
    this.set(people, people.map((_, index) => weights[index] ?? 1));
    byId("way").value = params.get("position") ?? 0.5;
  }

  async draw(controls, signal) {
    const chosen = await Promise.all(this.people.map((person) => person ?? this.newPerson(signal)));
    this.people = this.people.map((person, index) => person ?? chosen[index]);
    await (this.several ? this.drawMean(controls, signal) : this.drawArc(controls, signal));
  }

  async drawMean(controls, signal) {
    const { app, people, weights } = this;
    if (!weights.some(Boolean)) throw new Problem("All weights are 0; give one person a weight.");
    const { faces } = await app.api.faces({ embeddings: people.map(({ c }) => c), weights }, controls, signal);
    for (const person of people) {
      if (!person.image && !person.face) person.face = (await app.api.faces({ embeddings: [person.c] }, PORTRAIT, signal)).faces[0].image;
    }
    this.showSlots();
    app.present(this, {
      title: `A blend of ${people.length} people`,
      faces: faces.map(({ image, variant }) => ({
        image,
        alt: `synthetic face ${variant + 1} of a blend of ${people.length} people, noise ${variant + 1} of seed ${controls.seed}`,
        file: `vultus-blend-${controls.seed}-${variant + 1}.png`,
      })),
    });
  }

  async drawArc(controls, signal) {
    const { app, people: [a, b] } = this;
    const strip = Math.min(STRIP, app.model.limits.faces);
    const fine = (strip - 1) * FINE + 1;
    for (const steps of fine <= app.model.limits.faces ? [strip, fine] : [strip]) {
      if (steps > strip) await pause(IDLE, signal);
      const { faces } = await app.api.between(a.c, b.c, steps, controls, signal);
      this.faces = faces.map((face) => face.image);
      app.present(this, { title: "From one person to another", blend: this, count: strip });
    }
  }

  /** Show the images along the arc that have been generated. */
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
    this.showSlots();
  }

  showSlots() {
    this.slots.forEach((slot, index) => {
      const person = this.people[index];
      const image = slot.querySelector(".slot-image");
      const face = this.several ? person?.face : this.faces[index * (this.faces.length - 1)];
      image.hidden = !person || !(person.image ?? face);
      if (!image.hidden) image.src = person.image ?? face;
      image.alt = slot.querySelector(".slot-text").textContent = person?.text ?? "";
    });
  }

  /** The images of the strip: { image, position, file }. */
  strip() {
    const every = (this.faces.length - 1) / (Math.min(STRIP, this.app.model.limits.faces) - 1);
    return this.faces
      .filter((_, index) => index % every === 0)
      .map((image, index, all) => ({ image, position: index / (all.length - 1), file: `vultus-blend-${index + 1}.png` }));
  }
}
