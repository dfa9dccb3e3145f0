/** The client. */

import { randomUUID } from "node:crypto";

import type { CallOptions, ClientOptions } from "./caller.js";
import { resumeChoice } from "./checkpoints.js";
import {
  configFormat,
  type ConfigFormatName,
  LEVELS,
  listOf,
  logLevel,
  taskState,
  type TaskStateName,
  trainingType,
  type TrainingTypeName,
} from "./enums.js";
import { DeadlineExceeded, NotFound, ProbeFailed, RunFailed } from "./errors.js";
import type { Event, ProbeReport, Result } from "./gen/finetuned/v1/event.js";
import { type Checkpoint, EndReason, type Run, type Task, TaskState } from "./gen/finetuned/v1/task.js";
import type {
  DeleteCheckpointResponse,
  DeleteTaskResponse,
  ExportTaskConfigResponse,
} from "./gen/finetuned/v1/task_service.js";
import { TaskHandle } from "./handle.js";
import { tasks } from "./methods.js";
import { addPage, type Metrics } from "./metrics.js";
import { type TasksItem, TasksPlace } from "./overview.js";
import type {
  ChangeOptions,
  CreateTaskOptions,
  DeleteTaskOptions,
  LogEntry,
  LogsOptions,
  MetricsOptions,
  StartTaskOptions,
  TrainOptions,
  UpdateTaskOptions,
  WaitOptions,
  WatchTaskOptions,
  WatchTasksOptions,
} from "./options.js";
import { maskOf, type ParametersInput, toParameters } from "./parameters.js";
import { Preparing, READING_MS } from "./preparing.js";
import { checkMs, shareTime, TimeLimit } from "./time_limit.js";
import { Cursor, hasEnded, type WatchItem } from "./watch.js";
import { wordOf } from "./words.js";

// Among which the end of a run is looked for, before all of its events are.
const LAST_EVENTS = 50;
// Reason of a `DeadlineExceeded` of what waits.
const RUN_GOES_ON = "RUN_GOES_ON";

/**
 * The daemon. Connects at the first call.
 *
 * Tasks are named by `tasks/{task_id}`, by the bare id, or by their display name; where an id and a display name are the same word,
 * the id wins. Every method throws {@link FinetunedError}s, and the reason of its `signal` where that is aborted. Calls that are
 * safe to repeat are repeated for up to 10 s while the daemon restarts. On a daemon of this machine paths may be relative or begin
 * with `~`.
 *
 * ```ts
 * const client = new Client({ startDaemon: true });
 * const task = await client.train("sft", {
 *   data: { trainFile: "chats.jsonl", modelPath: "~/models/small", outputDir: "out" },
 * });
 * for await (const item of task.watch()) console.log(item);
 * client.close();
 * ```
 */
export class Client extends Preparing {
  constructor(options: ClientOptions = {}) {
    super(options);
  }

  /** Create a task and start it, in one step. As `createTask` with `start`. */
  async train(type: TrainingTypeName, parameters: ParametersInput = {}, options: TrainOptions = {}): Promise<TaskHandle> {
    return new TaskHandle(this, await this.createTask(type, parameters, { ...options, start: true }));
  }

  /**
   * A task to work with, with the verbs as methods.
   *
   * @throws {@link NotFound} No such task.
   */
  async task(name: string, options: CallOptions = {}): Promise<TaskHandle> {
    return new TaskHandle(this, await this.getTask(name, options));
  }

  /**
   * Create a task.
   *
   * @param type `sft` or `pretrain`.
   * @param parameters Section to field to value, such as `{ training: { batchSize: 4 } }`; what is absent is the template's, else
   *   the default.
   * @throws {@link InvalidArgument} Fields are wrong, all of them in `violations`.
   * @throws {@link AlreadyExists} The id or the display name is taken.
   * @throws {@link NotFound} No such template.
   */
  async createTask(
    type: TrainingTypeName,
    parameters: ParametersInput = {},
    options: CreateTaskOptions = {},
  ): Promise<Task> {
    options = shareTime(options);
    const request = {
      task: {
        displayName: options.displayName ?? "",
        trainingType: trainingType(type),
        parameters: toParameters(parameters),
        device: options.device ?? "",
        template: options.template ? await this.resolveTemplate(options.template, options) : "",
      },
      taskId: options.taskId ?? "",
      start: options.start ?? false,
      requestId: options.requestId || randomUUID(),
      validateOnly: options.validateOnly ?? false,
      updateTemplate: options.updateTemplate ?? false,
    };
    return (await this.call(tasks.createTask, request, options, { timeoutMs: READING_MS })).task!;
  }

