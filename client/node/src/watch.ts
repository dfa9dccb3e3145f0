/** Where a watcher stands in a task's event log: what to ask for, what to pass on, when it ends. */

import { EventsLost, type FinetunedError, OutOfRange } from "./errors.js";
import type { Event } from "./gen/finetuned/v1/event.js";
import { EndReason, type Task, TaskState } from "./gen/finetuned/v1/task.js";
import type { Snapshot, WatchTaskResponse } from "./gen/finetuned/v1/task_service.js";
import { type ConnectionLost, Outage, type Place } from "./outage.js";

const ENDED: ReadonlySet<TaskState> = new Set([TaskState.COMPLETED, TaskState.STOPPED, TaskState.FAILED]);

// Reasons why a place that was good is none any more.
const REPLACED: ReadonlySet<string> = new Set(["LOG_EPOCH_CHANGED", "LOG_REPLACED", "SEQ_BEYOND_LAST"]);

/** What a watch of a task yields: the task first and after each reconnection, then events by `seq`. */
export type WatchItem =
  | {
      readonly type: "snapshot";
      /** The task as it stands. Events up to `task.lastSeq` that were not seen yet follow. */
      readonly task: Task;
      /** Tells this event log from one restored from a backup. */
      readonly logEpoch: string;
      /** Oldest `seq` that is kept. */
      readonly firstSeq: number;
    }
  | {
      readonly type: "event";
      /** One entry of the log; `event.payload` says what happened, by its `$case`. */
      readonly event: Event;
    }
  | (ConnectionLost & {
      /** Last `seq` seen before. */
      readonly afterSeq: number;
    })
  | {
      /**
       * There is another log now, and the watch goes on in it: after a restore or a loss of power, or where the task was deleted
       * and made again under its id. A snapshot comes next, and then the events of the new log from its first on: what was made
       * of those before is to be thrown away.
       */
      readonly type: "logReplaced";
      /** Last `seq` seen of the log before. */
      readonly afterSeq: number;
    };

/** Whether no run of the task is going on or waiting. */
export function hasEnded(task: Task): boolean {
  return ENDED.has(task.state);
}

/** What a watch of a task begins with. */
export interface CursorOptions {
  readonly afterSeq: number;
  readonly logEpoch: string;
  readonly untilEnd: boolean;
  readonly reconnectTimeoutMs: number | undefined;
}

interface WatchTaskAsked {
  readonly name: string;
  readonly afterSeq: number;
  readonly logEpoch: string;
  readonly allowBatches: boolean;
}

/** The place of one watcher in one task's log. */
export class Cursor implements Place<WatchTaskAsked, WatchTaskResponse, WatchItem> {
  readonly intervalMs = 0;
  isDone = false;
  readonly #name: string;
  readonly #untilEnd: boolean;
  readonly #outage: Outage;
  #seq: number;
  #logEpoch: string;
  #created: number | undefined;
  #endSeq: number | undefined;
  #historySeq = 0;
  #wasFollowed = false;

  constructor(name: string, options: CursorOptions) {
    this.#name = name;
    this.#seq = options.afterSeq;
    this.#logEpoch = options.logEpoch;
    this.#untilEnd = options.untilEnd;
    this.#outage = new Outage(options.reconnectTimeoutMs);
  }

  request(): WatchTaskAsked {
    return { name: this.#name, afterSeq: this.#seq, logEpoch: this.#logEpoch, allowBatches: true };
  }

  accept(response: WatchTaskResponse): WatchItem[] {
    this.#outage.over();
    switch (response.response?.$case) {
      case "snapshot":
        return this.#acceptSnapshot(response.response.value);
      case "event":
        this.#acceptEvent(response.response.value);
        return [{ type: "event", event: response.response.value }];
      case "events":
        return this.#acceptEvents(response.response.value.events);
      default: // a heartbeat, or what a later daemon may send
        return [];
    }
  }

  lost(error: FinetunedError | undefined): WatchItem | undefined {
    if (error instanceof OutOfRange && REPLACED.has(error.reason) && this.#wasFollowed) {
      const replaced = { type: "logReplaced", afterSeq: this.#seq } as const;
      this.#seq = 0;
      this.#logEpoch = "";
      this.#created = undefined;
      return replaced;
    }
    const told = this.#outage.take(error);
    return told && { type: "connectionLost", error: told, afterSeq: this.#seq };
  }

  delay(): number {
    return this.#outage.delay();
  }

  #acceptSnapshot(snapshot: Snapshot): WatchItem[] {
    const { task, logEpoch, firstSeq } = snapshot;
    if (task === undefined) return [];
    if ((this.#logEpoch !== "" && this.#logEpoch !== logEpoch) || task.lastSeq < this.#seq) {
      throw new OutOfRange(`the event log of ${this.#name} was restored; watch again from 0`, { reason: "LOG_REPLACED" });
    }
    const created = task.createTime?.getTime(); // one id may be given to two tasks in turn
    if (this.#created !== undefined && this.#created !== created) {
      throw new OutOfRange(`${this.#name} was deleted and made again; watch again from 0`, { reason: "LOG_REPLACED" });
    }
    this.#logEpoch = logEpoch;
    this.#created = created;
    this.#wasFollowed = true;
    // Up to here it is history: ends of earlier runs among it end no watch. Of a task that was never started otherwise, what has
    // ended since is a probe.
    this.#historySeq = task.state === TaskState.PENDING && this.#seq > 0 ? this.#seq : task.lastSeq;
    // The log begins with the oldest event that the daemon has kept.
    if (this.#seq === 0) this.#seq = Math.max(firstSeq - 1, 0);
    this.#endSeq = hasEnded(task) ? task.lastSeq : undefined;
    this.#finishAtEnd();
    return [{ type: "snapshot", task, logEpoch, firstSeq }];
  }

  #acceptEvents(events: readonly Event[]): WatchItem[] {
    const accepted: WatchItem[] = [];
    for (const event of events) {
      if (this.isDone) break; // the end of the run need not be the last of the batch
      this.#acceptEvent(event);
      accepted.push({ type: "event", event });
    }
    return accepted;
  }

  #acceptEvent(event: Event): void {
    if (event.seq !== this.#seq + 1) {
      throw new EventsLost(`event ${event.seq} of ${this.#name} came where ${this.#seq + 1} was due`, {
        reason: "SEQ_NOT_DENSE",
      });
    }
    this.#seq = event.seq;
    if (event.seq > this.#historySeq && isEnd(event)) this.#endSeq = event.seq;
    this.#finishAtEnd();
  }

  #finishAtEnd(): void {
    if (this.#untilEnd && this.#endSeq !== undefined && this.#seq >= this.#endSeq) this.isDone = true;
  }
}

/** Whether a run has ended, be it a probe after which its task is what it was before. */
function isEnd(event: Event): boolean {
  if (event.payload?.$case !== "stateChange") return false;
  const { newState, endReason } = event.payload.value;
  if (newState === TaskState.PAUSED) return false; // for want of space, say: it goes on
  return ENDED.has(newState) || endReason !== EndReason.UNSPECIFIED;
}
