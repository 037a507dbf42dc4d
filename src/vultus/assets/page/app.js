// The page: tabs, controls, and the area (#stage) where the views show faces.

import { Api, Latest, Problem, pause } from "./api.js";
import { editOf, setEdits, showEditValues, showEdits } from "./edits.js";
import { cameraProblem, onDrop } from "./photos.js";
import { BlendView } from "./blend.js";
import { bytesOf, newSeed, tokenOf } from "./people.js";
import { element, legend, measures, save, showFaces } from "./tiles.js";
import { EmbeddingView, PhotoView, RandomView, examples } from "./views.js";
import { zip } from "./zip.js";

const SETTLE = 120; // ms without a change of a slider before faces are generated

const byId = (id) => document.getElementById(id);
const tabs = [...document.querySelectorAll("[role=tab]")];
const [stage, status, errorLine] = ["stage", "status", "error"].map(byId);

class App {
  drawing = new Latest();
  inputs = {}; // name of an input -> Latest: what is being read
  errors = {}; // of "reading" and "drawing"
  views = { random: new RandomView(this), photo: new PhotoView(this), blend: new BlendView(this), embedding: new EmbeddingView(this) };
  shown = new Map(); // view -> what it showed last, and the key of its input and controls
  api = new Api({ askToken, onWait: (seconds) => (status.textContent = `The server is busy; trying again in ${seconds} s.`) });

  async start() {
    try {
      this.model = await this.api.model();
    } catch (error) {
      for (const part of document.querySelectorAll(".source, .settings")) part.hidden = true;
      byId("panel").hidden = false;
      return this.showErrors({ reading: error });
    }
    for (const view of Object.values(this.views)) view.begin?.(this.model);
    const { id, resolution, licence, limits, random } = this.model;
    byId("model").textContent = `Model ${id}, ${resolution}×${resolution} pixels${licence ? `; licence: ${licence}` : ""}.`;
    byId("count").max = Math.min(24, limits.faces);
    byId("count").value = Math.min(matchMedia("(max-width: 40rem)").matches ? 4 : 8, limits.faces);
    byId("panel").hidden = false;
    showEdits(this.model.edits);
    showControls();
    await this.follow();
  }

  /** Show what the address names: a tab (#random), or the settings and people of a link (#random?seed=7&...). */
  async follow() {
    const [name, query] = location.hash.slice(1).split("?");
    if (this.current && name === "stage") return; // "Skip to the faces"
    const view = Object.hasOwn(this.views, name) ? name : this.model.random.available ? "random" : "embedding";
    this.open(view, !query);
    if (query) {
      const params = new URLSearchParams(query);
      for (const id of ["strength", "count"]) byId(id).value = params.get(id) ?? byId(id).value;
      setSeed(params.get("seed"));
      setEdits(params.get("edit"));
      showControls();
      await this.reading("link", async (signal) => this.current.restore(params, signal));
      this.linked = this.state;
      await this.draw();
      const { id } = this.model;
      if ((params.get("model") ?? id) !== id) {
        this.showErrors({ link: new Problem(`This link is of the model ${params.get("model")}; this server has ${id}, so the faces differ.`) });
      }
    }
  }

  /** A fragment of the address that shows the same faces again. */
  link() {
    const { view = this.name, people, more = [] } = this.current.link();
    const settings = Object.entries({ ...this.controls, model: this.model.id });
    return `#${view}?${new URLSearchParams([...settings, ...people.map((person) => ["who", tokenOf(person)]), ...more])}`;
  }

  async copyLink() {
    history.replaceState(null, "", this.link());
    this.linked = this.state;
    const withEmbeddings = this.current.link().people.some(({ seed }) => seed === undefined);
    const about = withEmbeddings ? " It contains embeddings of faces: whoever has it can generate them." : "";
    try {
      await navigator.clipboard.writeText(location.href);
      status.textContent = `Link copied.${about}`;
    } catch {
      status.textContent = `The link is in the address bar.${about}`; // no clipboard over HTTP, or no permission
    }
  }

