/** What a client does while the daemon is away, and when it is back. */

import assert from "node:assert/strict";
import * as net from "node:net";
import { after, before, test } from "node:test";

import { type Client, DaemonUnavailable, type WatchItem } from "../src/index.js";
import { tasks } from "../src/methods.js";
import { silence } from "../src/stream.js";
import { all, Daemon, eventually, Scene } from "./daemon.js";

const daemon = new Daemon();
let client: Client;
let scene: Scene;

before(async () => {
  await daemon.start();
  client = daemon.client();
  scene = new Scene(`${daemon.root}/scene`);
});
after(async () => {
  scene.close();
  await daemon.close();
});

test("after kill -9 of the daemon in mid-run the iterator goes on, without gap or repeat", async () => {
  const task = await client.train("sft", scene.play({ steps: 12, gated: true }), { device: "cpu" });
  scene.letPass(3);
  const items: WatchItem[] = [];
  let kills = 0;
  for await (const item of task.watch()) {
    items.push(item);
    const step = item.type === "event" && item.event.payload?.$case === "progress" ? item.event.payload.value.step : 0;
    if (step === 3 || step === 7) {
      await daemon.kill();
      kills += 1;
      scene.letPass(step === 3 ? 4 : 5); // the run goes on meanwhile
    }
    if (item.type === "connectionLost") {
      assert.ok(item.error instanceof DaemonUnavailable);
      await daemon.start();
    }
  }
  assert.equal(kills, 2);
  const seqs = items.flatMap((item) => (item.type === "event" ? [item.event.seq] : []));
  assert.deepEqual(seqs, [...seqs.keys()].map((place) => place + 1), "dense from 1");
  const told = (await all(task.events())).map((event) => event.seq);
  assert.deepEqual(seqs, told, "all that the daemon has, and nothing else");
  const steps = items.flatMap((item) =>
    item.type === "event" && item.event.payload?.$case === "progress" ? [item.event.payload.value.step] : [],
  );
  assert.deepEqual(steps, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
  const others = items.filter((item) => item.type !== "event").map((item) => item.type);
  assert.deepEqual(others, ["snapshot", "connectionLost", "snapshot", "connectionLost", "snapshot"]);
  assert.equal(task.stateName, "completed");
});

test("a creation whose answer was lost is repeated with the same request id, so that there is one", async () => {
  const displayName = "its answer is lost";
  let lost = 0;
  const relay = net.createServer((socket) => {
    const onward = net.connect(daemon.address.replace(/^unix:/, ""));
    for (const one of [socket, onward]) one.on("error", () => undefined).on("close", () => (socket.destroy(), onward.destroy()));
    socket.pipe(onward);
    onward.on("data", (data) => {
      if (lost === 0 && data.includes(displayName)) {
        lost += 1;
        socket.destroy();
      } else socket.write(data);
    });
  });
  const place = `${daemon.root}/relay.sock`;
  await new Promise<void>((resolve) => relay.listen(place, resolve));
  const other = daemon.client({ address: `unix:${place}` });
  const task = await other.createTask("sft", {}, { displayName });
  assert.equal(lost, 1);
  const made = (await all(client.listTasks())).filter((one) => one.displayName === displayName);
  assert.deepEqual(made.map((one) => one.name), [task.name]);
  other.close();
  relay.close();
});

test("a call that is safe to repeat waits for a daemon that restarts", async () => {
  await daemon.kill();
  const created = client.createTask("sft", {}, { displayName: "while it was away" });
  await daemon.start();
  const task = await created;
  assert.equal((await all(client.listTasks())).filter((one) => one.displayName === "while it was away").length, 1);
  await client.deleteTask(task.name);
});

test("a call that is not safe to repeat is made once", async () => {
  await client.systemInfo();
  await daemon.kill();
  const begin = performance.now();
  await assert.rejects(client.shutdown(), (error: Error) => {
    assert.ok(error instanceof DaemonUnavailable);
    assert.match(error.message, /^no daemon serves unix:/);
    return true;
  });
  assert.ok(performance.now() - begin < 5000, "not repeated until the time for repeats is over");
  await daemon.start();
});

test("the list of tasks after an outage: all again, and what has gone meanwhile as deleted", async () => {
  const [stays, goes] = [await client.createTask("sft", {}), await client.createTask("sft", {})];
  const names = new Set<string>();
  const after: string[] = [];
  let wasLost = false;
  for await (const item of client.watchTasks()) {
    if (item.type === "task") names.add(item.task.name);
    if (item.type === "deleted") names.delete(item.name);
    if (wasLost) after.push(item.type);
    if (item.type === "connectionLost") {
      wasLost = true;
      await daemon.start();
      await daemon.client().deleteTask(goes.name);
    } else if (item.type === "synced") {
      if (wasLost) break;
      await daemon.kill();
    }
  }
  assert.ok(names.has(stays.name) && !names.has(goes.name));
  assert.deepEqual(after.slice(-2), ["deleted", "synced"]);
});

test("a stream on which nothing comes any more is taken for dead, and the watch goes on", async () => {
  const task = await client.createTask("sft", {});
  silence.ms = 2000; // heartbeats come every 0.3 s
  try {
    const items = client.watchTask(task.name);
    await items.next();
    process.kill(daemon.pid, "SIGSTOP");
    const lost = (await items.next()).value as WatchItem;
    process.kill(daemon.pid, "SIGCONT");
    assert.ok(lost.type === "connectionLost");
    assert.match(lost.error.message, /nothing came from the daemon for 2 s/);
    assert.equal(((await items.next()).value as WatchItem).type, "snapshot");
    await items.return();
  } finally {
    silence.ms = 20_000;
    process.kill(daemon.pid, "SIGCONT");
  }
});

test("a slow reader misses nothing, and what it has not read is not there yet", async () => {
  const task = await client.train("sft", scene.play({ steps: 300 }), { device: "cpu" });
  await task.wait();
  const { decode } = tasks.watchTask;
  let decoded = 0;
  const slow = client.watchTask(task.name, { untilEnd: true });
  tasks.watchTask.decode = (bytes) => {
    decoded += 1;
    return decode(bytes);
  };
  try {
    assert.equal((await slow.next()).value?.type, "snapshot");
  } finally {
    tasks.watchTask.decode = decode;
  }
  const quick = await all(client.watchTask(task.name, { untilEnd: true }));
  assert.ok(quick.length > 300);
  assert.ok(decoded < 50, `${decoded} messages were taken in for a reader of one`);
  const seqs = (await all(slow)).flatMap((item) => (item.type === "event" ? [item.event.seq] : []));
  assert.deepEqual(seqs, [...seqs.keys()].map((place) => place + 1));
  assert.equal(seqs.at(-1), task.task.lastSeq);
});

test("a watch gives up where the daemon is away for longer than it was told to wait", async () => {
  const task = await client.createTask("sft", {});
  const items = client.watchTask(task.name, { reconnectTimeoutMs: 100 });
  await items.next();
  await daemon.kill();
  const rest: string[] = [];
  await assert.rejects(async () => {
    for await (const item of items) rest.push(item.type);
  }, DaemonUnavailable);
  assert.deepEqual(rest, ["connectionLost"]);
  await daemon.start();
});

test("where nobody was ever there, an error says so at once", async () => {
  const nobody = daemon.client({ address: `${daemon.address}.absent` });
  for (const made of [nobody.systemInfo(), all(nobody.watchTasks()), all(nobody.watchTask("tasks/some-task"))]) {
    await assert.rejects(made, (error: Error) => {
      assert.ok(error instanceof DaemonUnavailable);
      assert.match(error.message, /^no daemon serves unix:.*\.absent$/);
      return true;
    });
  }
  assert.equal(await nobody.isServing(), false);
  await eventually(async () => client.isServing(), "the other one serves");
});
