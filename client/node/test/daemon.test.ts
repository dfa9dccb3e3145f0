/** The client against a real daemon. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import * as path from "node:path";
import { after, before, beforeEach, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { inspect, promisify } from "node:util";

import {
  Aborted,
  AlreadyExists,
  BadLinePolicy,
  CheckStatus,
  Client,
  DeadlineExceeded,
  EndReason,
  FailedPrecondition,
  FinetunedError,
  InvalidArgument,
  NotFound,
  RunFailed,
  TaskState,
  templateDocument,
  TrainingType,
  type WatchItem,
} from "../src/index.js";
import { shareTime } from "../src/time_limit.js";
import { all, Daemon, eventually, Scene } from "./daemon.js";

const daemon = new Daemon();
let client: Client;
let scene: Scene;
let scenes = 0;

before(async () => {
  await daemon.start();
  client = daemon.client();
});
beforeEach(() => {
  scene?.close();
  scenes += 1;
  scene = new Scene(path.join(daemon.root, `scene-${scenes}`));
});
after(async () => {
  scene.close();
  await daemon.close();
});

/** The error that a promise ends with. */
async function failure<E extends Error>(
  promise: Promise<unknown>,
  kind: abstract new (...words: never[]) => E,
): Promise<E> {
  const error: unknown = await promise.then(
    () => assert.fail("nothing was thrown"),
    (reason: unknown) => reason,
  );
  assert.ok(error instanceof kind, `${String(error)} is no ${kind.name}`);
  return error;
}

function kindsOf(items: WatchItem[]): string[] {
  return items.map((item) => (item.type === "event" ? (item.event.payload?.$case ?? "") : item.type));
}

