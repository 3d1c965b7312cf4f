/** Triton over HTTP: its binary tensor extension, what can go wrong as one type of error, and patience. */

import { Clock } from "./clock.js";

const LENGTH_BYTES = 4; // that stand before each string, little-endian
const RETRY = { first: 0.1, factor: 2, longest: 1 }; // pauses, in seconds
const TIMEOUT = 10; // seconds that one attempt at a chunk, a window or a piece of voice may take
const RECOVERY = 15; // seconds for which a lost server is asked again, by whoever need not insist

/**
 * What went wrong. `unavailable`: nothing answers, or what answered is gone; `overloaded`: no place, or too many
 * requests; `unauthenticated`: no key, or an unknown one; `forbidden`; `unknown`: no such avatar; `invalid`: the
 * request asks for what can't be had; `failed`: the server failed at a sound request, or is no talksplat server.
 * @typedef {"unavailable" | "overloaded" | "unauthenticated" | "forbidden" | "unknown" | "invalid" | "failed"} Kind
 */

/** The only error of the page's own. */
export class TalksplatError extends Error {
  /**
   * @param {Kind} kind
   * @param {string} message
   * @param {number} [retryAfter] seconds after which it is worth asking again
   */
  constructor(kind, message, retryAfter) {
    super(message);
    this.name = "TalksplatError";
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

/** @typedef {{name: string, datatype: "FP32" | "INT64" | "BYTES", shape: number[], data: Uint8Array<ArrayBuffer>}} Tensor */

/**
 * @param {string} name
 * @param {Float32Array} values
 * @param {number[]} [shape]
 * @returns {Tensor}
 */
export function floats(name, values, shape = [values.length]) {
  return { name, datatype: "FP32", shape, data: new Uint8Array(values.slice().buffer) }; // browsers are little-endian
}

/**
 * @param {string} name
 * @param {number} value
 * @param {number[]} shape
 * @returns {Tensor}
 */
export function integer(name, value, shape) {
  const data = new Uint8Array(8);
  new DataView(data.buffer).setBigInt64(0, BigInt(value), true);
  return { name, datatype: "INT64", shape, data };
}

/**
 * @param {string} name
 * @param {string} value
 * @param {number[]} shape
 * @returns {Tensor}
 */
export function string(name, value, shape) {
  const text = new TextEncoder().encode(value);
  const data = new Uint8Array(LENGTH_BYTES + text.length);
  new DataView(data.buffer).setUint32(0, text.length, true);
  data.set(text, LENGTH_BYTES);
  return { name, datatype: "BYTES", shape, data };
}

/**
 * A request's body: JSON, then the tensors' bytes.
 * @param {{id: string, inputs: Tensor[], outputs: string[], parameters?: Record<string, string | number>}} request
 */
export function encode({ id, inputs, outputs, parameters = {} }) {
  const header = new TextEncoder().encode(
    JSON.stringify({
      id,
      parameters,
      inputs: inputs.map(({ name, datatype, shape, data }) => ({
        name,
        datatype,
        shape,
        parameters: { binary_data_size: data.length },
      })),
      outputs: outputs.map(name => ({ name, parameters: { binary_data: true } })),
    }),
  );
  const body = new Uint8Array(inputs.reduce((size, { data }) => size + data.length, header.length));
  body.set(header);
  let end = header.length;
  for (const { data } of inputs) {
    body.set(data, end);
    end += data.length;
  }
  return { body, headerLength: header.length };
}

/** An answer's outputs. */
export class Answer {
  /** @type {Map<string, {datatype: string, shape: number[], view: DataView<ArrayBuffer>}>} */
  #outputs = new Map();

  /**
   * @param {ArrayBuffer} body
   * @param {number} headerLength of the JSON that stands before the tensors
   * @throws {TalksplatError} the answer is malformed
   */
  constructor(body, headerLength) {
    try {
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(body, 0, headerLength)));
      let end = headerLength;
      for (const { name, datatype, shape, parameters } of header.outputs) {
        const size = parameters.binary_data_size;
        this.#outputs.set(name, { datatype, shape, view: new DataView(body, end, size) });
        end += size;
      }
    } catch (error) {
      throw new TalksplatError("failed", `The server's answer is malformed: ${error}`);
    }
  }

