// The HTTP API of the server that this page came from; no other address is ever asked.

const TRIES = 6;
const KEY = "vultus-token";

/** What went wrong, in one plain line to show. */
export class Problem extends Error {}

/** Wait; rejects at once when the signal aborts. */
export function pause(milliseconds, signal) {
  return new Promise((done, fail) => {
    const timer = setTimeout(done, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), fail(signal.reason)), { once: true });
    if (signal?.aborted) fail(signal.reason);
  });
}

/** Runs one thing at a time: a newer one cancels the one before, which then ends without result or error. */
export class Latest {
  stop() {
    this.controller?.abort();
  }

  async run(work) {
    this.stop();
    const { signal } = (this.controller = new AbortController());
    try {
      return await work(signal);
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  }
}

async function detail(response) {
  try {
    const said = (await response.json()).detail;
    if (typeof said === "string") return said;
  } catch {
    // Not an answer of vultus: a proxy's, perhaps.
  }
  return `The server answers ${response.status} ${response.statusText}`.trim();
}

export class Api {
  /** `askToken` (again: boolean) -> a token, or null where the user gives up; `onWait` is told how long a retry waits. */
  constructor({ askToken, onWait }) {
    this.askToken = askToken;
    this.onWait = onWait;
    this.token = sessionStorage.getItem(KEY);
  }

  async json(path, { body, type, signal } = {}) {
    for (let left = TRIES; ; left--) {
      const headers = { Accept: "application/json" };
      if (type) headers["Content-Type"] = type;
      const sent = this.token;
      if (sent) headers.Authorization = `Bearer ${sent}`;
      let response;
      try {
        response = await fetch(path, { method: body ? "POST" : "GET", body, headers, signal });
      } catch (error) {
        if (signal?.aborted) throw error;
        throw new Problem("The server does not answer. Is vultus serve still running?");
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

  /** Several requests may be refused at once: they share one question. */
  async newToken(refused) {
    if (this.token !== refused) return;
    this.asking ??= this.askToken(Boolean(refused)).finally(() => (this.asking = null));
    const token = await this.asking;
    if (!token) throw new Problem("This server asks for a token; reload the page to give it.");
    this.token = token;
    sessionStorage.setItem(KEY, token);
  }

  post(path, value, signal) {
    return this.json(path, { body: JSON.stringify(value), type: "application/json", signal });
  }

  model() {
    return this.json("v1/model");
  }

  random({ seed, count, strength }, signal) {
    return this.json(`v1/random?${new URLSearchParams({ seed, num: count, noise_strength: strength })}`, { signal });
  }

  faces(c, { seed, count, strength }, signal, similarity = false) {
    return this.post("v1/faces", { embeddings: [c], num: count, seed, noise_strength: strength, similarity }, signal);
  }

  /** The same faces from the photo itself, which the judge needs to compare. */
  facesOfPhoto(photo, { seed, count, strength }, signal) {
    const query = new URLSearchParams({ seed, num: count, noise_strength: strength, similarity: true });
    return this.json(`v1/faces?${query}`, { body: photo, type: photo.type, signal });
  }

  embedding(photo, signal) {
    return this.json("v1/embeddings", { body: photo, type: photo.type, signal });
  }

  between(a, b, steps, { seed, strength }, signal) {
    return this.post("v1/between", { a, b, steps, seed, noise_strength: strength }, signal);
  }
}
