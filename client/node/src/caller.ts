/** One connection: made, made again, and called through. */

import { Client as Channel } from "@grpc/grpc-js";

import type { Endpoint, Place as Where } from "./connect.js";
import { DaemonUnavailable, DeadlineExceeded, FinetunedError, OutOfRange } from "./errors.js";
import { checkCommand, type DaemonCommand, startDaemon } from "./launch.js";
import { makeAbsolute } from "./local.js";
import type { Method } from "./methods.js";
import type { Place } from "./outage.js";
import { Attempts, Session } from "./session.js";
import { abortable, onAbort, pause } from "./signals.js";
import { fromServiceError } from "./status.js";
import { silence, Stream } from "./stream.js";
import { checkMs, TimeLimit } from "./time_limit.js";
import type { TLS } from "./tls.js";

/** What can be set for each call. */
export interface CallOptions {
  /** Ends the call, and its repeats, with the signal's reason. */
  signal?: AbortSignal | undefined;
  /**
   * Milliseconds that the method may take in all: looking up a name, starting the daemon and repeats while it is away included. Of
   * what comes page by page, each page has them. Default: the client's `timeoutMs` for each attempt of a call, more where training
   * data is read.
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
  /**
   * Start the daemon at the first call if none serves, and at the next one after a call found none; it lives on. A list is the command
   * that starts it, without `serve`.
   */
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
  /** Whether a daemon may be started for it; default: where the client starts one. */
  starts?: boolean;
}

/** A channel, where it leads, and who uses it. */
interface Connection {
  readonly endpoint: Endpoint;
  readonly channel: Channel;
  users: number;
  isReplaced: boolean;
}

/** One start of the daemon. */
interface Start {
  readonly ended: Promise<boolean>;
}

/** What `Client` calls through. */
export class Caller {
  readonly #where: Where;
  readonly #session: Session;
  readonly #command: boolean | DaemonCommand;
  #starting: Start | undefined;
  #connection: Connection | undefined;
  readonly #channels = new Set<Channel>();
  readonly #closing = new AbortController();
  readonly #underWay = new Set<{ cancel(): void }>();

