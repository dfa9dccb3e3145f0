/** One stream of a call, read message by message. */

import type { ClientReadableStream, Metadata } from "@grpc/grpc-js";

import { DaemonUnavailable, type FinetunedError } from "./errors.js";
import { onAbort } from "./signals.js";
import { fromServiceError, isServiceError } from "./status.js";

/** A stream this long without message or heartbeat is dead; heartbeats come every 5 s. Tests make it shorter. */
export const silence = { ms: 20_000 };

/** A message; or how the stream ended, undefined where it just ended. */
export type Read<Message> = { readonly message: Message } | { readonly failure: FinetunedError | undefined };

/** A stream that is read one message at a time, so that a slow reader slows the daemon down and fills no memory. */
export class Stream<Message> {
  readonly #call: ClientReadableStream<Message>;
  readonly #messages: AsyncIterator<Message>;
  readonly #sent: Metadata;
  readonly #signal: AbortSignal | undefined;
  readonly #forget: () => void;

  constructor(call: ClientReadableStream<Message>, sent: Metadata, signal: AbortSignal | undefined) {
    this.#call = call;
    this.#sent = sent;
    this.#signal = signal;
    // What is cancelled ends with an error, which nobody may be waiting for any more.
    call.on("error", () => undefined);
    this.#messages = (call as AsyncIterable<Message>)[Symbol.asyncIterator]();
    this.#forget = onAbort(signal, () => call.cancel());
  }

  /**
   * The next message, or the end. Time that the reader spends on one does not count as silence.
   *
   * @param quietMs Milliseconds without a message after which the stream is taken for dead.
   */
  async next(quietMs: number): Promise<Read<Message>> {
    let isSilent = false;
    const timer = Number.isFinite(quietMs)
      ? setTimeout(() => {
          isSilent = true;
          this.#call.cancel();
        }, quietMs)
      : undefined;
    try {
      const next = await this.#messages.next();
      this.#signal?.throwIfAborted();
      return next.done ? { failure: undefined } : { message: next.value };
    } catch (error) {
      this.#signal?.throwIfAborted();
      if (isSilent) {
        return { failure: new DaemonUnavailable(`nothing came from the daemon for ${quietMs / 1000} s`) };
      }
      if (!isServiceError(error)) throw error;
      return { failure: fromServiceError(error, this.#sent) };
    } finally {
      clearTimeout(timer);
    }
  }

  /** Ends it. */
  cancel(): void {
    this.#forget();
    this.#call.cancel();
  }
}
