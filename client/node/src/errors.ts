/**
 * What can go wrong, one tree. The same classes as in the Python client.
 *
 * ```text
 * FinetunedError
 * +-- DaemonUnavailable     UNAVAILABLE: nobody answers at the address, or the daemon stops
 * |   +-- DaemonNotStarted  a daemon that was to be started ended, or never answered
 * +-- InvalidArgument       INVALID_ARGUMENT: wrong fields, every one of them in `violations`
 * +-- FailedPrecondition    FAILED_PRECONDITION: the resource is not in a state for this
 * +-- NotFound              NOT_FOUND
 * +-- AlreadyExists         ALREADY_EXISTS
 * +-- Aborted               ABORTED: the `etag` no longer holds
 * +-- OutOfRange            OUT_OF_RANGE: no such place in the event log; watch again from 0
 * +-- PermissionDenied      PERMISSION_DENIED
 * +-- Unauthenticated       UNAUTHENTICATED: the token is missing or wrong
 * +-- ResourceExhausted     RESOURCE_EXHAUSTED: disk, or a limit of the daemon
 * +-- DeadlineExceeded      DEADLINE_EXCEEDED: no answer in time
 * +-- Unimplemented         UNIMPLEMENTED: the daemon is older than this client
 * +-- InternalError         every other status; a fault of the daemon
 * +-- EventsLost            a stream of events had a gap or a repeat
 * +-- ProbeFailed           a probe ended without an answer
 * +-- RunFailed             a run that was waited for has failed
 * ```
 *
 * A call that was aborted by its `AbortSignal` throws the signal's own reason, as `fetch` does.
 */

import type { Evidence, Result } from "./gen/finetuned/v1/event.js";
import type { Parameters } from "./gen/finetuned/v1/parameters.js";
import type { EndReason, Task } from "./gen/finetuned/v1/task.js";
import { wordOf } from "./words.js";

/** One wrong field of a request. */
export interface FieldViolation {
  /** Path, such as `training.batch_size`; the options of this client as they are written, such as `timeoutMs`. */
  readonly field: string;
  /** A sentence: what is wrong and what would be right. */
  readonly description: string;
  /** Stable, in capitals, such as `OUT_OF_RANGE`. */
  readonly reason: string;
}

/** One reason why a resource is not in a state for a request. */
export interface PreconditionViolation {
  /** The resource, such as `tasks/x`. */
  readonly subject: string;
  /** Stable, in capitals. */
  readonly type: string;
  /** A sentence. */
  readonly description: string;
}

/** A {@link FinetunedError} as a plain object, which survives structured cloning and Electron's IPC. */
export interface ErrorObject {
  /** Name of the class. */
  name: string;
  /** What is wrong, for people. */
  message: string;
  /** Name of the gRPC status. */
  code: string;
  /** The daemon's stable reason in capitals. */
  reason: string;
  /** Id of the call in the daemon's log. */
  requestId: string;
  /** What goes with `reason`, such as `first_seq`. */
  metadata: Record<string, string>;
  /** Every wrong field, or every reason that is in the way; empty for other errors. */
  violations: (FieldViolation | PreconditionViolation)[];
  /** Of a {@link RunFailed}: parameters that would likely mend it. */
  fix?: Parameters;
  /** Of a {@link RunFailed}: why `fix` would mend it, or what to do by hand. */
  advice?: string;
  /** Of a {@link RunFailed}: the last metrics and log lines, and the samples it failed with. */
  evidence?: Evidence;
  /** Of a {@link RunFailed}: last lines of the traceback or console. */
  detail?: string;
}

/** What an error is made from beside its message. */
export interface ErrorOptions {
  /** The daemon's stable reason in capitals. */
  reason?: string;
  /** Name of the gRPC status; default: that of the class. */
  code?: string;
  /** What goes with the reason. */
  metadata?: Readonly<Record<string, string>>;
  /** What led to it. */
  cause?: unknown;
}

/**
 * Base of all errors of this package.
 *
 * `requestId` is the call's in the daemon's log: `finetunectl daemon logs --request ID`. It is not the option `requestId` of
 * `createTask` and `startTask`, which makes a repeat safe.
 */
export class FinetunedError extends Error {
  /** Name of the gRPC status that the class stands for. */
  static readonly code: string = "";
  /** Name of the gRPC status, such as `NOT_FOUND`; empty where the error is not the daemon's. */
  readonly code: string;
  /** The daemon's stable reason in capitals, such as `TASK_NOT_FOUND`; may be empty. */
  readonly reason: string;
  /** What goes with `reason`, such as `first_seq`. */
  readonly metadata: Readonly<Record<string, string>>;
  /** Id of the call in the daemon's log; empty where no call was made. */
  requestId = "";

  constructor(message: string, options: ErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    // Not the constructor's name, which bundlers shorten.
    Object.defineProperty(this, "name", { value: nameOf(this), configurable: true, writable: true });
    this.code = options.code ?? (this.constructor as typeof FinetunedError).code;
    this.reason = options.reason ?? "";
    this.metadata = options.metadata ?? {};
  }

  /** This error as a plain object: what to send over Electron's IPC, which keeps nothing but the message of an `Error`. */
  toJSON(): ErrorObject {
    const { violations } = this as { violations?: readonly (FieldViolation | PreconditionViolation)[] };
    return {
      name: this.name,
      message: this.message,
      code: this.code,
      reason: this.reason,
      requestId: this.requestId,
      metadata: { ...this.metadata },
      violations: [...(violations ?? [])],
    };
  }
}

/** Nobody answers at the daemon's address, or the daemon stops. */
export class DaemonUnavailable extends FinetunedError {
  static override readonly code: string = "UNAVAILABLE";
}

