/** How long things may take. */

import { refuse } from "./errors.js";
import { onAbort } from "./signals.js";
import { shown } from "./words.js";

// What a timer can hold, 24 days; a longer time is none.
const LONGEST_TIMER_MS = 2 ** 31 - 1;
// gRPC writes a time limit with eight digits, hours at most. Thirty years are none.
const LONGEST_MS = 1e12;

/** The milliseconds, where they are a time; one that is longer than anybody waits is `Infinity`. */
export function checkMs(field: string, ms: unknown): number {
  if (typeof ms !== "number" || !(ms >= 0)) {
    refuse([{ field, description: `must be milliseconds, a number from 0, not ${shown(ms)}`, reason: "WRONG_TYPE" }]);
  }
  return ms > LONGEST_MS ? Infinity : ms;
}

/** The same options for all calls of one method: `timeoutMs` is what is left of it, whenever it is read. */
export function shareTime<O extends { timeoutMs?: number | undefined }>(options: O): O {
  if (options.timeoutMs === undefined) return options;
  const end = performance.now() + checkMs("timeoutMs", options.timeoutMs);
  return Object.defineProperty({ ...options }, "timeoutMs", {
    enumerable: true,
    get: () => Math.max(end - performance.now(), 0),
  });
}

/** A signal that is aborted when the time is over, or with the caller's own. */
export class TimeLimit {
  /** The reason of the signal where the time was over. */
  readonly passed = new Error("the time is over");
  readonly #stop = new AbortController();
  readonly #timer: NodeJS.Timeout | undefined;
  readonly #forget: () => void;

  constructor(ms: number | undefined, outer: AbortSignal | undefined) {
    const limitMs = ms === undefined ? Infinity : checkMs("timeoutMs", ms);
    if (outer?.aborted) this.#stop.abort(outer.reason);
    this.#forget = onAbort(outer, () => this.#stop.abort(outer?.reason));
    if (limitMs <= LONGEST_TIMER_MS) this.#timer = setTimeout(() => this.#stop.abort(this.passed), limitMs);
  }

  /** For what is to end with it. */
  get signal(): AbortSignal {
    return this.#stop.signal;
  }

  /** Forgets it. */
  clear(): void {
    clearTimeout(this.#timer);
    this.#forget();
  }
}
