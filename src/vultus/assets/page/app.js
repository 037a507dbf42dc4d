// The page: tabs, controls, and the stage on which the views show faces.

import { Api, Latest, Problem, pause } from "./api.js";
import { cameraProblem, onDrop } from "./photos.js";
import { element, legend, measures, showFaces } from "./tiles.js";
import { BlendView, EmbeddingView, PhotoView, RandomView, examples, newSeed } from "./views.js";

const SETTLE = 120; // ms that a slider rests before faces are drawn

const byId = (id) => document.getElementById(id);
const tabs = [...document.querySelectorAll("[role=tab]")];
const [stage, status, problem] = ["stage", "status", "error"].map(byId);

class App {
  drawing = new Latest();
  places = {}; // what is being read -> Latest
  problems = {};
  views = { random: new RandomView(this), photo: new PhotoView(this), blend: new BlendView(this), embedding: new EmbeddingView(this) };
  shown = new Map(); // view -> what it showed last, and for which input
  api = new Api({ askToken, onWait: (seconds) => (status.textContent = `The server is busy; trying again in ${seconds} s.`) });

  async start() {
    try {
      this.model = await this.api.model();
    } catch (error) {
      for (const part of document.querySelectorAll(".source, .settings")) part.hidden = true;
      byId("panel").hidden = false;
      return this.tell({ reading: error });
    }
    for (const view of Object.values(this.views)) view.begin?.(this.model);
    const { id, resolution, licence, limits, random } = this.model;
    byId("model").textContent = `Model ${id}, ${resolution}×${resolution} pixels${licence ? `; licence: ${licence}` : ""}.`;
    byId("count").max = Math.min(24, limits.faces);
    byId("count").value = Math.min(matchMedia("(max-width: 40rem)").matches ? 4 : 8, limits.faces);
    byId("panel").hidden = false;
    showControls();
    const asked = location.hash.slice(1);
    this.open(Object.hasOwn(this.views, asked) ? asked : random.available ? "random" : "embedding");
  }

  get controls() {
    const [seed, count, strength] = ["seed-number", "count", "strength"].map((id) => Number(byId(id).value));
    return { seed, count, strength };
  }

  /** Show a tab, with what it showed last. */
  open(name) {
    if (this.current === this.views[name]) return;
    this.current = this.views[name];
    for (const place of Object.values(this.places)) place.stop();
    for (const tab of tabs) {
      const chosen = tab.dataset.view === name;
      tab.ariaSelected = String(chosen);
      tab.tabIndex = chosen ? 0 : -1;
    }
    byId("panel").setAttribute("aria-labelledby", `tab-${name}`);
    byId("panel").dataset.view = name;
    for (const part of document.querySelectorAll("[data-for]")) part.hidden = part.dataset.for !== name;
    byId("count-control").hidden = name === "blend";
    byId("controls-hint").textContent = this.current.hint;
    if (location.hash !== `#${name}`) history.pushState(null, "", `#${name}`);
    this.tell({ reading: null, drawing: null });
    this.render(this.shown.get(this.current) ?? {});
    this.draw();
  }

  /** Draw what the view has, unless that is what it shows; a newer call cancels this one. */
  async draw() {
    const view = this.current;
    const key = JSON.stringify([view.input(), this.controls]);
    if (this.shown.get(view)?.key === key && this.shown.get(view).whole) return this.drawing.stop(), this.busy(false);
    this.busy(true);
    this.begun = performance.now();
    this.key = key;
    try {
      const done = await this.drawing.run((signal) => view.draw(this.controls, signal).then(() => true));
      if (!done) return; // a newer one draws
      this.shown.get(view).whole = true;
      // A view may choose its own input while it draws, as two random people.
      this.shown.get(view).key = JSON.stringify([view.input(), this.controls]);
      this.tell({ drawing: null });
    } catch (error) {
      this.tell({ drawing: error });
    }
    this.busy(false);
  }

  /** What a view has drawn: { title, faces?, blend?, empty?, photo?, compared? }. */
  present(view, told) {
    const count = told.faces?.length ?? told.count ?? 0;
    const seconds = ((performance.now() - this.begun) / 1000).toFixed(1);
    const before = this.shown.get(view);
    // Comparing comes second; the time told is that until the faces were there.
    const said = before?.begun === this.begun ? before.said : count ? `${count} ${count === 1 ? "face" : "faces"} in ${seconds} s` : "";
    this.shown.set(view, { ...told, key: this.key, begun: this.begun, said });
    if (view !== this.current) return;
    this.busy(false); // what may follow, as comparing, changes no face
    this.render(this.shown.get(view));
  }

  render({ title = "", said = "", faces = [], blend, empty, photo, compared }) {
    byId("stage-title").textContent = title;
    if (status.textContent !== said) status.textContent = said;
    byId("legend").hidden = true;
    if (compared) legend(byId("legend"), this.model.similarity, photo);
    byId("blend").hidden = !blend;
    if (blend) {
      blend.show();
      showStrip(blend);
    }
    byId("empty").hidden = !empty;
    byId("controls").hidden = Boolean(empty);
    if (empty) this.showExamples(empty);
    showFaces(byId("faces"), faces, this.model.similarity, compared ? measures(this.model.similarity, photo) : []);
  }