  /** The images that are shown: [{ image, file }]. */
  files() {
    const { blend, faces = [] } = this.shown.get(this.current) ?? {};
    return blend ? blend.strip() : faces;
  }

  saveAll() {
    const files = this.files().map(({ image, file }) => ({ name: file, data: bytesOf(image.split(",")[1]) }));
    save(`vultus-${this.name}-${this.controls.seed}.zip`, zip(files));
  }

  get controls() {
    const [seed, count, strength] = ["seed-number", "count", "strength"].map((id) => Number(byId(id).value));
    const edit = editOf();
    return edit ? { seed, count, strength, edit } : { seed, count, strength };
  }

  /** What the faces of the current view depend on. */
  get state() {
    return JSON.stringify([this.current.input(), this.controls]);
  }

  /** Open a tab; it shows the faces that it showed last until `draw` has generated others. */
  open(name, draw = true) {
    if (this.current === this.views[name]) return;
    this.current = this.views[name];
    this.name = name;
    for (const input of Object.values(this.inputs)) input.stop();
    for (const tab of tabs) {
      const chosen = tab.dataset.view === name;
      tab.ariaSelected = String(chosen);
      tab.tabIndex = chosen ? 0 : -1;
    }
    byId("panel").setAttribute("aria-labelledby", `tab-${name}`);
    byId("panel").dataset.view = name;
    for (const part of document.querySelectorAll("[data-for]")) part.hidden = part.dataset.for !== name;
    if (location.hash.slice(1).split("?")[0] !== name) history.pushState(null, "", `#${name}`);
    this.showErrors({ reading: null, drawing: null, link: null });
    this.render(this.shown.get(this.current) ?? {});
    if (draw) this.draw();
  }

  /** Generate the faces of the current view, unless they are shown already; a later call cancels this one. */
  async draw() {
    const view = this.current;
    const key = this.state;
    if (this.shown.get(view)?.key === key && this.shown.get(view).complete) return this.drawing.stop(), this.busy(false);
    this.busy(true);
    this.started = performance.now();
    this.key = key;
    if (this.linked !== key && location.hash.includes("?")) {
      // The link in the address bar is no longer what is shown.
      history.replaceState(null, "", `#${this.name}`);
      this.showErrors({ link: null });
    }
    try {
      const finished = await this.drawing.run((signal) => view.draw(this.controls, signal).then(() => true));
      if (!finished) return; // cancelled by a later call
      this.shown.get(view).complete = true;
      // A view may choose its input while it draws: the blend takes two random people.
      this.shown.get(view).key = this.state;
      this.showErrors({ drawing: null });
    } catch (error) {
      this.showErrors({ drawing: error });
    }
    this.busy(false);
  }

  /** Show the result of a view: { title, hint?, faces?, count?, blend?, back?, empty?, photo?, compared? }. */
  present(view, result) {
    const count = result.faces?.length ?? result.count ?? 0;
    const seconds = ((performance.now() - this.started) / 1000).toFixed(1);
    const previous = this.shown.get(view);
    // Similarities follow the faces; the time shown is that of the faces.
    const timing = count ? `${count} ${count === 1 ? "face" : "faces"} in ${seconds} s` : "";
    const message = previous?.started === this.started ? previous.message : timing;
    this.shown.set(view, { ...result, key: this.key, started: this.started, message });
    if (view !== this.current) return;
    this.busy(false); // similarities may follow, but the faces are final
    this.render(this.shown.get(view));
  }

  render({ title = "", hint = this.current.hint, message = "", faces = [], blend, back, empty, photo, compared }) {
    byId("stage-title").textContent = title;
    byId("controls-hint").textContent = hint;
    byId("count-control").hidden = !this.current.counted;
    byId("back").hidden = !back;
    byId("copy-link").hidden = !blend && !faces.length;
    byId("save-all").hidden = !blend && faces.length < 2;
    if (status.textContent !== message) status.textContent = message;
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
    byId("empty-text").textContent = "";
    try {
      const faces = await examples(this);
      if (view !== this.current) return;
      byId("empty-text").textContent = faces.length ? view.emptyText : "";
      byId("examples").replaceChildren(
        ...faces.map((face, index) => {
          const image = element("img", { src: face.image, width: 128, height: 128, alt: `Example ${index + 1}: a person who does not exist` });
          const act = () => view.example(face);
          return element("li", { className: "face" }, element("button", { type: "button", onclick: act }, image));
        }),
      );
    } catch (error) {
      this.examples = null;
      this.showErrors({ drawing: error });
    }
  }

