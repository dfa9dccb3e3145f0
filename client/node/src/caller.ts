/** One connection: made, made again, and called through. */

import { setTimeout as sleep } from "node:timers/promises";

import { Client as Channel } from "@grpc/grpc-js";

import type { Endpoint, Place as Where } from "./connect.js";
import { FinetunedError } from "./errors.js";
import { type DaemonCommand, startDaemon } from "./launch.js";
import { makeAbsolute } from "./local.js";
import type { Method } from "./methods.js";
import type { Place } from "./outage.js";
import { Attempts, Session } from "./session.js";
import { fromServiceError } from "./status.js";
import { silence, Stream } from "./stream.js";
import type { TLS } from "./tls.js";

/** What can be set for each call. */
export interface CallOptions {
  /** Ends the call, and its repeats, with the signal's reason. */
  signal?: AbortSignal | undefined;
  /**
   * Milliseconds that the call may take in all, its repeats while the daemon is away included. Default: the client's `timeoutMs` for
   * each attempt, more where training data is read.
   */
  timeoutMs?: number | undefined;
}

/** What can be set for each stream, which has no time limit. */
export interface StreamOptions {
  /** Ends the stream with the signal's reason. Leaving the loop ends it too. */
  signal?: AbortSignal | undefined;
}

/** How a client reaches the daemon. */
export interface ClientOptions {
  /** `unix:/path` or `host:port`; else `FINETUNED_ADDRESS`, else the daemon of this user on this machine. */
  address?: string | undefined;
  /**
   * What TCP demands; else `FINETUNED_TOKEN`, else the token file of this user's daemon, at an address that this daemon has
   * announced and nowhere else.
   */
  token?: string | undefined;
  /** Start the daemon at the first call if none serves; it lives on. A list is the command that starts it, without `serve`. */
  startDaemon?: boolean | DaemonCommand | undefined;
  /** Milliseconds that a call may take; default 10,000. Those that read training data may take longer. */
  timeoutMs?: number | undefined;
  /** Of the daemon's sentences, `en` or `zh`; else what `LC_ALL`, `LC_MESSAGES` or `LANG` says. */
  language?: "en" | "zh" | undefined;
  /**
   * Files for TLS; else what `FINETUNED_TLS_CA`, `FINETUNED_TLS_CERT` and `FINETUNED_TLS_KEY` name. Without TLS no other machine
   * is called.
   */
  tls?: TLS | undefined;
}

/** What a call is, beside its request. */
interface Kind {
  /** Whether the contract says that a repeat is safe; default: it is. */
  repeatable?: boolean;
  /** Of calls that may take longer than others, unless the caller says how long. */
  timeoutMs?: number;
}

/** A channel, and where it leads. */
interface Connection {
  readonly endpoint: Endpoint;
  readonly channel: Channel;
}

/** What `Client` calls through. */
export class Caller {
  readonly #where: Where;
  readonly #session: Session;
  readonly #command: boolean | DaemonCommand;
  #starting: Promise<boolean> | undefined;
  #connection: Connection | undefined;
  readonly #channels: Channel[] = [];
  readonly #underWay = new Set<{ cancel(): void }>();

  constructor(options: ClientOptions) {
    this.#where = { address: options.address, token: options.token, tls: options.tls };
    this.#session = new Session(this.#where, options.timeoutMs ?? 10_000, options.language);
    this.#command = options.startDaemon ?? false;
  }