  /** @param {string} name */
  floats(name) {
    const { view, count } = this.#output(name, "FP32");
    if (view.byteLength !== 4 * count) throw malformed(name);
    return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength)); // now aligned
  }

  /** @param {string} name */
  integer(name) {
    const { view, count } = this.#output(name, "INT64");
    if (view.byteLength !== 8 || count !== 1) throw malformed(name);
    return Number(view.getBigInt64(0, true));
  }

  /**
   * Views into the answer's bytes.
   * @param {string} name
   */
  strings(name) {
    const { view, count } = this.#output(name, "BYTES");
    const strings = [];
    let end = 0;
    while (end + LENGTH_BYTES <= view.byteLength) {
      const begin = end + LENGTH_BYTES;
      end = begin + view.getUint32(end, true);
      if (end > view.byteLength) throw malformed(name);
      strings.push(new Uint8Array(view.buffer, view.byteOffset + begin, end - begin));
    }
    if (strings.length !== count || end !== view.byteLength) throw malformed(name);
    return strings;
  }

  /** @param {string} name */
  text(name) {
    const strings = this.strings(name);
    if (strings.length !== 1) throw malformed(name);
    return new TextDecoder().decode(strings[0]);
  }

  /**
   * @param {string} name
   * @param {string} datatype
   */
  #output(name, datatype) {
    const output = this.#outputs.get(name);
    if (output?.datatype !== datatype) throw new TalksplatError("failed", `The server's answer lacks ${name}.`);
    return { view: output.view, count: output.shape.reduce((product, size) => product * size, 1) };
  }
}

/** @param {string} name */
function malformed(name) {
  return new TalksplatError("failed", `The server's output ${name} is malformed.`);
}

/**
 * The error for an HTTP status. Triton and the edge say what is wrong as JSON.
 * @param {number} status
 * @param {string} body
 * @param {string | null} retryAfter the header
 */
export function errorOf(status, body, retryAfter = null) {
  let said = body.slice(0, 300);
  try {
    said = String(JSON.parse(body).error ?? said);
  } catch {} // an intermediary's page
  said = said.replace(/^in ensemble '\w+', /, ""); // which step failed says nothing to a caller
  const broken = /Stub process|shared memory pool/.test(said); // put right by its supervisor in seconds
  if (broken || status === 502 || status === 503 || status === 504 || status === 499) {
    return new TalksplatError("unavailable", "The server is away.");
  }
  /** @type {Record<number, Kind>} */
  const kinds = { 400: "invalid", 401: "unauthenticated", 403: "forbidden", 404: "unknown", 429: "overloaded" };
  const seconds = Number(retryAfter ?? Number.NaN);
  return new TalksplatError(kinds[status] ?? "failed", said, Number.isFinite(seconds) ? seconds : undefined);
}

/**
 * Wait, unless aborted.
 * @param {number} seconds
 * @param {AbortSignal} [signal]
 * @returns {Promise<void>}
 */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const aborted = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", aborted);
      resolve();
    }, 1e3 * seconds);
    signal?.addEventListener("abort", aborted, { once: true });
  });
}

/**
 * How a request is tried.
 * @typedef {{signal?: AbortSignal, timeout?: number, recovery?: number, insist?: boolean}} Terms
 * signal: drops it; timeout: seconds, each attempt; recovery: seconds for which a lost server is asked again;
 * insist: also where there is no place, since the stream had one before
 */

/** One talksplat server. Events: `lost` when it stops to answer, `found` when it does again. */
export class Triton extends EventTarget {
  #failed = 0; // when an attempt last found it away

