/**
 * All tasks and all devices as they change: where a reader stands.
 *
 * Neither stream has a history: on a new one everything comes anew, and what does not is gone.
 */

import type { FinetunedError } from "./errors.js";
import type { Device, WatchDevicesResponse } from "./gen/finetuned/v1/system_service.js";
import type { Task, TaskState } from "./gen/finetuned/v1/task.js";
import type { WatchTasksResponse } from "./gen/finetuned/v1/task_service.js";
import { type ConnectionLost, Outage, type Place } from "./outage.js";

const LONGEST_INTERVAL_MS = 60_000;

/** What a watch of the list of tasks yields. */
export type TasksItem =
  | {
      readonly type: "task";
      /** A task that is there, was created, or has changed; without its `parameters`, which `getTask` has. */
      readonly task: Task;
    }
  | {
      /** A task is not in the list any more: deleted, or out of the states that are watched. */
      readonly type: "deleted";
      /** `tasks/{task_id}`. */
      readonly name: string;
    }
  | {
      /** Every task that there is has come; what comes from now on is new. */
      readonly type: "synced";
      /** Tasks in the list. */
      readonly taskCount: number;
    }
  | ConnectionLost;

/** What a watch of the devices yields. */
export type DevicesItem =
  | {
      readonly type: "devices";
      /** Devices, GPUs first, the CPU last. */
      readonly devices: readonly Device[];
      /** The daemon's clock. */
      readonly time: Date | undefined;
    }
  | ConnectionLost;

/** What one watcher of the list of tasks has been told. */
export class TasksPlace implements Place<{ states: TaskState[] }, WatchTasksResponse, TasksItem> {
  readonly intervalMs = 0;
  readonly isDone = false;
  readonly #states: TaskState[];
  readonly #outage: Outage;
  readonly #known = new Set<string>();
  /** What has come on this stream; undefined once the list is whole. */
  #fresh: Set<string> | undefined;

  constructor(states: TaskState[], reconnectTimeoutMs: number | undefined) {
    this.#states = states;
    this.#outage = new Outage(reconnectTimeoutMs);
  }

  request(): { states: TaskState[] } {
    this.#fresh = new Set();
    return { states: this.#states };
  }

  accept(response: WatchTasksResponse): TasksItem[] {
    this.#outage.over();
    const message = response.response;
    switch (message?.$case) {
      case "task":
        this.#known.add(message.value.name);
        this.#fresh?.add(message.value.name);
        return [{ type: "task", task: message.value }];
      case "deleted":
        this.#fresh?.delete(message.value);
        // Of one that never came its deletion is no news.
        return this.#known.delete(message.value) ? [{ type: "deleted", name: message.value }] : [];
      case "synced": {
        const fresh = this.#fresh;
        const gone = fresh === undefined ? [] : [...this.#known].filter((name) => !fresh.has(name)).sort();
        for (const name of gone) this.#known.delete(name);
        this.#fresh = undefined;
        return [
          ...gone.map((name) => ({ type: "deleted", name }) as const),
          { type: "synced", taskCount: this.#known.size },
        ];
      }
      default: // a heartbeat, or what a later daemon may send
        return [];
    }
  }

  lost(error: FinetunedError | undefined): TasksItem | undefined {
    const told = this.#outage.take(error);
    return told && { type: "connectionLost", error: told };
  }

  delay(): number {
    return this.#outage.delay();
  }
}

/** A watcher of the devices, who needs only the newest message. */
export class DevicesPlace implements Place<{ intervalSeconds: number }, WatchDevicesResponse, DevicesItem> {
  readonly intervalMs: number;
  readonly isDone = false;
  readonly #asked: number;
  readonly #outage: Outage;

  constructor(intervalMs: number, reconnectTimeoutMs: number | undefined) {
    this.#asked = intervalMs / 1000;
    // Beyond the contract's bounds the daemon says what is wrong; a watchdog needs a time.
    this.intervalMs = intervalMs >= 0 && intervalMs <= LONGEST_INTERVAL_MS ? intervalMs : LONGEST_INTERVAL_MS;
    this.#outage = new Outage(reconnectTimeoutMs);
  }

  request(): { intervalSeconds: number } {
    return { intervalSeconds: this.#asked };
  }

  accept(response: WatchDevicesResponse): DevicesItem[] {
    this.#outage.over();
    return [{ type: "devices", devices: response.devices, time: response.time }];
  }

  lost(error: FinetunedError | undefined): DevicesItem | undefined {
    const told = this.#outage.take(error);
    return told && { type: "connectionLost", error: told };
  }

  delay(): number {
    return this.#outage.delay();
  }
}