  /**
   * Read an input: resolves to the result of `read(signal)`; to null if it fails, with the error shown until something
   * else is read; to undefined if it was cancelled by a later reading of the same `input`.
   */
  async reading(input, read) {
    this.drawing.stop();
    this.busy(true);
    this.showErrors({ reading: null });
    this.inputs[input] ??= new Latest();
    let result = null;
    try {
      result = await this.inputs[input].run(read);
    } catch (error) {
      this.showErrors({ reading: error });
    }
    if (result !== undefined) this.busy(false);
    return result;
  }

  busy(is) {
    stage.ariaBusy = String(is);
  }

  /** Show the error in `reading` an input, `drawing` faces or of a `link`; null clears it. */
  showErrors(changes) {
    this.errors = { ...this.errors, ...changes };
    const error = this.errors.reading ?? this.errors.drawing ?? this.errors.link;
    if (error && !(error instanceof Problem)) console.error(error);
    const text = error instanceof Problem ? error.message : error ? `Error in this page: ${error.message}` : "";
    if (errorLine.textContent !== text) errorLine.textContent = text;
  }
}

function showStrip(blend) {
  const strip = byId("strip");
  strip.replaceChildren(
    ...blend.strip().map(({ image, position }) => {
      const alt = `${Math.round(100 * position)} % of the way`;
      const thumbnail = element("img", { src: image, width: 128, height: 128, alt });
      const act = () => {
        byId("way").value = position;
        blend.show();
      };
      return element("li", {}, element("button", { type: "button", onclick: act }, thumbnail));
    }),
  );
}

/** Show the values of the sliders beside them. */
function showControls() {
  byId("strength-value").textContent = Number(byId("strength").value).toFixed(2);
  byId("count-value").textContent = byId("count").value;
  showEditValues();
}

function setSeed(seed, from) {
  const whole = Math.min(Number.MAX_SAFE_INTEGER, Math.max(0, Math.floor(Number(seed)) || 0));
  if (from !== "seed-number") byId("seed-number").value = whole;
  byId("seed").value = whole;
}

function askToken(again) {
  const [dialog, form, input] = ["token", "token-form", "token-input"].map(byId);
  byId("token-hint").textContent = again ? "This token is wrong." : "It was set when the server was started.";
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
byId("copy-link").addEventListener("click", () => app.copyLink());
byId("save-all").addEventListener("click", () => app.saveAll());
byId("edit-reset").addEventListener("click", () => {
  setEdits("");
  showControls();
  app.draw();
});
byId("seed-new").addEventListener("click", () => {
  setSeed(newSeed(app.controls.seed));
  app.draw();
});

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => app.open(tab.dataset.view));
  tab.addEventListener("keydown", ({ key }) => {
    const steps = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 };
    if (!(key in steps)) return;
    const next = tabs.at(steps[key] % tabs.length);
    next.focus();
    app.open(next.dataset.view);
  });
});
addEventListener("popstate", () => {
  if (app.current) app.follow();
});

/** Files that were dropped or pasted anywhere: embeddings by the name, otherwise photos. */
function take(files) {
  if (!app.current) return;
  if (/\.(npy|json|csv|tsv|txt)$/i.test(files[0].name)) app.views.embedding.read(files[0]);
  else if (app.model.photos.available) app.views.photo.read(files);
  else app.open("photo");
}

onDrop(document.documentElement, take);
addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) take([...clipboardData.files]);
});

setSeed(0);
showControls();
if (cameraProblem()) {
  for (const button of document.querySelectorAll("#photo-camera, .slot-camera")) button.title = cameraProblem();
}
app.start();