  /**
   * @param {string} stream id of this viewer, by which the edge counts streams
   * @param {string} [base] of the addresses
   */
  constructor(stream, base = "") {
    super();
    this.stream = stream;
    this.base = base;
    this.key = ""; // of the API; empty: none is needed
    this.lost = false;
  }

  /** The server's clock. */
  async clock() {
    const config = await this.#insist(async signal => {
      const response = await this.#fetch("/v2/models/animate/config", { signal });
      return JSON.parse(new TextDecoder().decode(response.body));
    }, {});
    return new Clock(config.parameters ?? {});
  }

  /**
   * Ask a model.
   * @param {string} model
   * @param {{what: string | number, inputs: Tensor[], outputs: string[], parameters?: Record<string, string | number>}} request
   * @param {Terms} [terms]
   * @returns {Promise<Answer>}
   * @throws {TalksplatError} there is no answer, or it is an error
   */
  infer(model, { what, ...request }, terms = {}) {
    const { body, headerLength } = encode({ id: `${this.stream}-${what}`, ...request });
    const headers = {
      "content-type": "application/octet-stream",
      "inference-header-content-length": String(headerLength),
    };
    return this.#insist(async signal => {
      const response = await this.#fetch(`/v2/models/${model}/infer`, { method: "POST", headers, body, signal });
      const length = response.headers.get("inference-header-content-length");
      return new Answer(response.body, Number(length ?? response.body.byteLength));
    }, terms);
  }

  /**
   * @template T
   * @param {(signal: AbortSignal) => Promise<T>} attempt
   * @param {Terms} terms
   * @returns {Promise<T>}
   */
  async #insist(attempt, { signal, timeout = TIMEOUT, recovery = RECOVERY, insist = false }) {
    let wait = RETRY.first;
    let since = Number.POSITIVE_INFINITY; // the first failure
    for (;;) {
      const limit = AbortSignal.timeout(1e3 * timeout);
      const asked = performance.now();
      try {
        const result = await attempt(signal ? AbortSignal.any([signal, limit]) : limit);
        this.#answers(true, asked);
        return result;
      } catch (error) {
        signal?.throwIfAborted();
        const failure = failureOf(error);
        this.#answers(failure.kind !== "unavailable", asked);
        since = Math.min(since, performance.now());
        const worthwhile = failure.kind === "unavailable" || (failure.kind === "overloaded" && insist);
        const pauses = Math.max(wait, failure.retryAfter ?? 0);
        if (!worthwhile || performance.now() + 1e3 * pauses > since + 1e3 * recovery) throw failure;
        await pause(pauses, signal);
        wait = Math.min(wait * RETRY.factor, RETRY.longest);
      }
    }
  }

  /**
   * @param {boolean} present
   * @param {number} asked when
   */
  #answers(present, asked) {
    if (!present) this.#failed = performance.now();
    if (present !== this.lost) return;
    if (present && asked < this.#failed) return; // on its way when the server was lost
    this.lost = !present;
    this.dispatchEvent(new Event(present ? "found" : "lost"));
  }

  /**
   * @param {string} path
   * @param {RequestInit & {headers?: Record<string, string>}} init
   */
  async #fetch(path, init) {
    const headers = { ...init.headers, "x-talksplat-stream": this.stream };
    const response = await fetch(this.base + path, {
      ...init,
      headers: this.key ? { ...headers, authorization: `Bearer ${this.key}` } : headers,
    });
    const body = await response.arrayBuffer();
    if (response.ok) return { headers: response.headers, body };
    throw errorOf(response.status, new TextDecoder().decode(body), response.headers.get("retry-after"));
  }
}

/**
 * What `fetch` throws, as ours.
 * @param {unknown} error
 */
function failureOf(error) {
  if (error instanceof TalksplatError) return error;
  if (error instanceof TypeError || (error instanceof DOMException && error.name === "TimeoutError")) {
    return new TalksplatError("unavailable", "The server is away.");
  }
  return new TalksplatError("failed", String(error));
}
