// Client of the HTTP API of the server that sent this page. No other address is requested.

const MAX_TRIES = 6;
const TOKEN_KEY = "vultus-token";

/** An error whose message is one line for the user. */
export class Problem extends Error {}

/** Wait; rejects at once when the signal aborts. */
export function pause(milliseconds, signal) {
  return new Promise((done, fail) => {
    const timer = setTimeout(done, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), fail(signal.reason)), { once: true });
    if (signal?.aborted) fail(signal.reason);
  });
}

/** Runs one task at a time: a new task cancels the previous one, which then resolves to undefined. */
export class Latest {
  stop() {
    this.controller?.abort();
  }

  async run(task) {
    this.stop();
    const { signal } = (this.controller = new AbortController());
    try {
      return await task(signal);
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  }
}

async function detail(response) {
  try {
    const text = (await response.json()).detail;
    if (typeof text === "string") return text;
  } catch {
    // Not a response of vultus, but for instance of a proxy.
  }
  return `The server responded with status ${response.status} ${response.statusText}`.trim();
}

export class Api {
  /** `askToken(again)` resolves to a token, or to null if the user cancels; `onWait(seconds)` is called before a retry. */
  constructor({ askToken, onWait }) {
    this.askToken = askToken;
    this.onWait = onWait;
    this.token = sessionStorage.getItem(TOKEN_KEY);
  }

  async json(path, { body, type, signal } = {}) {
    for (let left = MAX_TRIES; ; left--) {
      const headers = { Accept: "application/json" };
      if (type) headers["Content-Type"] = type;
      const sent = this.token;
      if (sent) headers.Authorization = `Bearer ${sent}`;
      let response;
      try {
        response = await fetch(path, { method: body ? "POST" : "GET", body, headers, signal });
      } catch (error) {
        if (signal?.aborted) throw error;
        throw new Problem("The server does not respond. Is vultus serve still running?");
      }
      if (response.ok) return response.json();
      if (response.status === 401) {
        await this.newToken(sent);
      } else if (response.status === 429 && left > 1) {
        const seconds = Math.min(30, Number(response.headers.get("Retry-After")) || 1);
        this.onWait(seconds);
        await pause(seconds * 1000, signal);
      } else {
        throw new Problem(await detail(response));
      }
    }
  }

  /** Ask for a token, once for all requests that were rejected with the same one. */
  async newToken(rejected) {
    if (this.token !== rejected) return;
    this.asking ??= this.askToken(Boolean(rejected)).finally(() => (this.asking = null));
    const token = await this.asking;
    if (!token) throw new Problem("This server requires a token; reload the page to enter it.");
    this.token = token;
    sessionStorage.setItem(TOKEN_KEY, token);
  }

  post(path, value, signal) {
    return this.json(path, { body: JSON.stringify(value), type: "application/json", signal });
  }

  model() {
    return this.json("v1/model");
  }

  random({ seed, count, strength, edit = "" }, signal, start = 0) {
    return this.json(`v1/random?${new URLSearchParams({ seed, num: count, noise_strength: strength, start, edit })}`, { signal });
  }

  /** Faces of `people`: { embeddings, start?, weights? }; with weights those of the weighted mean. */
  faces(people, { seed, count, strength, edit }, signal, similarity = false) {
    return this.post("v1/faces", { ...people, num: count, seed, noise_strength: strength, similarity, edit }, signal);
  }

  /** Faces of the largest face of a photo, requested with the photo itself: dlib compares with the photo. */
  facesOfPhoto(photo, { seed, count, strength, edit = "" }, signal) {
    const query = new URLSearchParams({ seed, num: count, noise_strength: strength, similarity: true, edit });
    return this.json(`v1/faces?${query}`, { body: photo, type: photo.type, signal });
  }

  /** The largest face of a photo, or with `face` "all" every face. */
  embedding(photo, signal, face = "largest") {
    return this.json(`v1/embeddings?face=${face}`, { body: photo, type: photo.type, signal });
  }

  between(a, b, steps, { seed, strength, edit }, signal) {
    return this.post("v1/between", { a, b, steps, seed, noise_strength: strength, edit }, signal);
  }
}
