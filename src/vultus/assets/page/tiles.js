// The list of faces: images, similarities and buttons.

const MEASURES = {
  facenet: { name: "FaceNet", max: 1, format: (value) => value.toFixed(2), text: "FaceNet computes the embeddings that the network was trained with, so its score (a cosine) is optimistic." },
  // The API returns minus the distance, so that larger is more similar; the page shows the distance.
  dlib: { name: "dlib", max: 0, format: (value) => (-value).toFixed(2), text: "dlib is an independent face recognition network that was not used in training; its score is a distance." },
};

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function verdict(value, { same_person: same, different_people: different }) {
  if (value > same.high) return "more similar than most photos of one person";
  if (value >= same.low) return "within the range of two photos of one person";
  if (value > different.high) return "between the ranges of two photos of one person and of two strangers";
  return "as different as two strangers";
}

/** A scale from different (left) to identical (right), with the ranges of real photos shaded. */
function scale(key, about, value) {
  const { name, max, format } = MEASURES[key];
  const min = about.different_people.low - 0.05 * (max - about.different_people.low);
  const position = (score) => `${(100 * Math.min(1, Math.max(0, (score - min) / (max - min)))).toFixed(1)}%`;
  const band = (className, { low, high }) => {
    const node = element("i", { className });
    node.style.left = position(low);
    node.style.right = `calc(100% - ${position(high)})`;
    return node;
  };
  const bar = element("span", { className: "scale" }, band("strangers", about.different_people));
  bar.append(band("same", about.same_person));
  if (value === undefined) return row(name, bar, "");
  const mark = element("i", { className: "mark" });
  mark.style.left = position(value);
  bar.append(mark);
  bar.setAttribute("role", "img");
  const label = `${name} ${key === "dlib" ? "distance " : ""}${format(value)}: ${verdict(value, about)}`;
  bar.setAttribute("aria-label", label);
  return row(name, bar, format(value), label);
}

function row(name, bar, value, title = "") {
  return element(
    "div",
    { className: "score", title },
    element("span", { className: "score-name", textContent: name }),
    bar,
    element("span", { className: "score-value", textContent: value, ariaHidden: "true" }),
  );
}

/** The measures that are available: FaceNet compares with any embedding, dlib only with a photo. */
export function measures(similarity, photo) {
  return Object.keys(MEASURES).filter((key) => similarity[key].available && (key !== "dlib" || photo));
}

/** Explain the scales, or say why there are none. `photo`: the faces are of a photo. */
export function legend(container, similarity, photo) {
  container.replaceChildren();
  const available = measures(similarity, photo);
  if (available.length) {
    const text = available.map((key) => MEASURES[key].text).join(" ");
    container.append(
      element("p", {}, element("strong", { textContent: "How similar? " }), `Farther right is more similar. ${text}`),
      element(
        "p",
        { className: "keys" },
        element("span", {}, element("i", { className: "key same" }), "two photos of one person"),
        element("span", {}, element("i", { className: "key strangers" }), "two strangers"),
        element("span", { className: "hint", textContent: "(90 % of real pairs)" }),
      ),
    );
  }
  for (const [name, about] of Object.entries(similarity)) {
    if (!about.available && (name !== "dlib" || photo)) {
      const reason = name === "facenet" ? "the tab Photo says what is missing" : about.missing;
      container.append(element("p", { className: "hint", textContent: `${MEASURES[name].name} similarity is not available: ${reason}.` }));
    }
  }
  container.hidden = !container.childElementCount;
}

function tile() {
  const image = element("img", { width: 128, height: 128, decoding: "async" });
  const scores = element("div", { className: "scores" });
  const actions = element("div", { className: "actions" });
  return element("li", { className: "face" }, image, scores, actions);
}

/**
 * Show faces in a list, reusing its elements so that the layout does not jump.
 * A face: { image, alt, file, scores?, actions?: [{ text, label, act }] }. `keys`: the measures that are shown; their
 * scores may follow later.
 */
export function showFaces(list, faces, similarity, keys) {
  while (list.children.length > faces.length) list.lastChild.remove();
  while (list.children.length < faces.length) list.append(tile());
  faces.forEach((face, index) => {
    const [image, scores, actions] = list.children[index].children;
    if (image.src !== face.image) image.src = face.image;
    image.alt = face.alt;
    scores.replaceChildren(...keys.map((key) => scale(key, similarity[key], face.scores?.[key] ?? undefined)));
    const save = element("a", { href: face.image, download: face.file, className: "save", textContent: face.actions ? "Save" : "Save PNG" });
    save.setAttribute("aria-label", `Save ${face.alt} as PNG`);
    const buttons = (face.actions ?? []).map(({ text, label, act }) => {
      const button = element("button", { type: "button", textContent: text, onclick: act });
      button.setAttribute("aria-label", label);
      return button;
    });
    actions.replaceChildren(...buttons, save);
  });
}

/** Let the user save a Blob as a file. */
export function save(name, blob) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
