/** A task to work with: what `client.task(name)` and `client.train(...)` return. */

import { inspect, type InspectOptions } from "node:util";

import type { CallOptions } from "./caller.js";
import type { Client } from "./client.js";
import type { ConfigFormatName } from "./enums.js";
import { RunFailed } from "./errors.js";
import type { Event, ProbeReport } from "./gen/finetuned/v1/event.js";
import type { EstimateTaskResponse } from "./gen/finetuned/v1/parameter_service.js";
import type { Parameters } from "./gen/finetuned/v1/parameters.js";
import {
  type Checkpoint,
  type EndReason,
  type Progress,
  type Run,
  RunPhase,
  type Task,
  type TaskState,
  type TrainingType,
} from "./gen/finetuned/v1/task.js";
import type { DeleteTaskResponse, ExportTaskConfigResponse } from "./gen/finetuned/v1/task_service.js";
import type { Metrics } from "./metrics.js";
import type {
  ChangeOptions,
  DeleteTaskOptions,
  LogEntry,
  LogsOptions,
  MetricsOptions,
  StartTaskOptions,
  UpdateTaskOptions,
  WaitOptions,
  WatchTaskOptions,
} from "./options.js";
import type { ParametersInput } from "./parameters.js";
import type { ParameterViolation } from "./preparing.js";
import { shareTime } from "./time_limit.js";
import { hasEnded, type WatchItem } from "./watch.js";
import { wordOf } from "./words.js";

/** A task, with what can be done with it. A verb that changes the task returns the handle itself. */
export class TaskHandle {
  readonly #client: Client;
  #seen: Task;

  /** What clients do; `client.task(name)` is the way to one. */
  constructor(client: Client, task: Task) {
    this.#client = client;
    this.#seen = task;
  }

  /** Resource name, `tasks/{task_id}`; never changes. */
  get name(): string {
    return this.#seen.name;
  }

  /** The task as it was last seen; `refresh` looks again, every verb does, and a watch keeps it up to date. */
  get task(): Task {
    return this.#seen;
  }

  /** What a user sees. */
  get displayName(): string {
    return this.#seen.displayName;
  }

  /** What it is trained for. */
  get trainingType(): TrainingType {
    return this.#seen.trainingType;
  }

  /** What it trains with. */
  get parameters(): Parameters | undefined {
    return this.#seen.parameters;
  }

  /** Where it stands; `stateName` says it in a word. */
  get state(): TaskState {
    return this.#seen.state;
  }

  /** What a run that goes on does at the moment. */
  get phase(): RunPhase {
    return this.#seen.phase;
  }

  /** Number of the newest run; 0 before the first. */
  get run(): number {
    return this.#seen.run;
  }

  /** How far the newest run is; undefined before its first step. */
  get progress(): Progress | undefined {
    return this.#seen.progress;
  }

  /** Why the newest run ended. */
  get endReason(): EndReason {
    return this.#seen.endReason;
  }

  /** The same in a sentence. */
  get endMessage(): string {
    return this.#seen.endMessage;
  }

  /** Folder of the newest checkpoint; empty where there is none. */
  get lastCheckpoint(): string {
    return this.#seen.lastCheckpoint;
  }

  /** What `console.log` shows. */
  [inspect.custom](_depth: number, options: InspectOptions): string {
    const { name, displayName, stateName, run, progress, endMessage } = this;
    const seen = {
      ...{ name, displayName, state: stateName, run },
      ...(progress && { step: progress.step, totalSteps: progress.totalSteps, loss: progress.loss }),
      ...(endMessage && { endMessage }),
    };
    return `TaskHandle ${inspect(seen, options)}`;
  }

