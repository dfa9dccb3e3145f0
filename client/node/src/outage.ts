/** What a stream does about a connection that breaks: wait, tell it once, give up or go on. */

import { DaemonUnavailable, type FinetunedError, InternalError } from "./errors.js";
import { Backoff } from "./session.js";
import { checkMs } from "./time_limit.js";

// A transport that breaks can look like a fault of the daemon; one that always "breaks" is a fault.
const MOST_FAULTS = 5;

/** The connection broke; the watch goes on by itself and misses nothing. */
export interface ConnectionLost {
  readonly type: "connectionLost";
  /** What happened. */
  readonly error: DaemonUnavailable;
}

/** Where a reader stands in a stream that is opened again after each outage. */
export interface Place<Request, Response, Item> {
  /** Whether the reader has all that it wanted. */
  readonly isDone: boolean;
  /** Milliseconds that the stream is quiet by itself, beside heartbeats. */
  readonly intervalMs: number;
  /** What to ask for on a new stream. */
  request(): Request;
  /** Takes a message of the stream; returns what is to be yielded. */
  accept(response: Response): readonly Item[];
  /** Takes the end of a stream; returns what is to be yielded, or throws the error. */
  lost(error: FinetunedError | undefined): Item | undefined;
  /** Milliseconds to wait before the next stream. */
  delay(): number;
}

/** The outages of one stream. */
export class Outage {
  readonly #patienceMs: number;
  #lostAt: number | undefined;
  #faults = 0;
  #delays = new Backoff();

  constructor(patienceMs: number | undefined) {
    this.#patienceMs = patienceMs === undefined ? Infinity : checkMs("reconnectTimeoutMs", patienceMs);
  }

  /** Something has come. */
  over(): void {
    this.#lostAt = undefined;
    this.#faults = 0;
    this.#delays = new Backoff();
  }

  /**
   * Takes the end of a stream; returns what is to be told of it, once an outage. Throws the error where opening the stream again
   * cannot mend it.
   *
   * @param error How it ended; undefined where it just ended, as the stream has no end of its own.
   */
  take(error: FinetunedError | undefined): DaemonUnavailable | undefined {
    let outage = error ?? new DaemonUnavailable("the daemon ended the stream");
    if (outage instanceof InternalError && !outage.reason) {
      this.#faults += 1;
      if (this.#faults >= MOST_FAULTS) throw outage;
      outage = new DaemonUnavailable(`the connection broke: ${outage.message}`, { cause: outage });
    }
    if (!(outage instanceof DaemonUnavailable)) throw outage;
    const now = performance.now();
    if (this.#lostAt === undefined) {
      this.#lostAt = now;
      return outage;
    }
    if (now - this.#lostAt >= this.#patienceMs) throw outage;
    return undefined;
  }

  /** Milliseconds to wait before the next stream. */
  delay(): number {
    return this.#delays.next();
  }
}