  constructor(options: ClientOptions) {
    this.#where = { address: options.address, token: options.token, tls: options.tls };
    this.#session = new Session(this.#where, checkMs("timeoutMs", options.timeoutMs ?? 10_000), options.language);
    this.#command = options.startDaemon ?? false;
    if (typeof this.#command !== "boolean") checkCommand(this.#command);
  }

  /** Close the connection; calls and streams under way end. The daemon and its runs go on. */
  close(): void {
    if (this.#session.isClosed) return;
    this.#session.isClosed = true;
    this.#closing.abort(this.#session.closed());
    for (const call of this.#underWay) call.cancel();
    for (const channel of this.#channels) channel.close();
    this.#channels.clear();
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
    const { signal, timeoutMs } = options;
    const attempts = new Attempts(this.#session, kind.repeatable ?? true, timeoutMs);
    const start = kind.starts === false ? undefined : await this.#start(signal, attempts.left(Infinity));
    for (;;) {
      const connection = this.#connect(signal);
      try {
        const leftMs = attempts.left(kind.timeoutMs ?? this.#session.timeoutMs);
        const answer = await this.#unary(connection, method, request, leftMs, signal);
        this.#session.wasReached = true;
        return answer;
      } catch (error) {
        if (!(error instanceof FinetunedError)) throw error;
        this.#session.checkOpen();
        await pause(await this.#unlessAway(attempts.after(connection.endpoint, error), connection, start), signal);
      } finally {
        this.#release(connection);
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
    const start = await this.#start(options.signal);
    let wasAnswered = false;
    for (;;) {
      const connection = this.#connect(options.signal);
      let stream: Stream<Response> | undefined;
      let failure: FinetunedError | undefined;
      try {
        stream = this.#open(connection, method, request, options.signal);
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
        this.#release(connection);
      }
      if (failure === undefined) return;
      this.#session.checkOpen();
      if (wasAnswered) throw failure;
      await pause(await this.#unlessAway(attempts.after(connection.endpoint, failure), connection, start), options.signal);
    }
  }

  /** What comes of a stream that has no end, opened again after each outage. */
  protected async *follow<Request, Response, Item>(
    method: Method<Request, Response>,
    place: Place<Request, Response, Item>,
    options: StreamOptions,
  ): AsyncGenerator<Item, void, undefined> {
    // Once: a watch that reconnects waits for whoever starts the daemon again.
    const start = await this.#start(options.signal);
    for (;;) {
      const connection = this.#connect(options.signal);
      let stream: Stream<Response> | undefined;
      let failure: FinetunedError | undefined;
      try {
        stream = this.#open(connection, method, place.request(), options.signal);
        for (;;) {
          const read = await stream.next(silence.ms + place.intervalMs);
          if (!("message" in read)) {
            failure = read.failure;
            break;
          }
          this.#session.wasReached = true;
          let items: readonly Item[];
          try {
            items = place.accept(read.message);
          } catch (error) {
            if (!(error instanceof OutOfRange)) throw error;
            failure = error; // the place is to say if it can begin anew
            break;
          }
          yield* items;
          if (place.isDone) return;
        }
      } finally {
        this.#close(stream);
        this.#release(connection);
      }
      this.#session.checkOpen();
      const lost = await this.#unlessAway(this.#lost(connection, place, failure), connection, start);
      if (lost !== undefined) yield lost;
      await pause(place.delay(), options.signal);
    }
  }

  async #lost<Item>(
    { endpoint }: Connection,
    place: { lost(error: FinetunedError | undefined): Item | undefined },
    failure: FinetunedError | undefined,
  ): Promise<Item | undefined> {
    return place.lost(failure && (await this.#session.check(endpoint, failure)));
  }

  #unary<Request, Response>(
    { channel, endpoint }: Connection,
    method: Method<Request, Response>,
    request: Request,
    timeoutMs: number,
    signal: AbortSignal | undefined,
  ): Promise<Response> {
    const bytes = method.encode(endpoint.isHere ? makeAbsolute(request) : request);
    return new Promise((resolve, reject) => {
      const metadata = this.#session.metadata(endpoint);
      const call = channel.makeUnaryRequest<Buffer, Response>(
        method.path,
        asIs,
        method.decode,
        bytes,
        metadata,
        { deadline: Date.now() + timeoutMs },
        (error, answer) => {
          this.#underWay.delete(call);
          forget();
          if (signal?.aborted) reject(signal.reason as Error);
          else if (error) reject(fromServiceError(error, metadata));
          else resolve(answer as Response);
        },
      );
      this.#underWay.add(call);
      const forget = onAbort(signal, () => call.cancel());
    });
  }

  #open<Request, Response>(
    { channel, endpoint }: Connection,
    method: Method<Request, Response>,
    request: Request,
    signal: AbortSignal | undefined,
  ): Stream<Response> {
    const metadata = this.#session.metadata(endpoint);
    const bytes = method.encode(endpoint.isHere ? makeAbsolute(request) : request);
    const call = channel.makeServerStreamRequest(method.path, asIs, method.decode, bytes, metadata, {});
    const stream = new Stream<Response>(call, metadata, signal);
    this.#underWay.add(stream);
    return stream;
  }

  #close(stream: Stream<unknown> | undefined): void {
    if (stream === undefined) return;
    stream.cancel();
    this.#underWay.delete(stream);
  }

  /** Starts the daemon where that was wished for; returns this start, for `unlessAway`. */
  async #start(signal: AbortSignal | undefined, leftMs = Infinity): Promise<Start | undefined> {
    this.#session.checkOpen();
    signal?.throwIfAborted();
    if (this.#command === false) return undefined;
    if (this.#starting === undefined) {
      const command = this.#command === true ? undefined : this.#command;
      const begun = { ended: startDaemon({ ...this.#where, command, signal: this.#closing.signal }) };
      this.#starting = begun;
      // One start for all calls that wait for it; after a failure the next call tries again.
      begun.ended.catch(() => this.#forgetStart(begun));
    }
    const start = this.#starting;
    const limit = new TimeLimit(leftMs, signal);
    try {
      await abortable(start.ended, limit.signal, this.#closing.signal);
    } catch (error) {
      if (error !== limit.passed) throw error;
      throw new DeadlineExceeded("the daemon that was started has not answered in time; it may yet", { reason: "DAEMON_STARTS" });
    } finally {
      limit.clear();
    }
    this.#session.checkOpen();
    return start;
  }

  #forgetStart(start: Start): void {
    if (this.#starting === start) this.#starting = undefined;
  }

  /** The answer; where the call ends for want of a daemon, the next one starts it again. */
  async #unlessAway<T>(answer: Promise<T>, { endpoint }: Connection, start: Start | undefined): Promise<T> {
    try {
      return await answer;
    } catch (error) {
      const mayBeAway = error instanceof DaemonUnavailable || error instanceof DeadlineExceeded;
      if (mayBeAway && start !== undefined && !(await endpoint.isListening())) this.#forgetStart(start);
      throw error;
    }
  }

  /** The endpoint, with a channel to it until `release`; a new one where the daemon has moved. */
  #connect(signal: AbortSignal | undefined): Connection {
    this.#session.checkOpen();
    signal?.throwIfAborted();
    const endpoint = this.#session.locate();
    let connection = this.#connection;
    if (connection === undefined || !endpoint.equals(connection.endpoint)) {
      const channel = new Channel(endpoint.target, endpoint.credentials(), endpoint.options());
      this.#channels.add(channel);
      if (connection !== undefined) {
        // It leads nowhere, but others may still read from it.
        connection.isReplaced = true;
        this.#closeUnused(connection);
      }
      connection = this.#connection = { endpoint, channel, users: 0, isReplaced: false };
    }
    connection.users += 1;
    return connection;
  }

  #release(connection: Connection): void {
    connection.users -= 1;
    this.#closeUnused(connection);
  }

  #closeUnused({ channel, users, isReplaced }: Connection): void {
    if (isReplaced && users === 0 && this.#channels.delete(channel)) channel.close();
  }
}

function asIs(bytes: Buffer): Buffer {
  return bytes;
}
