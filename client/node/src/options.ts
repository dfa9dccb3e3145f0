/** What the methods of a client take beside names and parameters, and what they give line by line. */

import type { CallOptions, StreamOptions } from "./caller.js";
import type { LogLevel, TaskStateName } from "./enums.js";
import type { LogLine } from "./gen/finetuned/v1/event.js";

/** How a task is created. */
export interface TrainOptions extends CallOptions {
  /** What a user sees; unique. Absent: made from type and time. */
  displayName?: string | undefined;
  /** `cpu`, `cuda:0` ... Absent: the first GPU if there is one, else the CPU. */
  device?: string | undefined;
  /** The id within `tasks/{task_id}`. Absent: the daemon chooses. */
  taskId?: string | undefined;
  /** Makes repeats of this call by yourself safe. Absent: a new one. */
  requestId?: string | undefined;
  /** Any name of a template, for absent parameters. */
  template?: string | undefined;
  /** Write the task's parameters into that custom template too. */
  updateTemplate?: boolean | undefined;
}

/** How a task is created, and whether it is started. */
export interface CreateTaskOptions extends TrainOptions {
  /** Start it as well. */
  start?: boolean | undefined;
  /** Check and write nothing. */
  validateOnly?: boolean | undefined;
}

/** How a task is changed. */
export interface UpdateTaskOptions extends CallOptions {
  /** A new one; absent: as it is. */
  displayName?: string | undefined;
  /** A new one; empty: the default. Absent: as it is. */
  device?: string | undefined;
  /** Parameters or sections, such as `training.batchSize`, that go back to their defaults; `parameters`: all of them. */
  reset?: string | readonly string[] | undefined;
  /** Write the task's parameters into its custom template too. */
  updateTemplate?: boolean | undefined;
  /** Check and write nothing. */
  validateOnly?: boolean | undefined;
  /** The task's `etag` when it was seen; absent: whatever is there. */
  etag?: string | undefined;
}

/** How a task is deleted. */
export interface DeleteTaskOptions extends CallOptions {
  /** The task's `etag` when it was seen; absent: whatever is there. */
  etag?: string | undefined;
  /** Succeed where there is no such task. */
  allowMissing?: boolean | undefined;
  /** Delete what its runs recorded writing into their output folders too. */
  deleteOutputs?: boolean | undefined;
}

/** What makes a change of what goes on safe. */
export interface ChangeOptions extends CallOptions {
  /** The task's `etag` when it was seen; absent: whatever is there. */
  etag?: string | undefined;
  /** Makes repeats of this call by yourself safe. Absent: a new one. */
  requestId?: string | undefined;
}

/** How a run is started. */
export interface StartTaskOptions extends ChangeOptions {
  /** The checkpoint that this run goes on from: `newest`, `best` or its folder. Absent: as the task's parameters say. */
  resume?: string | undefined;
}

/** How a task is watched. */
export interface WatchTaskOptions extends StreamOptions {
  /** Last `seq` already seen. Absent: from the first event. */
  afterSeq?: number | undefined;
  /** The `logEpoch` of the snapshot in which it was seen; checked if given. */
  logEpoch?: string | undefined;
  /**
   * End when the task's run has ended; else the watch has no end. A pause is no end, and a task that was never started is waited
   * for.
   */
  untilEnd?: boolean | undefined;
  /** Milliseconds to keep trying while the daemon is away; default: for ever. */
  reconnectTimeoutMs?: number | undefined;
}

/** How the list of tasks is watched. */
export interface WatchTasksOptions extends StreamOptions {
  /** Only tasks in one of these states, such as `running`. Absent: all. */
  states?: TaskStateName | readonly TaskStateName[] | undefined;
  /** Milliseconds to keep trying while the daemon is away; default: for ever. */
  reconnectTimeoutMs?: number | undefined;
}

/** Which values of a run are wanted. */
export interface MetricsOptions extends CallOptions {
  /** Number of the run. Absent: the newest that trained or trains, probes left out. */
  run?: number | undefined;
  /** Names of the values wanted, such as `loss`. Absent: all. */
  names?: string | readonly string[] | undefined;
  /** Only steps after this one. */
  afterStep?: number | undefined;
  /** Points a curve at most, 2 to 10000: of each stretch its lowest and highest value stay. Absent: every point. */
  maxPoints?: number | undefined;
}

/** Which lines of a log are wanted. */
export interface LogsOptions extends CallOptions {
  /** The least: `debug`, `info` (default), `warning` or `error`. */
  level?: LogLevel | Uppercase<LogLevel> | undefined;
  /** Number of the run. Absent: all. */
  run?: number | undefined;
  /** Go on until the run has ended. */
  follow?: boolean | undefined;
}

/** One line of a run's log. */
export interface LogEntry extends LogLine {
  /** When it was written. */
  readonly time: Date | undefined;
  /** Number of the run. */
  readonly run: number;
  /** Its place in the task's event log. */
  readonly seq: number;
}

/** How the end of a run is waited for. */
export interface WaitOptions extends StreamOptions {
  /** Milliseconds to wait at most; the run goes on after that. Absent: for ever. */
  timeoutMs?: number | undefined;
  /** Make an end in failure an error; else see `state`, `endReason` and `endMessage`. */
  throwOnFailure?: boolean | undefined;
}