  /** Close the connection; calls and streams under way end. The daemon and its runs go on. */
  close(): void {
    this.#session.isClosed = true;
    for (const call of this.#underWay) call.cancel();
    for (const channel of this.#channels) channel.close();
    this.#channels.length = 0;
  }

  /** As `close`, for `using client = new Client()`. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** Makes a call, and makes it again while the daemon is away and a repeat is safe. */
  protected async call<Request, Response>(
    method: Method<Request, Response>,
    request: Request,
    options: CallOptions,
    kind: Kind = {},
  ): Promise<Response> {
    const attempts = new Attempts(this.#session, kind.repeatable ?? true, options.timeoutMs);
    for (;;) {
      const connection = await this.#connect(options.signal);
      const timeoutMs = attempts.left(kind.timeoutMs ?? this.#session.timeoutMs);
      try {
        const answer = await this.#unary(connection, method, request, timeoutMs, options.signal);
        this.#session.wasReached = true;
        return answer;
      } catch (error) {
        if (!(error instanceof FinetunedError)) throw error;
        this.#session.checkOpen();
        await pause(await attempts.after(connection.endpoint, error), options.signal);
      }
    }
  }

  /** What comes of a stream that has an end, begun again only while nothing has come of it. */
  protected async *once<Request, Response>(
    method: Method<Request, Response>,
    request: Request,
    options: StreamOptions,
  ): AsyncGenerator<Response, void, undefined> {
    const attempts = new Attempts(this.#session, true);
    let wasAnswered = false;
    for (;;) {
      const connection = await this.#connect(options.signal);
      const stream = this.#open(connection, method, request, options.signal);
      let failure: FinetunedError | undefined;
      try {
        for (;;) {
          const read = await stream.next(Infinity);
          if (!("message" in read)) {
            failure = read.failure;
            break;
          }
          wasAnswered = this.#session.wasReached = true;
          yield read.message;
        }
      } finally {
        this.#close(stream);
      }
      if (failure === undefined) return;
      this.#session.checkOpen();
      if (wasAnswered) throw failure;
      await pause(await attempts.after(connection.endpoint, failure), options.signal);
    }
  }

  /** What comes of a stream that has no end, opened again after each outage. */
  protected async *follow<Request, Response, Item>(
    method: Method<Request, Response>,
    place: Place<Request, Response, Item>,
    options: StreamOptions,
  ): AsyncGenerator<Item, void, undefined> {
    for (;;) {
      const connection = await this.#connect(options.signal);
      const stream = this.#open(connection, method, place.request(), options.signal);
      let failure: FinetunedError | undefined;
      try {
        for (;;) {
          const read = await stream.next(silence.ms + place.intervalMs);
          if (!("message" in read)) {
            failure = read.failure;
            break;
          }
          this.#session.wasReached = true;
          yield* place.accept(read.message);
          if (place.isDone) return;
        }
      } finally {
        this.#close(stream);
      }
      this.#session.checkOpen();
      if (failure !== undefined) failure = await this.#session.check(connection.endpoint, failure);
      const lost = place.lost(failure);
      if (lost !== undefined) yield lost;
      await pause(place.delay(), options.signal);
    }
  }

  #unary<Request, Response>(
    { channel, endpoint }: Connection,
    method: Method<Request, Response>,
    request: Request,
    timeoutMs: number,
    signal: AbortSignal | undefined,
  ): Promise<Response> {
    const local = endpoint.isHere ? makeAbsolute(request) : request;
    return new Promise((resolve, reject) => {
      const metadata = this.#session.metadata(endpoint);
      const call = channel.makeUnaryRequest<Request, Response>(
        method.path,
        method.encode,
        method.decode,
        local,
        metadata,
        { deadline: Date.now() + timeoutMs },
        (error, answer) => {
          this.#underWay.delete(call);
          signal?.removeEventListener("abort", cancel);
          if (signal?.aborted) reject(signal.reason as Error);
          else if (error) reject(fromServiceError(error, metadata));
          else resolve(answer as Response);
        },
      );
      const cancel = () => call.cancel();
      this.#underWay.add(call);
      signal?.addEventListener("abort", cancel, { once: true });
    });
  }

  #open<Request, Response>(
    { channel, endpoint }: Connection,
    method: Method<Request, Response>,
    request: Request,
    signal: AbortSignal | undefined,
  ): Stream<Response> {
    const metadata = this.#session.metadata(endpoint);
    const local = endpoint.isHere ? makeAbsolute(request) : request;
    const call = channel.makeServerStreamRequest(method.path, method.encode, method.decode, local, metadata, {});
    const stream = new Stream<Response>(call, metadata, signal);
    this.#underWay.add(stream);
    return stream;
  }

  #close(stream: Stream<unknown>): void {
    stream.cancel();
    this.#underWay.delete(stream);
  }

  /** The endpoint, with a channel to it; a new one where the daemon has moved. */
  async #connect(signal: AbortSignal | undefined): Promise<Connection> {
    this.#session.checkOpen();
    signal?.throwIfAborted();
    if (this.#command !== false) {
      // One start for all calls that wait for it; after a failure the next call tries again.
      const command = this.#command === true ? undefined : this.#command;
      this.#starting ??= startDaemon({ ...this.#where, command }).catch((error: unknown) => {
        this.#starting = undefined;
        throw error;
      });
      await abortable(this.#starting, signal);
      this.#session.checkOpen();
    }
    const endpoint = this.#session.locate();
    if (this.#connection === undefined || !endpoint.equals(this.#connection.endpoint)) {
      // The old channel leads nowhere, but others may still read from it.
      const channel = new Channel(endpoint.target, endpoint.credentials(), endpoint.options());
      this.#channels.push(channel);
      this.#connection = { endpoint, channel };
    }
    return this.#connection;
  }
}

/** Waits; ends with the signal's reason where it is aborted. */
async function pause(ms: number, signal: AbortSignal | undefined): Promise<void> {
  try {
    await sleep(ms, undefined, signal && { signal });
  } catch (error) {
    signal?.throwIfAborted();
    throw error;
  }
}

/** The promise's answer, or the signal's reason where that comes first. */
function abortable<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return promise;
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal.reason as Error);
    signal.addEventListener("abort", abort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
  });
}
