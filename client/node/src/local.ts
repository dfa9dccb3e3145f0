/** Paths as a caller on the daemon's own machine means them: relative, or with `~`. */

import * as os from "node:os";
import * as path from "node:path";

import { absolute } from "./paths.js";

/** The parameters that name a file or folder, by section. */
const PATHS: Readonly<Record<string, readonly string[]>> = {
  data: ["trainFile", "evalFile", "outputDir", "modelPath", "tokenizerPath", "resumeFromCheckpoint"],
  lora: ["peftConfigPath"],
};
/** Fields of requests that do. */
const REQUEST_PATHS: readonly string[] = ["resumePath", "path", "tokenizerPath"];

/** The request with every path of it absolute, as seen from the current folder. */
export function makeAbsolute<Request>(request: Request): Request {
  return request && typeof request === "object" ? (ofRequest(request as Fields) as Request) : request;
}

type Fields = Record<string, unknown>;

function ofRequest(request: Fields): Fields {
  const result = withPaths(request, REQUEST_PATHS);
  for (const holder of ["task", "template"]) {
    const resource = result[holder];
    if (isObject(resource)) result[holder] = { ...resource, parameters: ofParameters(resource["parameters"]) };
  }
  if ("parameters" in result) result["parameters"] = ofParameters(result["parameters"]);
  return result;
}

function ofParameters(parameters: unknown): unknown {
  if (!isObject(parameters)) return parameters;
  const result = { ...parameters };
  for (const [section, names] of Object.entries(PATHS)) {
    const fields = result[section];
    if (isObject(fields)) result[section] = withPaths(fields, names);
  }
  return result;
}

function withPaths(fields: Fields, names: readonly string[]): Fields {
  const result = { ...fields };
  for (const name of names) {
    const value = result[name];
    if (typeof value === "string" && value !== "") result[name] = whole(value);
  }
  return result;
}

function whole(file: string): string {
  if (file === "~" || /^~[/\\]/.test(file)) return path.join(os.homedir(), file.slice(1));
  try {
    return absolute(file);
  } catch {
    return file; // the current folder is gone: the daemon says that it takes absolute paths
  }
}

function isObject(value: unknown): value is Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