  async showExamples(view) {
    byId("empty-words").textContent = "";
    try {
      const found = await examples(this);
      if (view !== this.current) return;
      byId("empty-words").textContent = found.length ? view.emptyWords : "";
      byId("examples").replaceChildren(
        ...found.map((face, index) => {
          const image = element("img", { src: face.image, width: 128, height: 128, alt: `Example ${index + 1}: somebody who does not exist` });
          const act = () => view.example(face);
          return element("li", { className: "face" }, element("button", { type: "button", onclick: act }, image));
        }),
      );
    } catch (error) {
      this.examples = null;
      this.tell({ drawing: error });
    }
  }

  /**
   * Read something: the result of `work` (signal). Where it fails, null, with its problem on the page until something
   * else is read; undefined where a newer reading of the same `place` took over.
   */
  async reading(place, work) {
    this.drawing.stop();
    this.busy(true);
    this.tell({ reading: null });
    this.places[place] ??= new Latest();
    let found = null;
    try {
      found = await this.places[place].run(work);
    } catch (error) {
      this.tell({ reading: error });
    }
    if (found !== undefined) this.busy(false);
    return found;
  }

  busy(is) {
    stage.ariaBusy = String(is);
  }

  /** Show what went wrong in `reading` or `drawing`, or with null that nothing does any more. */
  tell(news) {
    this.problems = { ...this.problems, ...news };
    const error = this.problems.reading ?? this.problems.drawing;
    if (error && !(error instanceof Problem)) console.error(error);
    const text = error instanceof Problem ? error.message : error ? `An error of this page: ${error.message}` : "";
    if (problem.textContent !== text) problem.textContent = text;
  }
}

function showStrip(blend) {
  const strip = byId("strip");
  strip.replaceChildren(
    ...blend.strip().map(({ image, at }) => {
      const picture = element("img", { src: image, width: 128, height: 128, alt: `${Math.round(100 * at)} % of the way` });
      const act = () => {
        byId("way").value = at;
        blend.show();
      };
      return element("li", {}, element("button", { type: "button", onclick: act }, picture));
    }),
  );
}

/** Put the values of the sliders beside them. */
function showControls() {
  byId("strength-value").textContent = Number(byId("strength").value).toFixed(2);
  byId("count-value").textContent = byId("count").value;
}

function setSeed(seed, from) {
  const whole = Math.min(Number.MAX_SAFE_INTEGER, Math.max(0, Math.floor(Number(seed)) || 0));
  if (from !== "seed-number") byId("seed-number").value = whole;
  byId("seed").value = whole;
}

function askToken(again) {
  const [dialog, form, input] = ["token", "token-form", "token-input"].map(byId);
  byId("token-words").textContent = again ? "That was not it." : "It was chosen when the server was started.";
  input.value = "";
  dialog.showModal();
  return new Promise((done) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      done(input.value);
      dialog.close();
    };
    dialog.onclose = () => done(null);
    byId("token-close").onclick = () => dialog.close();
  });
}

const app = new App();
const settle = new Latest();

byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("controls").addEventListener("input", ({ target }) => {
  if (target.id.startsWith("seed")) setSeed(target.value, target.id);
  showControls();
  settle.run((signal) => pause(SETTLE, signal).then(() => app.draw()));
});
byId("seed-number").addEventListener("change", ({ target }) => setSeed(target.value));
byId("seed-new").addEventListener("click", () => {
  setSeed(newSeed());
  app.draw();
});

tabs.forEach((tab, place) => {
  tab.addEventListener("click", () => app.open(tab.dataset.view));
  tab.addEventListener("keydown", ({ key }) => {
    const steps = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: -1 };
    if (!(key in steps)) return;
    const next = tabs.at(steps[key] % tabs.length);
    next.focus();
    app.open(next.dataset.view);
  });
});
addEventListener("popstate", () => {
  const asked = location.hash.slice(1);
  if (app.current) app.open(Object.hasOwn(app.views, asked) ? asked : "random");
});

/** A file that was dropped or pasted anywhere: vectors by their name, all else is a photo, or should be. */
function take(file) {
  if (!app.current) return;
  if (/\.(npy|json|csv|tsv|txt)$/i.test(file.name)) app.views.embedding.read(file);
  else if (app.model.photos.available) app.views.photo.read(file);
  else app.open("photo");
}

document.querySelectorAll(".slot").forEach((slot, place) => {
  onDrop(slot, (file) => app.model.photos.available && app.views.blend.read(place, file));
});
onDrop(document.documentElement, take);
addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files[0]) take(clipboardData.files[0]);
});

setSeed(0);
showControls();
if (cameraProblem()) {
  for (const button of document.querySelectorAll("#photo-camera, .slot-camera")) button.title = cameraProblem();
}
app.start();