/** A daemon that was to be started ended, or never answered; the message holds its log's end. */
export class DaemonNotStarted extends DaemonUnavailable {}

/** Wrong fields, every one of them in `violations`. */
export class InvalidArgument extends FinetunedError {
  static override readonly code: string = "INVALID_ARGUMENT";
  /** Every wrong field. */
  readonly violations: readonly FieldViolation[];

  constructor(message: string, options: ErrorOptions & { violations?: readonly FieldViolation[] } = {}) {
    super(message, options);
    this.violations = options.violations ?? [];
  }
}

/** The resource is not in a state for this; `violations` says what is in the way. */
export class FailedPrecondition extends FinetunedError {
  static override readonly code: string = "FAILED_PRECONDITION";
  /** Everything that is in the way. */
  readonly violations: readonly PreconditionViolation[];

  constructor(message: string, options: ErrorOptions & { violations?: readonly PreconditionViolation[] } = {}) {
    super(message, options);
    this.violations = options.violations ?? [];
  }
}

/** There is no such resource. */
export class NotFound extends FinetunedError {
  static override readonly code: string = "NOT_FOUND";
}

/** The id or display name is taken. */
export class AlreadyExists extends FinetunedError {
  static override readonly code: string = "ALREADY_EXISTS";
}

/** The resource has changed since the `etag` was seen. */
export class Aborted extends FinetunedError {
  static override readonly code: string = "ABORTED";
}

/** No such place in the event log: it was restored or cut. Watch again from 0. */
export class OutOfRange extends FinetunedError {
  static override readonly code: string = "OUT_OF_RANGE";
}

/** The daemon does not allow this over this connection. */
export class PermissionDenied extends FinetunedError {
  static override readonly code: string = "PERMISSION_DENIED";
}

/** The token is missing or wrong. */
export class Unauthenticated extends FinetunedError {
  static override readonly code: string = "UNAUTHENTICATED";
}

/** Something has run out: the disk, or a limit of the daemon, such as `LIMIT_OPEN_STREAMS`. */
export class ResourceExhausted extends FinetunedError {
  static override readonly code: string = "RESOURCE_EXHAUSTED";
}

/** No answer in time. */
export class DeadlineExceeded extends FinetunedError {
  static override readonly code: string = "DEADLINE_EXCEEDED";
}

/** The daemon does not know this call; it is older than this client. */
export class Unimplemented extends FinetunedError {
  static override readonly code: string = "UNIMPLEMENTED";
}

/** The daemon failed in a way it should not; its log says more. */
export class InternalError extends FinetunedError {
  static override readonly code: string = "INTERNAL";
}

/** A stream of events had a gap or a repeat; what came before is right. */
export class EventsLost extends FinetunedError {}

/** A probe ended without an answer; `reason` says why, such as `DEVICE_OUT_OF_MEMORY`. */
export class ProbeFailed extends FinetunedError {}

/**
 * A run that was waited for has failed. `reason` is the end reason's name, such as `DEVICE_OUT_OF_MEMORY`; `message` says it in a
 * sentence.
 */
export class RunFailed extends FinetunedError {
  /** The task as it stands. */
  readonly task: Task;
  /** How the run ended, in full, with `fix` and `advice` where there are any; undefined where no such event is kept. */
  readonly result: Result | undefined;

  constructor(message: string, task: Task, result: Result | undefined) {
    super(message, { reason: wordOf(task.endReason, "END_REASON").toUpperCase() });
    this.task = task;
    this.result = result;
  }

  /** Why it ended. */
  get endReason(): EndReason {
    return this.task.endReason;
  }

  /** Parameters that would likely mend it, for `task.update(error.fix)`; undefined: not known. */
  get fix(): Parameters | undefined {
    return this.result?.fix;
  }

  /** Why `fix` would mend it, or what to do by hand; in English. May be empty. */
  get advice(): string {
    return this.result?.advice?.en ?? "";
  }

  /** The last metrics and log lines, and the samples it failed with. */
  get evidence(): Evidence | undefined {
    return this.result?.evidence;
  }

  /** Last lines of the traceback or console. */
  get detail(): string {
    return this.result?.detail ?? "";
  }

  override toJSON(): ErrorObject {
    const { advice, detail, evidence, fix } = this;
    return { ...super.toJSON(), advice, detail, ...(evidence && { evidence }), ...(fix && { fix }) };
  }
}

const CLASSES = {
  DaemonUnavailable,
  DaemonNotStarted,
  InvalidArgument,
  FailedPrecondition,
  NotFound,
  AlreadyExists,
  Aborted,
  OutOfRange,
  PermissionDenied,
  Unauthenticated,
  ResourceExhausted,
  DeadlineExceeded,
  Unimplemented,
  InternalError,
  EventsLost,
  ProbeFailed,
  RunFailed,
};

/** The one table from status to class. */
export const BY_CODE: ReadonlyMap<string, new (message: string, options?: ErrorOptions) => FinetunedError> = new Map(
  [
    DaemonUnavailable,
    InvalidArgument,
    FailedPrecondition,
    NotFound,
    AlreadyExists,
    Aborted,
    OutOfRange,
    PermissionDenied,
    Unauthenticated,
    ResourceExhausted,
    DeadlineExceeded,
    Unimplemented,
    InternalError,
  ].map((one) => [one.code, one]),
);

function nameOf(error: FinetunedError): string {
  const found = Object.entries(CLASSES).find(([, one]) => one === error.constructor);
  return found?.[0] ?? "FinetunedError";
}

/** Throws an error that names every wrong field. */
export function refuse(violations: readonly FieldViolation[]): never {
  throw new InvalidArgument(violations.map((one) => `${one.field}: ${one.description}`).join("; "), {
    reason: "INVALID_FIELDS",
    violations,
  });
}
