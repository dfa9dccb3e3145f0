/** Words for the values of enums: `sft` for `TRAINING_TYPE_SFT`. */

import { refuse } from "./errors.js";
import { BadLinePolicy } from "./gen/finetuned/v1/dataset_service.js";
import { TaskState, TrainingType } from "./gen/finetuned/v1/task.js";
import { ConfigFormat } from "./gen/finetuned/v1/task_service.js";
import { shown } from "./words.js";

type Word<E extends string, P extends string> = E extends `${P}_${infer W}` ? Exclude<Lowercase<W>, "unspecified"> : never;
type OrWord<E extends string, P extends string> = Exclude<E, `${P}_UNSPECIFIED` | "UNRECOGNIZED"> | Word<E, P>;

/** `sft` or `pretrain`, or a value of {@link TrainingType}. */
export type TrainingTypeName = OrWord<TrainingType, "TRAINING_TYPE">;
/** `pending`, `queued`, `running` ..., or a value of {@link TaskState}. */
export type TaskStateName = OrWord<TaskState, "TASK_STATE">;
/** `yaml` or `script`, or a value of {@link ConfigFormat}. */
export type ConfigFormatName = OrWord<ConfigFormat, "CONFIG_FORMAT">;
/** `fail` or `skip`, or a value of {@link BadLinePolicy}. */
export type BadLinePolicyName = OrWord<BadLinePolicy, "BAD_LINE_POLICY">;

/** Each of these; one that stands alone is one. */
export function listOf<T>(oneOrMore: T | readonly T[] | undefined): readonly T[] {
  if (oneOrMore === undefined) return [];
  return Array.isArray(oneOrMore) ? oneOrMore : [oneOrMore as T];
}

/** The training type for `sft` or `pretrain`. */
export function trainingType(value: TrainingTypeName): TrainingType {
  return choose(TrainingType, "TRAINING_TYPE", "training_type", value);
}

/** The state for `running` and its like. */
export function taskState(value: TaskStateName): TaskState {
  return choose(TaskState, "TASK_STATE", "states", value);
}

/** The format for `yaml` or `script`. */
export function configFormat(value: ConfigFormatName): ConfigFormat {
  return choose(ConfigFormat, "CONFIG_FORMAT", "format", value);
}

/** The policy for `fail` or `skip`. */
export function badLinePolicy(value: BadLinePolicyName): BadLinePolicy {
  return choose(BadLinePolicy, "BAD_LINE_POLICY", "bad_line_policy", value);
}

/** Levels of log lines, the least first. */
export const LEVELS = ["debug", "info", "warning", "error"] as const;

/** A level of log lines. */
export type LogLevel = (typeof LEVELS)[number];

/** The level, written in whatever case. */
export function logLevel(value: LogLevel | Uppercase<LogLevel>): LogLevel {
  const level = LEVELS.find((one) => one === String(value).toLowerCase());
  return level ?? notOne("level", LEVELS, value);
}

function choose<E extends string>(values: Record<string, E>, prefix: string, field: string, given: string): E {
  const isNone = (name: string) => name === "UNSPECIFIED" || name === "UNRECOGNIZED";
  const names = Object.keys(values).filter((name) => !isNone(name));
  // Whoever is not checked by types may give anything.
  const name = String(given).toUpperCase().replace(`${prefix}_`, "");
  const value = isNone(name) ? undefined : values[name];
  if (value !== undefined && Object.hasOwn(values, name)) return value;
  return notOne(field, names.map((one) => one.toLowerCase()), given);
}

function notOne(field: string, choices: readonly string[], given: unknown): never {
  const description = `must be one of ${choices.join(", ")}, not ${shown(given)}`;
  return refuse([{ field, description, reason: "NOT_A_CHOICE" }]);
}
