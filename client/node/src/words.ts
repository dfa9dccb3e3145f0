/** Words for people. */

/** A name of this language as the contract spells it: `batch_size` for `batchSize`. */
export function snake(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

/** Whether it is an object of fields, be it of another realm: a `Map`, say, has none, and would be taken for empty. */
export function isPlain(value: unknown): value is object {
  if (typeof value !== "object" || value === null) return false;
  const prototype: unknown = Object.getPrototypeOf(value);
  return prototype === null || Object.getPrototypeOf(prototype) === null;
}

/** What somebody has given, for a sentence. */
export function shown(value: unknown): string {
  if (typeof value === "number") return String(value); // JSON has neither NaN nor Infinity
  if (typeof value === "object" && value !== null && !Array.isArray(value) && !isPlain(value)) {
    return `a ${(value as { constructor?: { name?: string } }).constructor?.name || "thing"}`;
  }
  let text: string;
  try {
    text = JSON.stringify(value) ?? String(value);
  } catch {
    text = String(value); // a value that holds itself, or a big integer
  }
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

/** The word of an enum's value, such as `running` for `TASK_STATE_RUNNING`. */
export function wordOf(value: string, prefix: string): string {
  return value.replace(`${prefix}_`, "").toLowerCase();
}
