/**
 * Parameters from plain objects. Names and types come from the descriptors, not from a list here.
 *
 * What is checked is the shape alone: unknown names and wrong types. Ranges, choices and files are the daemon's to judge, so that
 * there is one set of rules.
 */

import { listOf } from "./enums.js";
import { type FieldViolation, refuse } from "./errors.js";
import { PARAMETER_TABLE } from "./gen/parameter_table.js";
import type { Parameters, StringList } from "./gen/finetuned/v1/parameters.js";
import { isPlain, shown, snake } from "./words.js";

type Table = typeof PARAMETER_TABLE;
type Section = keyof Table;
type SectionOf<S extends Section> = NonNullable<Parameters[S]>;
type Given<T> = (Exclude<T, undefined> extends StringList ? readonly string[] | StringList : Exclude<T, undefined>) | null | undefined;
type Camel<T> = { readonly [N in keyof T]?: Given<T[N]> };
type Snake<S extends Section> = {
  readonly [N in keyof Table[S] & keyof SectionOf<S> as Table[S][N] extends readonly [infer W extends string, string]
    ? W
    : never]?: Given<SectionOf<S>[N]>;
};

/**
 * Parameters as a plain object: section to field to value, such as `{ training: { batchSize: 4 } }`.
 *
 * Fields are written as in this language (`batchSize`) or as in paths (`batch_size`), lists as arrays. What is absent, `null` or
 * `undefined` is left to the template, else to the default. A {@link Parameters} of a task or template fits as well.
 */
export type ParametersInput = { readonly [S in Section]?: (Camel<SectionOf<S>> & Snake<S>) | null | undefined };

/** A value that a parameter holds. */
export type ParameterValue = string | number | boolean | string[];

type Kind = "text" | "bool" | "whole" | "number" | "list";

interface Field {
  readonly section: string;
  /** As in this language. */
  readonly key: string;
  /** As in paths. */
  readonly name: string;
  readonly path: string;
  readonly kind: Kind;
}

const FIELDS: readonly Field[] = Object.entries(PARAMETER_TABLE).flatMap(([section, fields]) =>
  Object.entries(fields as Record<string, readonly [string, Kind]>).map(([key, [name, kind]]) => ({
    section,
    key,
    name,
    path: `${section}.${name}`,
    kind,
  })),
);
const SECTIONS = Object.keys(PARAMETER_TABLE);

/** As what is to be reset: every parameter. */
export const ALL_PARAMETERS = "parameters";

const UNKNOWN_FIELD = "UNKNOWN_FIELD";
const WRONG_TYPE = "WRONG_TYPE";
const LARGEST = 2 ** 31;

/** Every parameter by its path, such as `training.batch_size`, in the order of the contract. */
export function parameterPaths(): string[] {
  return FIELDS.map((field) => field.path);
}

/** Parameters from a plain object; throws an `InvalidArgument` that names every field of the wrong shape. */
export function toParameters(values: ParametersInput | undefined): Parameters {
  const { parameters, violations } = convertParameters(values);
  if (violations.length > 0) refuse(violations);
  return parameters;
}

/** Parameters from a plain object, as far as it has the right shape, and a violation for each field that has not. */
export function convertParameters(values: unknown): { parameters: Parameters; violations: FieldViolation[] } {
  const result: Record<string, Record<string, unknown>> = {};
  const violations: FieldViolation[] = [];
  if (values !== undefined && values !== null && !isPlain(values)) {
    violations.push(wrong("parameters", "sections with fields", values));
  } else {
    for (const [section, content] of Object.entries(values ?? {})) {
      if (content === undefined || (content === null && SECTIONS.includes(section))) continue;
      if (!SECTIONS.includes(section)) {
        violations.push(unknownSection(section, content));
      } else if (!isPlain(content)) {
        violations.push(wrong(section, "a section with fields", content));
      } else {
        result[section] = section_(section, content, violations);
      }
    }
  }
  const empty = Object.fromEntries(SECTIONS.map((section) => [section, undefined]));
  return { parameters: { ...empty, ...result } as unknown as Parameters, violations };
}

/** Every parameter that has a value, by its path such as `training.batch_size`; lists as arrays. */
export function flattenParameters(parameters: Parameters | undefined): Record<string, ParameterValue> {
  const result: Record<string, ParameterValue> = {};
  for (const field of FIELDS) {
    const section = parameters?.[field.section as Section] as Record<string, unknown> | undefined;
    const value = section?.[field.key];
    if (value === undefined) continue;
    result[field.path] = field.kind === "list" ? [...(value as StringList).values] : (value as ParameterValue);
  }
  return result;
}

/**
 * What an update changes, as paths of a field mask: texts that are given, the parameters given, those to reset.
 *
 * @param texts Fields of the resource itself; undefined: as it is.
 * @param given Parameters to change.
 * @param reset Parameters or sections to reset, in either spelling; `parameters`: all of them.
 */
