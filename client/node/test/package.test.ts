/** What is published. `dist` must have been built. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as path from "node:path";
import { test } from "node:test";

import * as client from "../src/index.js";
import { DatasetServiceDefinition } from "../src/gen/finetuned/v1/dataset_service.js";
import { ParameterServiceDefinition } from "../src/gen/finetuned/v1/parameter_service.js";
import { SystemServiceDefinition } from "../src/gen/finetuned/v1/system_service.js";
import { TaskServiceDefinition } from "../src/gen/finetuned/v1/task_service.js";
import { TemplateServiceDefinition } from "../src/gen/finetuned/v1/template_service.js";

const root = path.join(__dirname, "../..");

test("every rpc of the daemon is one that the client calls", () => {
  const source = ["client.ts", "preparing.ts"].map((file) => fs.readFileSync(path.join(root, "src", file), "utf8")).join();
  const services = {
    tasks: TaskServiceDefinition,
    templates: TemplateServiceDefinition,
    parameterRpcs: ParameterServiceDefinition,
    datasets: DatasetServiceDefinition,
    system: SystemServiceDefinition,
  };
  const rpcs = Object.entries(services).flatMap(([name, { methods }]) => Object.keys(methods).map((rpc) => `${name}.${rpc}`));
  assert.ok(rpcs.length > 30);
  assert.deepEqual(rpcs.filter((rpc) => !new RegExp(`\\b${rpc}\\b`).test(source)), []);
});

test("import and require give the same classes, without a global and without a native addon", () => {
  const program = `
    const before = new Set(Object.getOwnPropertyNames(globalThis));
    const required = require("@finetuned/client");
    import("@finetuned/client").then(async ({ default: none, ...imported }) => {
      const left = Object.getOwnPropertyNames(globalThis).filter((name) => !before.has(name));
      const native = Object.keys(require.cache).filter((file) => file.endsWith(".node"));
      const differing = Object.keys(required).filter((name) => required[name] !== imported[name]);
      console.log(JSON.stringify({ left, native, differing, names: Object.keys(imported).sort() }));
    });
  `;
  // A package can import itself by its name.
  const file = path.join(root, "build/imports.cjs");
  fs.writeFileSync(file, program);
  const said = JSON.parse(execFileSync(process.execPath, [file], { encoding: "utf8" })) as Record<string, string[]>;
  assert.deepEqual(said, { left: [], native: [], differing: [], names: Object.keys(client).sort() });
});

test("errors are one tree, by the names of their classes", () => {
  const { BY_CODE } = require("../src/errors.js") as typeof import("../src/errors.js");
  for (const [code, kind] of BY_CODE) {
    const error = new kind("why");
    assert.ok(error instanceof client.FinetunedError && error instanceof Error);
    assert.equal(error.code, code);
    assert.equal(error.name, kind.name);
  }
  assert.ok(new client.DaemonNotStarted("why") instanceof client.DaemonUnavailable);
  assert.equal(new client.EventsLost("why").name, "EventsLost");
});
