/** What a client remembers about its connection, and when a failed call is made again. */

import { randomBytes } from "node:crypto";

import type { Metadata } from "@grpc/grpc-js";

import { type Endpoint, findEndpoint, type Place } from "./connect.js";
import { DaemonUnavailable, FinetunedError, Unauthenticated } from "./errors.js";
import { type Language, LANGUAGE_KEY, languageOf } from "./language.js";
import { REQUEST_ID_KEY } from "./status.js";
import { checkMs } from "./time_limit.js";
import { adviseTLS, explainTLS } from "./tls.js";

/** How long a call that can be repeated is repeated while the daemon is away. */
const RETRY_MS = 10_000;

/** Pauses in milliseconds: 50, 100, 200 ... 1000, 1000, 1000. */
export class Backoff {
  #next = 50;

  /** The next pause. */
  next(): number {
    const delay = this.#next;
    this.#next = Math.min(delay * 2, 1000);
    return delay;
  }
}

/** Address and history of one client's connection; knows no channel. */
export class Session {
  readonly timeoutMs: number;
  readonly language: Language;
  wasReached = false;
  isClosed = false;
  readonly #place: Place;

  constructor(place: Place, timeoutMs: number, language: string | undefined) {
    this.#place = place;
    this.timeoutMs = timeoutMs;
    this.language = languageOf(language);
  }

  /** Throws where the client has been closed, so that no watch reconnects after that. */
  checkOpen(): void {
    if (this.isClosed) throw this.closed();
  }

  /** What calls of a closed client end with. */
  closed(): FinetunedError {
    return new FinetunedError("this client is closed", { reason: "CLIENT_CLOSED" });
  }

  /** Where the daemon is now; a new one may have another port and token. */
  locate(): Endpoint {
    return findEndpoint(this.#place);
  }

  /** Metadata of a call to that endpoint, with an id of its own for the daemon's log. */
  metadata(endpoint: Endpoint): Metadata {
    const metadata = endpoint.metadata();
    metadata.set(LANGUAGE_KEY, this.language);
    metadata.set(REQUEST_ID_KEY, randomBytes(8).toString("hex"));
    return metadata;
  }

  /**
   * Throws the error where waiting cannot help: nobody was ever there, and nobody is now.
   *
   * @returns The error; where the token was changed meanwhile, one that another attempt mends.
   */
  async check(endpoint: Endpoint, error: FinetunedError): Promise<FinetunedError> {
    if (error instanceof Unauthenticated) {
      const { token } = this.locate();
      if (token === "" || token === endpoint.token) throw error;
      return new DaemonUnavailable("the token was changed; the new one is shown from now on");
    }
    // A handshake that fails now fails in a second as well.
    const isRefused = error instanceof DaemonUnavailable && explainTLS(endpoint.tls, error.message) !== "";
    if (isRefused || (!this.wasReached && !(await endpoint.isListening()))) throw await unreachable(endpoint, error);
    return error;
  }
}

/** The attempts of one call. */
export class Attempts {
  readonly #session: Session;
  readonly #repeatable: boolean;
  readonly #delays = new Backoff();
  readonly #limit: number;
  readonly #deadline: number;
  #hasShownAnother = false;

  /**
   * @param session The connection.
   * @param repeatable Whether a repeat does no harm.
   * @param limitMs Milliseconds that all attempts together may take. Absent: each has the time of its call.
   */
  constructor(session: Session, repeatable: boolean, limitMs?: number) {
    this.#session = session;
    this.#repeatable = repeatable;
    const allMs = limitMs === undefined ? Infinity : checkMs("timeoutMs", limitMs);
    this.#limit = performance.now() + allMs;
    this.#deadline = performance.now() + Math.min(allMs, RETRY_MS);
  }

  /** Milliseconds that the next attempt may take, where the call by itself has its `own`. */
  left(own: number): number {
    return this.#limit === Infinity ? own : Math.max(this.#limit - performance.now(), 0);
  }

  /** Milliseconds to wait before the next attempt; throws the error where there is to be none. */
  async after(endpoint: Endpoint, error: FinetunedError): Promise<number> {
    if (error instanceof Unauthenticated) {
      // A call that was not let in was not begun, so that any can be made again, once.
      if (this.#hasShownAnother) throw error;
      await this.#session.check(endpoint, error);
      this.#hasShownAnother = true;
      return 0;
    }
    if (!(error instanceof DaemonUnavailable)) throw error;
    await this.#session.check(endpoint, error);
    const delay = this.#delays.next();
    if (!this.#repeatable || performance.now() + delay > this.#deadline) throw await unreachable(endpoint, error);
    return delay;
  }
}

/** The error with the address in it; what the daemon itself said stays as it is. */
async function unreachable(endpoint: Endpoint, error: FinetunedError): Promise<FinetunedError> {
  if (error.reason || !(error instanceof DaemonUnavailable)) return error;
  const { target } = endpoint;
  if (!(await endpoint.isListening())) {
    return new DaemonUnavailable(`no daemon serves ${target}`, { cause: error });
  }
  const why = explainTLS(endpoint.tls, error.message);
  if (why) {
    return new DaemonUnavailable(`no connection with ${target}: ${why}`, { reason: "TLS", cause: error });
  }
  const advice = endpoint.isUnix ? "" : `; ${adviseTLS(endpoint.tls)}`;
  return new DaemonUnavailable(`no daemon answers at ${target} (${error.message})${advice}`, { cause: error });
}