export function maskOf(
  texts: Record<string, string | undefined>,
  given: Parameters,
  reset: string | readonly string[] | undefined,
): string[] {
  const wanted = listOf(reset).map(String);
  const violations: FieldViolation[] = [];
  const toReset = wanted.map((one) => {
    const path = one.replace(/^parameters\./, "");
    if (path === ALL_PARAMETERS || SECTIONS.includes(path)) return path;
    const [section, key] = path.split(".");
    const field = FIELDS.find((f) => f.path === path || (f.section === section && f.key === key));
    if (field !== undefined) return field.path;
    violations.push({ field: path, description: `is no parameter${hint(closest(path), path)}`, reason: UNKNOWN_FIELD });
    return path;
  });
  if (violations.length > 0) refuse(violations);
  const paths = Object.keys(texts).filter((name) => texts[name] !== undefined);
  for (const path of [...Object.keys(flattenParameters(given)), ...toReset]) {
    paths.push(path === ALL_PARAMETERS ? path : `parameters.${path}`);
  }
  return [...new Set(paths)].sort();
}

function section_(section: string, content: object, violations: FieldViolation[]): Record<string, unknown> {
  const result: Record<string, unknown> = {};
  const given = new Set<Field>();
  for (const [name, value] of Object.entries(content)) {
    if (value === undefined) continue;
    const field = FIELDS.find((one) => one.section === section && (one.key === name || one.name === name));
    if (field === undefined) {
      const path = `${section}.${name}`;
      violations.push({ field: path, description: `is no parameter${hint(closest(path), path)}`, reason: UNKNOWN_FIELD });
      continue;
    }
    if (value === null) continue;
    const expected = shape(field.kind, value);
    if (given.has(field)) violations.push({ field: field.path, description: twice(field), reason: "GIVEN_TWICE" });
    else if (expected !== "") violations.push(wrong(field.path, expected, value));
    else if (field.kind === "list") result[field.key] = { values: [...itemsOf(value)!] };
    else result[field.key] = value;
    given.add(field);
  }
  return result;
}

function twice({ key, name }: Field): string {
  return `is given twice, as ${key} and as ${name}`;
}

/** What the value should be; empty where it is. */
function shape(kind: Kind, value: unknown): string {
  switch (kind) {
    case "bool":
      return typeof value === "boolean" ? "" : "true or false";
    case "text":
      return typeof value === "string" ? "" : "a text";
    case "number":
      return typeof value === "number" ? "" : "a number";
    case "whole":
      if (!Number.isInteger(value)) return "a whole number";
      return Math.abs(value as number) < LARGEST ? "" : "a value that fits"; // beyond 32 bits: it can't even be sent
    case "list":
      return itemsOf(value)?.every((item) => typeof item === "string") ? "" : "a list of names";
  }
}

function itemsOf(value: unknown): readonly unknown[] | undefined {
  const list = isPlain(value) ? (value as Record<string, unknown>)["values"] : value;
  return Array.isArray(list) ? list : undefined;
}

function wrong(path: string, expected: string, value: unknown): FieldViolation {
  return { field: path, description: `must be ${expected}, not ${shown(value)}`, reason: WRONG_TYPE };
}

function unknownSection(section: string, content: unknown): FieldViolation {
  const inside = FIELDS.find((field) => field.path === section);
  if (inside !== undefined) {
    const description = `stands outside its section: write { ${inside.section}: { ${inside.key}: ... } }`;
    return { field: section, description, reason: UNKNOWN_FIELD };
  }
  // A field without its section, such as `batchSize`, or a section that is misspelt.
  const home = isPlain(content) ? undefined : closest(section);
  const like = home === undefined ? similar(section, SECTIONS) : undefined;
  const description = `is no section${home || like ? hint(home ?? like, section) : `; sections are ${SECTIONS.join(", ")}`}`;
  return { field: section, description, reason: UNKNOWN_FIELD };
}

function hint(meant: Field | string | undefined, asked: string): string {
  if (meant === undefined) return "";
  // In the spelling of whoever asked.
  const path = typeof meant === "string" ? meant : asked.includes("_") ? meant.path : `${meant.section}.${meant.key}`;
  return `; did you mean ${path}?`;
}

/** The parameter that was probably meant: of that name, else like it, by its initials, or with it in its name; own section first. */
function closest(path: string): Field | undefined {
  const dot = path.lastIndexOf(".");
  const section = path.slice(0, Math.max(dot, 0));
  const name = snake(path.slice(dot + 1));
  const own = FIELDS.filter((field) => field.section === section);
  const initials = (field: Field) => field.name.split("_").map((word) => word[0]).join("");
  for (const fields of [own, FIELDS]) {
    const found =
      fields.find((field) => field.name === name) ??
      fields.find((field) => field.name === similar(name, fields.map((one) => one.name))) ??
      fields.find((field) => initials(field) === name) ??
      fields.find((field) => name.length > 2 && field.name.includes(name));
    if (found !== undefined) return found;
  }
  return undefined;
}

/** The name that is most like the word, if any is: two thirds of their letters in common, in order. */
function similar(word: string, names: readonly string[]): string | undefined {
  let best: string | undefined;
  let bestShare = 0.66;
  for (const name of names) {
    const share = (2 * common(word, name)) / (word.length + name.length);
    if (share > bestShare) [best, bestShare] = [name, share];
  }
  return best;
}

/** Length of the longest common subsequence. */
function common(one: string, other: string): number {
  let row = new Array<number>(other.length + 1).fill(0);
  for (const letter of one.slice(0, 100)) {
    const next = [0];
    for (let i = 1; i <= other.length; i++) {
      next.push(letter === other[i - 1] ? row[i - 1]! + 1 : Math.max(row[i]!, next[i - 1]!));
    }
    row = next;
  }
  return row[other.length]!;
}
