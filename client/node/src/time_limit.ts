/** A time after which a stream is left. */

// What a timer can hold, 24 days; a longer time is none.
const LONGEST_MS = 2 ** 31 - 1;

/** A signal that is aborted when the time is over, or with the caller's own. */
export class TimeLimit {
  /** The reason of the signal where the time was over. */
  readonly passed = new Error("the time is over");
  readonly #stop = new AbortController();
  readonly #outer: AbortSignal | undefined;
  readonly #timer: NodeJS.Timeout | undefined;
  readonly #pass = () => this.#stop.abort(this.#outer?.reason);

  constructor(ms: number | undefined, outer: AbortSignal | undefined) {
    this.#outer = outer;
    outer?.addEventListener("abort", this.#pass, { once: true });
    if (outer?.aborted) this.#pass();
    if (ms !== undefined && ms <= LONGEST_MS) this.#timer = setTimeout(() => this.#stop.abort(this.passed), ms);
  }

  /** For what is to end with it. */
  get signal(): AbortSignal {
    return this.#stop.signal;
  }

  /** Forgets it. */
  clear(): void {
    clearTimeout(this.#timer);
    this.#outer?.removeEventListener("abort", this.#pass);
  }
}
