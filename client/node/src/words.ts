/** Words for people. */

/** The word of an enum's value, such as `running` for `TASK_STATE_RUNNING`. */
export function wordOf(value: string, prefix: string): string {
  return value.replace(`${prefix}_`, "").toLowerCase();
}
