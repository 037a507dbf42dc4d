// Faces as a list, each with what can be done with it and how alike it is.

const MEASURES = {
  facenet: { name: "FaceNet", most: 1, shown: (value) => value.toFixed(2), words: "FaceNet gave the numbers that the face is drawn from; its cosine flatters." },
  // The API gives minus the distance, so that more is more alike; people expect the distance.
  dlib: { name: "dlib", most: 0, shown: (value) => (-value).toFixed(2), words: "dlib is a judge that no training has seen; its number is a distance." },
};

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function verdict(value, { same_person: same, different_people: different }) {
  if (value > same.high) return "closer than most photos of one person";
  if (value >= same.low) return "within the range of two photos of one person";
  if (value > different.high) return "below the range of two photos of one person, above that of strangers";
  return "as far as strangers";
}

/** A scale from strangers (left) to the same (right), with the ranges of real photos shaded. */
function scale(key, about, value) {
  const { name, most, shown } = MEASURES[key];
  const least = about.different_people.low - 0.05 * (most - about.different_people.low);
  const place = (at) => `${(100 * Math.min(1, Math.max(0, (at - least) / (most - least)))).toFixed(1)}%`;
  const band = (kind, { low, high }) => {
    const made = element("i", { className: kind });
    made.style.left = place(low);
    made.style.right = `calc(100% - ${place(high)})`;
    return made;
  };
  const bar = element("span", { className: "scale" }, band("strangers", about.different_people));
  bar.append(band("same", about.same_person));
  if (value === undefined) return row(name, bar, "");
  const mark = element("i", { className: "mark" });
  mark.style.left = place(value);
  bar.append(mark);
  bar.setAttribute("role", "img");
  const label = `${name} ${key === "dlib" ? "distance " : ""}${shown(value)}: ${verdict(value, about)}`;
  bar.setAttribute("aria-label", label);
  return row(name, bar, shown(value), label);
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

/** What can compare here: FaceNet a face with any embedding, the judge only with a photo. */
export function measures(similarity, photo) {
  return Object.keys(MEASURES).filter((key) => similarity[key].available && (key !== "dlib" || photo));
}

/** Explain the scales, or say why there are none. `photo`: the judge can compare. */
export function legend(place, similarity, photo) {
  place.replaceChildren();
  const there = measures(similarity, photo);
  if (there.length) {
    const words = there.map((key) => MEASURES[key].words).join(" ");
    place.append(
      element("p", {}, element("strong", { textContent: "How alike? " }), `Farther right is more alike. ${words}`),
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
      const why = name === "facenet" ? "the tab Photo says what is missing" : about.missing;
      place.append(element("p", { className: "hint", textContent: `${MEASURES[name].name} cannot compare here: ${why}.` }));
    }
  }
  place.hidden = !place.childElementCount;
}

function tile() {
  const image = element("img", { width: 128, height: 128, decoding: "async" });
  const scores = element("div", { className: "scores" });
  const actions = element("div", { className: "actions" });
  return element("li", { className: "face" }, image, scores, actions);
}

/**
 * Show faces in a list, in the elements that are there already, so that nothing jumps.
 * Each: { image, alt, file, scores?, actions: [{ words, label, act }] }; `keys` are the scores that are there or to come.
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
    const buttons = (face.actions ?? []).map(({ words, label, act }) => {
      const button = element("button", { type: "button", textContent: words, onclick: act });
      button.setAttribute("aria-label", label);
      return button;
    });
    actions.replaceChildren(...buttons, save);
  });
}

/** Offer a file that holds `text`. */
export function save(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