  /** All tasks, newest first, page by page; only those in one of `states` if there are any. */
  async *listTasks(
    options: CallOptions & {
      /** Only tasks in one of these states, such as `running`. */
      states?: TaskStateName | readonly TaskStateName[] | undefined;
    } = {},
  ): AsyncGenerator<Task, void, undefined> {
    const states = listOf(options.states).map(taskState);
    let pageToken = "";
    do {
      const page = await this.call(tasks.listTasks, { states, pageToken }, options);
      yield* page.tasks;
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /**
   * Change a task; what is not named stays. Earlier runs keep what they ran with.
   *
   * @throws {@link InvalidArgument} Fields are wrong, all of them in `violations`.
   * @throws {@link FailedPrecondition} It has a run that is not over, or no custom template to update.
   * @throws {@link AlreadyExists} The display name is taken.
   * @throws {@link Aborted} It has changed since `etag` was seen.
   */
  async updateTask(name: string, parameters: ParametersInput = {}, options: UpdateTaskOptions = {}): Promise<Task> {
    options = shareTime(options);
    const { displayName, device } = options;
    const given = toParameters(parameters);
    const updateMask = maskOf({ display_name: displayName, device }, given, options.reset);
    const request = {
      task: {
        name: await this.resolve(name, options),
        displayName: displayName ?? "",
        device: device ?? "",
        parameters: given,
        etag: options.etag ?? "",
      },
      updateMask,
      updateTemplate: options.updateTemplate ?? false,
      validateOnly: options.validateOnly ?? false,
    };
    return (await this.call(tasks.updateTask, request, options, { timeoutMs: READING_MS })).task!;
  }

  /**
   * Delete a task, its runs and events, and tell what became of its files.
   *
   * @throws {@link FailedPrecondition} It has a run that is not over.
   * @throws {@link Aborted} It has changed since `etag` was seen.
   */
  async deleteTask(name: string, options: DeleteTaskOptions = {}): Promise<DeleteTaskResponse> {
    options = shareTime(options);
    const allowMissing = options.allowMissing ?? false;
    let whole: string;
    try {
      whole = await this.resolve(name, options);
    } catch (error) {
      if (!allowMissing || !(error instanceof NotFound)) throw error;
      return { deletedFiles: 0, deletedBytes: 0, leftOutputDirs: [] };
    }
    const request = {
      name: whole,
      etag: options.etag ?? "",
      allowMissing,
      deleteOutputs: options.deleteOutputs ?? false,
    };
    // A repeat would be NOT_FOUND, so it is made only where that is no error.
    return this.call(tasks.deleteTask, request, options, { repeatable: allowMissing, timeoutMs: READING_MS });
  }

  /**
   * Start a new run of a task. It waits in the queue while its device is busy.
   *
   * @throws {@link InvalidArgument} Parameters are wrong or missing, all of them in `violations`.
   * @throws {@link FailedPrecondition} It has a run that is not over, or no such checkpoint.
   * @throws {@link Aborted} It has changed since `etag` was seen.
   */
  async startTask(name: string, options: StartTaskOptions = {}): Promise<Task> {
    return this.#start(name, options, false);
  }

  /**
   * Ask for the end of the run, with a checkpoint unless `discard`. See `wait` for the end.
   *
   * @throws {@link FailedPrecondition} It is neither queued nor running nor paused.
   */
  async stopTask(
    name: string,
    options: CallOptions & {
      /** Save no checkpoint. */
      discard?: boolean | undefined;
    } = {},
  ): Promise<Task> {
    options = shareTime(options);
    const request = { name: await this.resolve(name, options), discard: options.discard ?? false };
    return (await this.call(tasks.stopTask, request, options)).task!;
  }

  /**
   * Ask a run to save a checkpoint and to free its device; the same run goes on later. It returns when the wish is durable: watch
   * the task for its state PAUSED. A queued task is paused at once.
   *
   * @throws {@link FailedPrecondition} It is neither queued nor running, is stopping, or is a probe.
   */
  async pauseTask(name: string, options: CallOptions = {}): Promise<Task> {
    options = shareTime(options);
    return (await this.call(tasks.pauseTask, { name: await this.resolve(name, options) }, options)).task!;
  }

  /**
   * Let a paused run go on from its newest whole checkpoint. It waits in the queue before.
   *
   * @throws {@link InvalidArgument} Parameters can't be used any more, all of them in `violations`.
   * @throws {@link FailedPrecondition} It is not paused.
   * @throws {@link Aborted} It has changed since `etag` was seen.
   */
  async resumeTask(name: string, options: ChangeOptions = {}): Promise<Task> {
    options = shareTime(options);
    const request = {
      name: await this.resolve(name, options),
      etag: options.etag ?? "",
      requestId: options.requestId || randomUUID(),
    };
    return (await this.call(tasks.resumeTask, request, options, { timeoutMs: READING_MS })).task!;
  }

  /**
   * Move a queued task to another place in the queue of its device.
   *
   * @param position From 1, the next to run. Beyond the end: last.
   * @throws {@link InvalidArgument} The position is below 1.
   * @throws {@link FailedPrecondition} It is not queued.
   */
  async moveTask(name: string, position: number, options: CallOptions = {}): Promise<Task> {
    options = shareTime(options);
    // What a field of 32 bits can't hold is as far from the queue as what it can.
    const bounded = Math.max(-(2 ** 31), Math.min(position, 2 ** 31 - 1));
    const request = { name: await this.resolve(name, options), position: bounded };
    return (await this.call(tasks.moveTask, request, options)).task!;
  }

  /**
   * Start a probe of a task: three real steps on its longest samples, which are thrown away. It leaves nothing in the output folder.
   * Its `probeReport` comes among the events of the run that the answer names; then the task is what it was before, unless the probe
   * has failed. Estimates on this machine are corrected by it from then on.
   *
   * @throws {@link InvalidArgument} Parameters are wrong or missing, all of them in `violations`.
   * @throws {@link FailedPrecondition} It is queued or running already.
   * @throws {@link Aborted} It has changed since `etag` was seen.
   */
  async startProbe(name: string, options: ChangeOptions = {}): Promise<Task> {
    return this.#start(name, options, true);
  }

  /**
   * Probe a task, wait for the end, and tell what a run of it would take.
   *
   * @throws {@link ProbeFailed} It has failed as a run would, or was stopped; `reason` says why.
   * @throws {@link DeadlineExceeded} It has not ended within `timeoutMs`; `reason` is `RUN_GOES_ON`.
   * @throws {@link InvalidArgument} Parameters are wrong or missing, all of them in `violations`.
   * @throws {@link FailedPrecondition} It is queued or running already.
   */
  async probeTask(name: string, options: CallOptions = {}): Promise<ProbeReport> {
    options = shareTime(options);
    const task = await this.startProbe(name, options);
    let report: ProbeReport | undefined;
    let result: Result | undefined;
    const limit = new TimeLimit(options.timeoutMs, options.signal);
    try {
      for await (const item of this.watchTask(task.name, { afterSeq: task.lastSeq, signal: limit.signal })) {
        if (item.type !== "event" || item.event.run !== task.run) continue;
        const { payload } = item.event;
        if (payload?.$case === "probeReport") report = payload.value;
        if (payload?.$case === "result") result = payload.value;
        if (payload?.$case === "stateChange" && payload.value.endReason !== EndReason.UNSPECIFIED) break;
      }
    } catch (error) {
      if (error !== limit.passed) throw error;
      const message = `the probe of ${task.displayName} has not ended in time; it goes on`;
      throw new DeadlineExceeded(message, { reason: RUN_GOES_ON });
    } finally {
      limit.clear();
    }
    if (report !== undefined) return report;
    const reason = wordOf(result?.endReason ?? EndReason.UNSPECIFIED, "END_REASON").toUpperCase();
    throw new ProbeFailed(result?.message ?? "the probe has ended without an answer", { reason });
  }

  /** The runs of a task, newest first, page by page. */
  async *listRuns(name: string, options: CallOptions = {}): AsyncGenerator<Run, void, undefined> {
    const parent = await this.resolve(name, options);
    let pageToken = "";
    do {
      const page = await this.call(tasks.listRuns, { parent, pageToken }, options);
      yield* page.runs;
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /** The checkpoints of a task that still stand, newest first, page by page. One that is not whole says why in `problem`. */
  async *listCheckpoints(
    name: string,
    options: CallOptions & {
      /** Compare the hashes of all files, which takes as long as reading them; else names and sizes. */
      verify?: boolean | undefined;
    } = {},
  ): AsyncGenerator<Checkpoint, void, undefined> {
    const parent = await this.resolve(name, options);
    const verify = options.verify ?? false;
    let pageToken = "";
    do {
      const request = { parent, verify, pageToken };
      const page = await this.call(tasks.listCheckpoints, request, options, { timeoutMs: READING_MS });
      yield* page.checkpoints;
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /**
   * Delete a checkpoint: the files that its run recorded writing, and no others.
   *
   * @param name The checkpoint's `name`.
   * @throws {@link NotFound} There is none of that name.
   * @throws {@link FailedPrecondition} Its task has a run that is not over, or another goes on from it.
   */
  async deleteCheckpoint(name: string, options: CallOptions = {}): Promise<DeleteCheckpointResponse> {
    // A repeat would be NOT_FOUND.
    return this.call(tasks.deleteCheckpoint, { name }, options, { repeatable: false, timeoutMs: READING_MS });
  }

  /** The events of a task so far, oldest first, page by page. */
  async *listEvents(
    name: string,
    options: CallOptions & {
      /** Last `seq` already seen. */
      afterSeq?: number | undefined;
      /** Only events of this run. */
      run?: number | undefined;
    } = {},
  ): AsyncGenerator<Event, void, undefined> {
    const parent = await this.resolve(name, options);
    const run = options.run ?? 0;
    let afterSeq = options.afterSeq ?? 0;
    for (;;) {
      const page = await this.call(tasks.listEvents, { parent, afterSeq, run }, options);
      yield* page.events;
      const last = page.events.at(-1);
      if (last === undefined || last.seq >= page.lastSeq) return;
      afterSeq = last.seq;
    }
  }

  /**
   * The log of a task, oldest line first.
   *
   * @throws {@link InvalidArgument} No such level.
   */
  async *logs(name: string, options: LogsOptions = {}): AsyncGenerator<LogEntry, void, undefined> {
    // A level that a later daemon may send is shown rather than lost.
    const hidden: readonly string[] = LEVELS.slice(0, LEVELS.indexOf(logLevel(options.level ?? "info")));
    for await (const { time, run, seq, payload } of this.#eventsOf(name, options)) {
      if (payload?.$case !== "logLine" || hidden.includes(payload.value.level)) continue;
      if (!options.run || options.run === run) yield { ...payload.value, time, run, seq };
    }
  }

  /**
   * Follow a task: a `snapshot` of it, then its events after `afterSeq`, old and new.
   *
   * Where the connection breaks, or nothing at all comes for 20 s, a `connectionLost` comes, and the watch goes on by itself when the
   * daemon is back: with a new `snapshot` and the events after the last one. No event is missed or comes twice. Where the daemon has
   * another log by then, after a restore or a loss of power, a `logReplaced` says so, and the events of the new log follow from the
   * first on. Leaving the loop closes the stream.
   *
   * @throws {@link NotFound} No such task, or it was deleted meanwhile.
   * @throws {@link OutOfRange} The log that `afterSeq` is of was restored or cut: watch again from 0.
   * @throws {@link EventsLost} The daemon left out or repeated events.
   * @throws {@link DaemonUnavailable} It was away for longer than `reconnectTimeoutMs`, or never there.
   */
  async *watchTask(name: string, options: WatchTaskOptions = {}): AsyncGenerator<WatchItem, void, undefined> {
    const { signal } = options;
    const cursor = new Cursor(await this.resolve(name, { signal }), {
      afterSeq: options.afterSeq ?? 0,
      logEpoch: options.logEpoch ?? "",
      untilEnd: options.untilEnd ?? false,
      reconnectTimeoutMs: options.reconnectTimeoutMs,
    });
    yield* this.follow(tasks.watchTask, cursor, options);
  }

  /**
   * Follow the list of tasks: each as a `task`, then a `synced`, then each that is created or changes; one that is not in the list
   * any more as `deleted`. Of one that changes faster than it is read, the newest comes.
   *
   * Where the connection breaks, a `connectionLost` comes, and the watch goes on by itself when the daemon is back: all tasks come
   * again, what has gone meanwhile as `deleted`, then a `synced`. So a map of tasks by name is all that a reader keeps.
   *
   * @throws {@link InvalidArgument} No such state.
   * @throws {@link DaemonUnavailable} It was away for longer than `reconnectTimeoutMs`, or never there.
   */
  async *watchTasks(options: WatchTasksOptions = {}): AsyncGenerator<TasksItem, void, undefined> {
    const place = new TasksPlace(listOf(options.states).map(taskState), options.reconnectTimeoutMs);
    yield* this.follow(tasks.watchTasks, place, options);
  }

  /**
   * The task when its run has ended: at once if it has, else as long as it takes. One that is paused or was never started is waited
   * for.
   *
   * @throws {@link DeadlineExceeded} It has not ended within `timeoutMs`; `reason` is `RUN_GOES_ON`.
   * @throws {@link RunFailed} It has failed, and `throwOnFailure` is set.
   */
  async wait(name: string, options: WaitOptions = {}): Promise<Task> {
    const { signal, timeoutMs } = options;
    if (timeoutMs !== undefined) checkMs("timeoutMs", timeoutMs);
    let task = await this.getTask(name, { signal });
    if (!hasEnded(task)) {
      const limit = new TimeLimit(timeoutMs, signal);
      try {
        const watch = this.watchTask(task.name, { afterSeq: task.lastSeq, untilEnd: true, signal: limit.signal });
        for await (const item of watch) void item;
      } catch (error) {
        if (error !== limit.passed) throw error;
        const message = `${task.displayName} has not ended within ${timeoutMs} ms; it goes on`;
        throw new DeadlineExceeded(message, { reason: RUN_GOES_ON });
      } finally {
        limit.clear();
      }
      task = await this.getTask(task.name, { signal });
    }
    if (options.throwOnFailure && task.state === TaskState.FAILED) {
      const word = wordOf(task.endReason, "END_REASON").replaceAll("_", " ");
      const result = await this.#resultOf(task, signal);
      throw new RunFailed(`${task.displayName} failed (${word}): ${task.endMessage}`, task, result);
    }
    return task;
  }

  /**
   * The curves of a run: every value that was measured, in order of steps.
   *
   * @throws {@link NotFound} No such task, or no such run.
   * @throws {@link InvalidArgument} A number is out of its range.
   */
  async metrics(name: string, options: MetricsOptions = {}): Promise<Metrics> {
    options = shareTime(options);
    const request = {
      name: await this.resolve(name, options),
      run: options.run ?? 0,
      metrics: [...listOf(options.names)],
      afterStep: options.afterStep ?? 0,
      maxPoints: options.maxPoints ?? 0,
      pageToken: "",
    };
    const result: Metrics = { run: request.run, series: {} };
    for (;;) {
      const page = await this.call(tasks.getMetrics, request, options);
      addPage(result, page);
      if (!page.nextPageToken) return result;
      // The pages are of one run, whatever is started meanwhile.
      request.run = page.run;
      request.pageToken = page.nextPageToken;
    }
  }

  /**
   * The settings of a task as a file: its `content`, and a `fileName` for it. `leftOut` names what a script trains without.
   *
   * @throws {@link NotFound} No such task, or no such run.
   * @throws {@link InvalidArgument} A script of a task that lacks its model, data or output folder.
   */
  async exportConfig(
    name: string,
    options: CallOptions & {
      /** Number of the run whose settings are meant. Absent: the task's as they are now. */
      run?: number | undefined;
      /** `yaml` (default), which `finetunectl train` reads; or `script`, a Python program that trains alike. */
      format?: ConfigFormatName | undefined;
    } = {},
  ): Promise<ExportTaskConfigResponse> {
    options = shareTime(options);
    const format = configFormat(options.format ?? "yaml");
    const request = { name: await this.resolve(name, options), run: options.run ?? 0, format };
    return this.call(tasks.exportTaskConfig, request, options);
  }

  /** How the latest run ended: looked for among the last events before all are read. */
  async #resultOf({ name, run, lastSeq }: Task, signal: AbortSignal | undefined): Promise<Result | undefined> {
    for (const afterSeq of [Math.max(lastSeq - LAST_EVENTS, 0), 0]) {
      let result: Result | undefined;
      for await (const { payload } of this.listEvents(name, { afterSeq, run, signal })) {
        if (payload?.$case === "result") result = payload.value; // a run that went on after a full disk has more than one
      }
      if (result !== undefined) return result;
    }
    return undefined;
  }

  async #start(name: string, options: StartTaskOptions, probe: boolean): Promise<Task> {
    options = shareTime(options);
    const request = {
      name: await this.resolve(name, options),
      etag: options.etag ?? "",
      requestId: options.requestId || randomUUID(),
      ...resumeChoice(options.resume),
      probe,
    };
    return (await this.call(tasks.startTask, request, options, { timeoutMs: READING_MS })).task!;
  }

  async *#eventsOf(name: string, options: LogsOptions): AsyncGenerator<Event, void, undefined> {
    if (!options.follow) {
      const { signal, timeoutMs, run } = options;
      yield* this.listEvents(name, { signal, timeoutMs, run });
      return;
    }
    for await (const item of this.watchTask(name, { untilEnd: true, signal: options.signal })) {
      if (item.type === "event") yield item.event;
    }
  }
}
