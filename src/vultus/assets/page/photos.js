// Photos from a file or the camera, converted to what the server accepts.

import { Problem } from "./api.js";

const ACCEPTED = ["image/png", "image/jpeg", "image/webp"];
const MAX_SIDE = 2048; // pixels, of images that are converted because they are too large or of another type
const byId = (id) => document.getElementById(id);

function toJpeg(source, width, height) {
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
}

/** The file itself if the server accepts it, else converted to JPEG; throws Problem if it is not an image. */
export async function toAccepted(file, { body_bytes: maxBytes, megapixels }) {
  if (!file.size) throw new Problem("This file is empty.");
  if (ACCEPTED.includes(file.type) && file.size <= maxBytes) return file;
  let image;
  try {
    image = await createImageBitmap(file);
  } catch {
    const limit = file.size > maxBytes ? ` of at most ${Math.floor(maxBytes / 1e6)} MB` : "";
    throw new Problem(`This file cannot be read as an image; choose a JPEG, PNG or WebP${limit}.`);
  }
  if (image.width * image.height > megapixels * 1e6) {
    throw new Problem(`This image has more than ${megapixels} megapixels; choose a smaller one.`);
  }
  return toJpeg(image, image.width, image.height);
}

/** Why this page cannot use a camera; empty if it can. */
export function cameraProblem() {
  return navigator.mediaDevices?.getUserMedia ? "" : "The camera works only on localhost or over HTTPS.";
}

const CAMERA_ERRORS = {
  NotAllowedError: "Camera access was denied; allow it for this page in the browser and try again.",
  NotFoundError: "No camera was found.",
  NotReadableError: "The camera is in use by another program.",
};

/** Open the camera in a dialog; resolves to a JPEG, or to null if the user cancels. */
export async function takePhoto() {
  const [dialog, video, take, problem] = ["camera", "camera-video", "camera-take", "camera-problem"].map(byId);
  problem.textContent = cameraProblem();
  take.disabled = true;
  dialog.showModal();
  let stream;
  let open = true;
  const closed = new Promise((done) => {
    dialog.addEventListener("close", () => ((open = false), done(null)), { once: true });
  });
  const taken = new Promise((done) => {
    take.onclick = () => done(toJpeg(video, video.videoWidth, video.videoHeight));
  });
  byId("camera-close").onclick = () => dialog.close();
  if (!problem.textContent) {
    navigator.mediaDevices
      .getUserMedia({ video: { facingMode: "user", width: { ideal: 1280 } }, audio: false })
      .then(async (opened) => {
        stream = opened;
        if (!open) return stop();
        video.srcObject = stream;
        await video.play();
        take.disabled = false;
        take.focus();
      })
      .catch((error) => {
        problem.textContent = CAMERA_ERRORS[error.name] ?? `The camera could not be started (${error.name}).`;
      });
  }
  function stop() {
    stream?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  }
  const photo = await Promise.race([taken, closed]);
  stop();
  if (open) dialog.close();
  return photo;
}

/** Call `use` with the files that are dropped on `zone`. */
export function onDrop(zone, use) {
  for (const name of ["dragenter", "dragover"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      zone.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    const files = [...event.dataTransfer.files];
    if (files.length) use(files);
  });
}
