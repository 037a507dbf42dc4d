// Photos: made fit to send, from a file or from the camera.

import { Problem } from "./api.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];
const SIDE = 2048; // of what is sent instead of a picture that is too large, or of a kind that the server does not read
const byId = (id) => document.getElementById(id);

function toJpeg(picture, width, height) {
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
}

/** The file as it is where the server reads it, else as a JPEG; throws Problem where this is no picture. */
export async function fitToSend(file, { body_bytes: most, megapixels }) {
  if (!file.size) throw new Problem("This file is empty.");
  if (KINDS.includes(file.type) && file.size <= most) return file;
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    const large = file.size > most ? ` of at most ${Math.floor(most / 1e6)} MB` : "";
    throw new Problem(`This is not a picture that can be read here; give a JPEG, PNG or WebP${large}.`);
  }
  if (picture.width * picture.height > megapixels * 1e6) {
    throw new Problem(`This picture has more than ${megapixels} megapixels; give a smaller one.`);
  }
  return toJpeg(picture, picture.width, picture.height);
}

export function cameraProblem() {
  return navigator.mediaDevices?.getUserMedia ? "" : "The camera works on localhost or by https only.";
}

const REFUSED = {
  NotAllowedError: "The camera was not allowed; allow it for this page in the browser and try again.",
  NotFoundError: "No camera was found.",
  NotReadableError: "The camera is in use by something else.",
};

/** Open the camera in a dialog; a JPEG, or null where the user cancels. */
export async function takePicture() {
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
      .then(async (found) => {
        stream = found;
        if (!open) return stop();
        video.srcObject = stream;
        await video.play();
        take.disabled = false;
        take.focus();
      })
      .catch((error) => {
        problem.textContent = REFUSED[error.name] ?? `The camera does not start (${error.name}).`;
      });
  }
  function stop() {
    stream?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  }
  const picture = await Promise.race([taken, closed]);
  stop();
  if (open) dialog.close();
  return picture;
}

/** Call `use` with a picture that is dropped on `zone`. */
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
    const file = event.dataTransfer.files[0];
    if (file) use(file);
  });
}