  /** Where it stands, such as `running`. */
  get stateName(): string {
    return wordOf(this.#seen.state, "TASK_STATE");
  }

  /** The id alone; never changes. */
  get id(): string {
    return this.name.replace(/^tasks\//, "");
  }

  /** Whether no run of it waits, goes on or is paused, and one was there. */
  get hasEnded(): boolean {
    return hasEnded(this.#seen);
  }

  /** Look again. */
  async refresh(options: CallOptions = {}): Promise<this> {
    return this.#see(await this.#client.getTask(this.name, options));
  }

  /** As `Client.startTask`. */
  async start(options: StartTaskOptions = {}): Promise<this> {
    return this.#see(await this.#client.startTask(this.name, options));
  }

  /** As `Client.stopTask`: it asks for the end; `wait` waits for it. */
  async stop(options: CallOptions & { discard?: boolean | undefined } = {}): Promise<this> {
    return this.#see(await this.#client.stopTask(this.name, options));
  }

  /** As `Client.pauseTask`. */
  async pause(options: CallOptions = {}): Promise<this> {
    return this.#see(await this.#client.pauseTask(this.name, options));
  }

  /** As `Client.resumeTask`. */
  async resume(options: ChangeOptions = {}): Promise<this> {
    return this.#see(await this.#client.resumeTask(this.name, options));
  }

  /** As `Client.moveTask`. */
  async move(position: number, options: CallOptions = {}): Promise<this> {
    return this.#see(await this.#client.moveTask(this.name, position, options));
  }

  /** As `Client.updateTask`. */
  async update(parameters: ParametersInput = {}, options: UpdateTaskOptions = {}): Promise<this> {
    return this.#see(await this.#client.updateTask(this.name, parameters, options));
  }

  /** As `Client.deleteTask`. */
  async delete(options: DeleteTaskOptions = {}): Promise<DeleteTaskResponse> {
    return this.#client.deleteTask(this.name, options);
  }

  /**
   * Wait for the end of the run. One that is paused or was never started is waited for.
   *
   * @throws {@link DeadlineExceeded} It has not ended within `timeoutMs`; `reason` is `RUN_GOES_ON`.
   * @throws {@link RunFailed} It has failed, unless `throwOnFailure` is false.
   */
  async wait(options: WaitOptions = {}): Promise<this> {
    try {
      return this.#see(await this.#client.wait(this.name, { throwOnFailure: true, ...options }));
    } catch (error) {
      if (error instanceof RunFailed) this.#see(error.task);
      throw error;
    }
  }

  /** As `Client.watchTask`, to the end of the run unless `untilEnd` is false. */
  async *watch(options: WatchTaskOptions = {}): AsyncGenerator<WatchItem, void, undefined> {
    for await (const item of this.#client.watchTask(this.name, { untilEnd: true, ...options })) {
      if (item.type === "snapshot") this.#see(item.task);
      if (item.type === "event") this.#seeEvent(item.event);
      yield item;
    }
  }

  /** As `Client.metrics`. */
  async metrics(options: MetricsOptions = {}): Promise<Metrics> {
    return this.#client.metrics(this.name, options);
  }

  /** As `Client.logs`. */
  logs(options: LogsOptions = {}): AsyncGenerator<LogEntry, void, undefined> {
    return this.#client.logs(this.name, options);
  }

  /** As `Client.listEvents`. */
  events(
    options: CallOptions & { afterSeq?: number | undefined; run?: number | undefined } = {},
  ): AsyncGenerator<Event, void, undefined> {
    return this.#client.listEvents(this.name, options);
  }

  /** As `Client.listRuns`. */
  runs(options: CallOptions = {}): AsyncGenerator<Run, void, undefined> {
    return this.#client.listRuns(this.name, options);
  }

  /** As `Client.listCheckpoints`. */
  checkpoints(options: CallOptions & { verify?: boolean | undefined } = {}): AsyncGenerator<Checkpoint, void, undefined> {
    return this.#client.listCheckpoints(this.name, options);
  }

  /** As `Client.validate`: of the task as it is, or of an edit of it. */
  async validate(parameters: ParametersInput = {}, options: CallOptions = {}): Promise<ParameterViolation[]> {
    return this.#client.validate(undefined, parameters, { ...options, task: this.name });
  }

  /** As `Client.estimate`: of the task as it is, or of an edit of it. */
  async estimate(
    parameters: ParametersInput = {},
    options: CallOptions & { resume?: string | undefined } = {},
  ): Promise<EstimateTaskResponse> {
    return this.#client.estimate(undefined, parameters, { ...options, task: this.name });
  }

  /** As `Client.probeTask`. */
  async probe(options: CallOptions = {}): Promise<ProbeReport> {
    options = shareTime(options);
    const report = await this.#client.probeTask(this.name, options);
    await this.refresh(options);
    return report;
  }

  /** As `Client.exportConfig`. */
  async exportConfig(
    options: CallOptions & { run?: number | undefined; format?: ConfigFormatName | undefined } = {},
  ): Promise<ExportTaskConfigResponse> {
    return this.#client.exportConfig(this.name, options);
  }

  #see(task: Task): this {
    this.#seen = task;
    return this;
  }

  /** Takes what a watch has told. */
  #seeEvent(event: Event): void {
    if (event.seq <= this.#seen.lastSeq) return;
    const seen = { ...this.#seen, lastSeq: event.seq };
    if (event.run > seen.run) {
      Object.assign(seen, { run: event.run, progress: undefined, endMessage: "", lastCheckpoint: "" });
    }
    switch (event.payload?.$case) {
      case "stateChange": {
        const { newState, endReason, message } = event.payload.value;
        Object.assign(seen, { state: newState, phase: RunPhase.UNSPECIFIED, endReason, endMessage: message });
        break;
      }
      case "phaseChange":
        seen.phase = event.payload.value.phase;
        break;
      case "progress":
        seen.progress = event.payload.value;
        break;
      case "checkpointSaved":
        seen.lastCheckpoint = event.payload.value.path;
        break;
      default:
        break;
    }
    this.#seen = seen;
  }
}