test("train starts a task, and its watch ends with the run, every event once and in order", async () => {
  const task = await client.train("sft", scene.play({ steps: 3 }), { displayName: "first", device: "cpu" });
  const items = await all(task.watch());
  assert.equal(items[0]?.type, "snapshot");
  const seqs = items.flatMap((item) => (item.type === "event" ? [item.event.seq] : []));
  assert.deepEqual(seqs, [...seqs.keys()].map((place) => place + 1));
  assert.ok(kindsOf(items).includes("progress"));
  assert.equal(task.task.state, TaskState.COMPLETED);
  assert.equal(task.stateName, "completed");
  assert.equal(task.task.progress?.step, 3);
  await task.refresh();
  assert.equal(task.task.endReason, EndReason.FINISHED);
  assert.ok(task.task.createTime instanceof Date);
  assert.equal(task.task.lastSeq, seqs.at(-1));
  assert.equal(task.name, `tasks/${task.id}`);
  assert.deepEqual(task.parameters?.data?.trainFile, scene.data);
  const { displayName, trainingType, state, progress, endReason } = task;
  assert.deepEqual([displayName, trainingType, state, progress?.step, endReason], [
    ...["first", TrainingType.SFT, TaskState.COMPLETED, 3, EndReason.FINISHED],
  ]);
  assert.match(inspect(task), /^TaskHandle \{\s+name: 'tasks\/.*displayName: 'first',\s+state: 'completed'/s);
});

test("every wrong field comes in one error, with path, sentence and reason", async () => {
  const error = await failure(
    client.createTask("sft", { training: { batchSize: 0, learningRate: -1 }, lora: { loraR: 100_000 } }),
    InvalidArgument,
  );
  assert.deepEqual(error.violations.map((one) => one.field).sort(), [
    "lora.lora_r",
    "training.batch_size",
    "training.learning_rate",
  ]);
  assert.ok(error.violations.every((one) => one.description && /^[A-Z_]+$/.test(one.reason)));
  assert.equal(error.code, "INVALID_ARGUMENT");
  assert.match(error.requestId, /^[0-9a-f]{16}$/);
  assert.equal(error.name, "InvalidArgument");
  const copy = structuredClone(error.toJSON());
  assert.deepEqual(copy.violations, [...error.violations]);
});

test("sentences come in the language that was asked for", async () => {
  const chinese = daemon.client({ language: "zh" });
  const error = await failure(chinese.createTask("sft", { training: { batchSize: 0 } }), InvalidArgument);
  assert.match(error.violations[0]?.description ?? "", /\p{Script=Han}/u);
});

test("names that there are not are named all at once, with what was probably meant, and nothing is sent", async () => {
  const odd = { trainig: { batchSize: 1 }, training: { batchsize: 1, batch_sise: 2, seed: 1 }, batchSize: 4 };
  const error = await failure(client.createTask("sft", odd as never), InvalidArgument);
  assert.equal(error.requestId, "");
  assert.deepEqual(Object.fromEntries(error.violations.map((one) => [one.field, one.description])), {
    trainig: "is no section; did you mean training?",
    "training.batchsize": "is no parameter; did you mean training.batchSize?",
    "training.batch_sise": "is no parameter; did you mean training.batch_size?",
    "training.seed": "is no parameter; did you mean general.seed?",
    batchSize: "is no section; did you mean training.batchSize?",
  });
  const wrong = { training: { batchSize: "4", learningRate: "x", packing: true }, lora: { loraTargetModules: "q" } };
  const types = await failure(client.createTask("sft", wrong as never), InvalidArgument);
  assert.deepEqual(
    types.violations.filter((one) => one.reason === "WRONG_TYPE").map((one) => one.field),
    ["training.batch_size", "training.learning_rate", "lora.lora_target_modules"],
  );
});

test("what has the wrong shape is told once, in the contract's spelling, and what has no fields is not taken for empty", async () => {
  const violations = await client.validate("sft", { data: { trainFile: 5 }, lora: new Map() } as never);
  const told = violations.filter((one) => one.field === "data.train_file" || one.field.startsWith("lora"));
  assert.deepEqual(told.map((one) => [one.field, one.reason]), [
    ["data.train_file", "WRONG_TYPE"],
    ["lora", "WRONG_TYPE"],
  ]);
  assert.match(told[1]?.message ?? "", /not a Map$/);
  for (const odd of [new Map(), new Date(), new (class Mine {})(), []]) {
    await failure(client.createTask("sft", odd as never), InvalidArgument);
  }
  const twice = await failure(client.createTask("sft", { training: { batchSize: 4, batch_size: 8 } }), InvalidArgument);
  assert.match(twice.message, /^training\.batch_size: is given twice, as batchSize and as batch_size$/);
  assert.equal(twice.requestId, "");
});

test("what cannot be sent is named at once", async () => {
  const fields = async (call: Promise<unknown>) =>
    (await failure(call, InvalidArgument)).violations.map((one) => one.field);
  const name = "tasks/nobody";
  assert.deepEqual(await fields(client.moveTask(name, 1.5)), ["position"]);
  assert.deepEqual(await fields(client.metrics(name, { run: 1.5 })), ["run"]);
  assert.deepEqual(await fields(all(client.watchTask(name, { afterSeq: 1.5 }))), ["after_seq"]);
  assert.deepEqual(await fields(all(client.listEvents(name, { afterSeq: NaN }))), ["after_seq"]);
  assert.deepEqual(await fields(all(client.inspectDataset("/x", "sft", { maxSamples: 0.5 }))), ["max_samples"]);
  assert.deepEqual(await fields(all(client.listTasks({ states: 42 as never }))), ["states"]);
  assert.deepEqual(await fields(client.updateTask(name, {}, { reset: 42 as never })), ["42"]);
});

test("a time that is none is refused, and one that gRPC cannot say is for ever", async () => {
  for (const timeoutMs of [NaN, -1, "5000ms", null, 5n] as never[]) {
    const field = (error: InvalidArgument) => error.violations[0]?.field;
    assert.equal(field(await failure(client.listDevices({ timeoutMs }), InvalidArgument)), "timeoutMs");
    assert.equal(field(await failure(client.getTask("x", { timeoutMs }), InvalidArgument)), "timeoutMs");
    assert.equal(field(await failure(client.wait("x", { timeoutMs }), InvalidArgument)), "timeoutMs");
    const watch = all(client.watchTasks({ reconnectTimeoutMs: timeoutMs }));
    assert.equal(field(await failure(watch, InvalidArgument)), "reconnectTimeoutMs");
    if (timeoutMs !== null) assert.throws(() => daemon.client({ timeoutMs }), InvalidArgument);
  }
  for (const timeoutMs of [Number.MAX_SAFE_INTEGER, 4e14, Infinity]) {
    assert.equal((await client.systemInfo({ timeoutMs })).pid, daemon.pid);
    assert.equal((await daemon.client({ timeoutMs }).systemInfo()).pid, daemon.pid);
  }
});

test("the calls of one method share its time", async () => {
  const options = shareTime({ timeoutMs: 20, device: "cpu" });
  await sleep(30);
  assert.deepEqual({ ...options }, { timeoutMs: 0, device: "cpu" });
});

test("both spellings of a parameter are the same, and a task's own parameters can be given on", async () => {
  const camel = await client.createTask("sft", {
    training: { batchSize: 3 },
    lora: { loraTargetModules: ["q_proj"] },
    optimization: { useQlora: null, use8bitOptimizer: undefined },
  });
  const snake = await client.createTask("sft", {
    training: { batch_size: 3 },
    lora: { lora_target_modules: ["q_proj"] },
  });
  assert.deepEqual(camel.parameters, snake.parameters);
  assert.deepEqual(camel.parameters?.lora?.loraTargetModules?.values, ["q_proj"]);
  const again = await client.createTask("sft", camel.parameters);
  assert.deepEqual(again.parameters, camel.parameters);
  for (const task of [camel, snake, again]) await client.deleteTask(task.name);
});

test("relative paths are meant from this program's folder, not from the daemon's", async () => {
  const before = process.cwd();
  process.chdir(scene.root);
  try {
    const task = await client.createTask("sft", { data: { trainFile: "chats.jsonl", outputDir: "./out" } });
    assert.equal(task.parameters?.data?.trainFile, path.join(process.cwd(), "chats.jsonl"));
    assert.equal(task.parameters?.data?.outputDir, path.join(process.cwd(), "out"));
  } finally {
    process.chdir(before);
  }
});

test("a name is a resource name, an id or a display name; what there is not is NotFound", async () => {
  const task = await client.createTask("sft", {}, { taskId: "by-name", displayName: "By its name" });
  for (const name of ["tasks/by-name", "by-name", "By its name"]) {
    assert.equal((await client.getTask(name)).name, task.name);
  }
  for (const name of ["tasks/nobody", "nobody", "No Body"]) {
    const error = await failure(client.getTask(name), NotFound);
    assert.equal(error.reason, "TASK_NOT_FOUND");
  }
  await failure(all(client.watchTask("nobody")), NotFound);
  await failure(client.getTask(" "), InvalidArgument);
  assert.match((await failure(client.getTask(task as never), InvalidArgument)).message, /such as task\.name/);
  await failure(client.createTask("sft", {}, { taskId: "by-name" }), AlreadyExists);
  await client.deleteTask("by-name");
  await client.deleteTask("by-name", { allowMissing: true });
});

test("the same request id gives the first answer again", async () => {
  const one = await client.createTask("sft", {}, { requestId: "the-same" });
  const other = await client.createTask("sft", {}, { requestId: "the-same" });
  assert.equal(other.name, one.name);
  await client.deleteTask(one.name);
});

test("an update changes what is named, resets what is to be reset, and knows a stale etag", async () => {
  const task = await client.createTask("sft", { training: { batchSize: 3, maxSteps: 7 }, general: { seed: 5 } });
  const changed = await client.updateTask(
    task.name,
    { training: { batchSize: 4 } },
    { displayName: "renamed", reset: ["training.maxSteps", "general"], etag: task.etag },
  );
  assert.equal(changed.displayName, "renamed");
  assert.equal(changed.parameters?.training?.batchSize, 4);
  assert.notEqual(changed.parameters?.training?.maxSteps, 7);
  assert.notEqual(changed.parameters?.general?.seed, 5);
  await failure(client.updateTask(task.name, { training: { batchSize: 2 } }, { etag: task.etag }), Aborted);
  const error = await failure(client.updateTask(task.name, {}, { reset: "training.maxStep" }), InvalidArgument);
  assert.match(error.message, /did you mean training\.maxSteps/);
  await client.deleteTask(task.name);
});

test("what was changed meanwhile is neither started nor deleted by whoever saw it before", async () => {
  const task = await client.createTask("sft", {}, { taskId: "changed-meanwhile" });
  const stale = { etag: task.etag };
  await client.updateTask(task.name, { general: { seed: 6 } });
  await failure(client.startTask(task.name, stale), Aborted);
  await failure(client.startProbe(task.name, stale), Aborted);
  await failure(client.deleteTask(task.name, stale), Aborted);
  await client.deleteTask(task.name, { etag: (await client.getTask(task.name)).etag });
  const template = await client.createTemplate("Changed meanwhile", "sft");
  await client.updateTemplate(template.name, { general: { seed: 6 } });
  await failure(client.updateTemplate(template.name, {}, { displayName: "no", etag: template.etag }), Aborted);
  await failure(client.deleteTemplate(template.name, { etag: template.etag }), Aborted);
  await client.deleteTemplate(template.name);
});

test("what is in the way comes as violations of a FailedPrecondition", async () => {
  const task = await client.createTask("sft", {});
  const error = await failure(client.stopTask(task.name), FailedPrecondition);
  assert.equal(error.violations[0]?.subject, task.name);
  assert.match(error.violations[0]?.type ?? "", /^[A-Z_]+$/);
  await client.deleteTask(task.name);
});

test("pause, resume, queue, move and stop: each verb tells the task as it is then", async () => {
  const task = await client.train("sft", scene.play({ steps: 9, gated: true }), { device: "cpu" });
  scene.letPass(1);
  await eventually(async () => (await task.refresh()).task.progress?.step, "a step was taken");
  const second = await client.train("sft", scene.play({ steps: 9, gated: true }), { device: "cpu" });
  const third = await client.train("sft", scene.play({ steps: 9, gated: true }), { device: "cpu" });
  assert.deepEqual([second.task.queuePosition, third.task.queuePosition], [1, 2]);
  assert.equal((await third.move(1)).task.queuePosition, 1);
  assert.deepEqual(
    (await all(client.listTasks({ states: "queued" }))).map((one) => one.name).sort(),
    [second.name, third.name].sort(),
  );
  await second.stop();
  await third.pause();
  assert.equal(third.task.state, TaskState.PAUSED);
  const late = await failure(third.wait({ timeoutMs: 1 }), DeadlineExceeded);
  assert.equal(late.reason, "RUN_GOES_ON");
  assert.match(late.message, /has not ended within 1 ms; it goes on$/);
  await third.stop({ discard: true });
  await task.pause();
  await eventually(async () => (await task.refresh()).stateName === "paused", "it is paused");
  await failure(task.resume({ etag: "stale" }), Aborted);
  await task.resume();
  await task.stop();
  assert.equal((await task.wait({ timeoutMs: Infinity })).task.endReason, EndReason.STOPPED_BY_USER);
  assert.ok(task.hasEnded);
});

test("a run that fails is a RunFailed with its reason, for whoever waits", async () => {
  const fail = { fail: { step: 2, reason: "LOSS_NOT_FINITE", message: "the loss is NaN" } };
  const task = await client.train("sft", scene.play(fail), { device: "cpu" });
  const error = await failure(task.wait(), RunFailed);
  assert.equal(error.reason, "LOSS_NOT_FINITE");
  assert.equal(error.task.state, TaskState.FAILED);
  assert.equal(task.stateName, "failed");
  assert.equal(error.result?.endReason, EndReason.LOSS_NOT_FINITE);
  const { advice, detail, evidence, fix } = error;
  assert.deepEqual([fix, advice, evidence, detail], [
    ...[error.result.fix, error.result.advice?.en ?? "", error.result.evidence, error.result.detail],
  ]);
  const copy = structuredClone(error.toJSON());
  assert.deepEqual([copy.reason, copy.advice, copy.detail], [error.reason, advice, detail]);
  assert.deepEqual([copy.fix, copy.evidence], [fix, evidence]);
  assert.equal((await client.wait(task.name)).state, TaskState.FAILED);
});

test("curves, log, runs, events, checkpoints and settings of a run", async () => {
  const task = await client.train("sft", scene.play({ steps: 4, save_steps: 2, log: "a last word" }), { device: "cpu" });
  await task.wait();
  const { run, series } = await task.metrics();
  assert.equal(run, 1);
  assert.deepEqual(series["loss"]?.steps, [1, 2, 3, 4]);
  assert.deepEqual(series["loss"]?.values, [1, 1 / 2, 1 / 3, 1 / 4]);
  assert.ok((series["loss"]?.times[0] ?? 0) > 1_600_000_000);
  assert.deepEqual((await task.metrics({ names: "loss", afterStep: 3 })).series["loss"]?.steps, [4]);
  assert.deepEqual((await task.metrics({ names: ["no_such"] })).series, {});
  const lines = await all(task.logs());
  assert.equal(lines.at(-1)?.text, "a last word");
  assert.deepEqual(await all(task.logs({ follow: true })), lines);
  assert.deepEqual(await all(task.logs({ level: "ERROR" })), []);
  assert.deepEqual(await all(task.logs({ run: 0 })), lines);
  const level = await failure(all(task.logs({ level: "warn" as never })), InvalidArgument);
  assert.match(level.message, /^level: must be one of debug, info, warning, error, not "warn"$/);
  const [only] = await all(task.runs());
  assert.equal(only?.number, 1);
  const events = await all(task.events({ afterSeq: 2 }));
  assert.equal(events[0]?.seq, 3);
  const checkpoints = await all(task.checkpoints({ verify: true }));
  assert.deepEqual(checkpoints.map((one) => one.step), [4, 2]);
  const deleted = await client.deleteCheckpoint(checkpoints[1]!.name);
  assert.ok(deleted.deletedFiles > 0 && deleted.deletedBytes > 0);
  await failure(client.deleteCheckpoint(checkpoints[1]!.name), NotFound);
  assert.match((await task.exportConfig()).content, /train_file/);
  const next = await client.startTask(task.name, { resume: "newest" });
  assert.equal(next.run, 2);
  await client.wait(task.name);
  const answer = await task.delete({ deleteOutputs: true });
  assert.ok(answer.deletedFiles > 0);
});

test("a probe answers with its report", async () => {
  const task = await client.createTask("sft", scene.play({ steps: 3 }), { device: "cpu" });
  const report = await client.probeTask(task.name);
  assert.equal(report.secondsPerStep, 2);
  assert.equal(report.peakMemoryBytes, 3 * 2 ** 30);
  assert.equal((await client.getTask(task.name)).state, TaskState.PENDING);
});

test("a probe that takes longer than its time is left alone", async () => {
  const task = await client.createTask("sft", scene.play({ steps: 3, gated: true }), { device: "cpu" });
  await failure(client.probeTask(task.name, { timeoutMs: 1000 }), DeadlineExceeded);
  await client.stopTask(task.name, { discard: true });
});

test("check and estimate: what is wrong is an answer, with what would be right", async () => {
  const violations = await client.validate("sft", { training: { batchSize: 0 }, trainig: {} } as never);
  const fields = violations.map((one) => one.field);
  assert.ok(fields.includes("training.batch_size") && fields.includes("trainig"), String(fields));
  assert.ok(violations.every((one) => ["error", "warning", "notice"].includes(one.severity)));
  assert.ok(violations.every((one) => one.message !== ""));
  const error = await failure(client.estimate("sft", {}), InvalidArgument);
  assert.ok(error.violations.some((one) => one.field === "data.train_file"));
  const schema = await client.parameterSchema("sft");
  const batch = schema.sections.flatMap((one) => one.fields).find((one) => one.path === "training.batch_size");
  assert.equal(batch?.defaultValue, 2);
  assert.ok(batch?.label?.en && batch.label.zh);
});

test("templates: made, read, changed, listed, deleted", async () => {
  const made = await client.createTemplate("Short answers", "sft", { training: { batchSize: 5 } });
  assert.equal((await client.getTemplate("Short answers")).name, made.name);
  const changed = await client.updateTemplate("Short answers", { training: { maxSteps: 8 } }, { displayName: "Shorter" });
  assert.equal(changed.parameters?.training?.batchSize, 5);
  const schema = await client.parameterSchema("sft");
  assert.deepEqual(templateDocument(changed, schema), {
    kind: "template",
    training_type: "sft",
    display_name: "Shorter",
    parameters: { training: { batch_size: 5, max_steps: 8 } },
  });
  const names = (await all(client.listTemplates({ trainingType: TrainingType.SFT }))).map((one) => one.displayName);
  assert.ok(names.includes("Shorter") && names.includes("SFT"), String(names));
  const task = await client.createTask("sft", {}, { template: "Shorter" });
  assert.equal(task.parameters?.training?.maxSteps, 8);
  await failure(client.deleteTemplate("SFT"), FailedPrecondition);
  await client.deleteTemplate("Shorter");
  await client.deleteTemplate("Shorter", { allowMissing: true });
  await failure(client.deleteTemplate("Shorter"), NotFound);
});

test("a data file is read to its report", async () => {
  const items = await all(client.inspectDataset(scene.data, "sft", { badLinePolicy: BadLinePolicy.SKIP }));
  const last = items.at(-1);
  assert.ok(last?.type === "report");
  assert.equal(last.report.samples, 1);
  await failure(all(client.inspectDataset(path.join(scene.root, "absent.jsonl"))), InvalidArgument);
});

test("the daemon tells of itself, its devices and its environment", async () => {
  const info = await client.systemInfo();
  assert.equal(info.pid, daemon.pid);
  assert.ok(info.startTime instanceof Date);
  assert.equal((await client.listDevices()).at(-1)?.id, "cpu");
  assert.notEqual((await client.checkEnvironment()).status, CheckStatus.UNSPECIFIED);
  assert.equal(await client.isServing(), true);
});

test("the list of tasks: what there is, then what comes, changes and goes", async () => {
  const seen: string[] = [];
  let made: string | undefined;
  for await (const item of client.watchTasks()) {
    if (item.type === "synced") made = (await client.createTask("sft", {}, { taskId: "in-the-list" })).name;
    if (made === undefined) continue;
    if (item.type === "task" && item.task.name === made) {
      seen.push(item.task.displayName);
      if (seen.length === 1) await client.updateTask(made, {}, { displayName: "changed" });
      if (item.task.displayName === "changed") await client.deleteTask(made);
    }
    if (item.type === "deleted") {
      assert.equal(item.name, made);
      break;
    }
  }
  assert.equal(seen.at(-1), "changed");
  await failure(all(client.watchTasks({ states: "sleeping" as never })), InvalidArgument);
});

test("devices come again and again, until the loop is left", async () => {
  let count = 0;
  for await (const item of client.watchDevices({ intervalMs: 500 })) {
    assert.ok(item.type === "devices" && item.devices.at(-1)?.id === "cpu");
    count += 1;
    if (count === 2) break;
  }
  await failure(all(client.watchDevices({ intervalMs: 1 })), InvalidArgument);
});

test("the example trains, shows the loss, and ends with the run", async () => {
  const { data } = scene.play({ steps: 2 });
  const environment = { ...process.env, FINETUNED_RUNTIME_DIR: daemon.runtimeDir, FINETUNED_STATE_DIR: daemon.stateDir };
  const example = path.join(__dirname, "../examples/train.js");
  const run = promisify(execFile)(process.execPath, [example, data.trainFile, data.modelPath, data.outputDir], { env: environment });
  const { stdout } = await run;
  assert.match(stdout, /goes on whatever becomes of this program\n1\/2 loss 1\.0000\n2\/2 loss 0\.5000\ncompleted: /);
  const wrong = promisify(execFile)(process.execPath, [example, "/no/such/file", data.modelPath, data.outputDir], { env: environment });
  await assert.rejects(wrong, (error: { code: number; stderr: string }) => {
    assert.equal(error.code, 2);
    assert.match(error.stderr, /^data\.train_file {2}\S/m);
    return true;
  });
});

/** Streams that the daemon has open. */
async function openStreams(): Promise<number> {
  const { limits } = await client.systemInfo();
  return limits.find((one) => one.name.includes("open_streams"))?.used ?? -1;
}

test("a watch ends with the signal's reason, and leaves no stream open at the daemon", async () => {
  const before = await openStreams();
  assert.notEqual(before, -1);
  const task = await client.createTask("sft", {});
  const stop = new AbortController();
  const items = client.watchTask(task.name, { signal: stop.signal });
  assert.equal((await items.next()).value?.type, "snapshot");
  assert.equal(await openStreams(), before + 1);
  const next = items.next(); // waits, as nothing happens
  stop.abort(new Error("enough"));
  await assert.rejects(next, /^Error: enough$/);
  await eventually(async () => (await openStreams()) === before, "the stream is closed");

  for await (const item of client.watchTask(task.name)) {
    assert.equal(item.type, "snapshot");
    break;
  }
  await eventually(async () => (await openStreams()) === before, "leaving the loop closes the stream");
});

test("a call ends with the signal's reason, before and while it is made", async () => {
  await assert.rejects(client.systemInfo({ signal: AbortSignal.abort(new Error("no")) }), /^Error: no$/);
  const stop = new AbortController();
  const call = client.systemInfo({ signal: stop.signal });
  stop.abort();
  await assert.rejects(call, { name: "AbortError" });
  const task = await client.createTask("sft", {});
  await assert.rejects(client.wait(task.name, { signal: AbortSignal.timeout(50) }), { name: "TimeoutError" });
});

test("one signal can be given to as many calls and streams as one likes", async () => {
  const warnings: Error[] = [];
  const take = (warning: Error) => warnings.push(warning);
  process.on("warning", take);
  const stop = new AbortController();
  const { signal } = stop;
  await Promise.all(Array.from({ length: 12 }, () => client.systemInfo({ signal })));
  const streams = Array.from({ length: 12 }, () => client.watchTasks({ signal }));
  await Promise.all(streams.map((one) => one.next()));
  const ended = streams.map((one) => assert.rejects(all(one), { name: "AbortError" }));
  stop.abort();
  await Promise.all(ended);
  await sleep(0);
  process.off("warning", take);
  assert.deepEqual(warnings, []);
});

test("a call that takes too long is DeadlineExceeded", async () => {
  const error = await failure(client.systemInfo({ timeoutMs: 0 }), DeadlineExceeded);
  assert.equal(error.code, "DEADLINE_EXCEEDED");
});

test("closing the client ends its streams, and it makes no calls any more", async () => {
  const other = daemon.client();
  const task = await other.createTask("sft", {});
  const items = other.watchTask(task.name);
  await items.next();
  const next = items.next();
  other.close();
  assert.equal((await failure(next, FinetunedError)).reason, "CLIENT_CLOSED");
  assert.equal((await failure(other.systemInfo(), FinetunedError)).reason, "CLIENT_CLOSED");
});
