/** Finding the daemon, and starting it where none serves. */

import assert from "node:assert/strict";
import { execFileSync, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { after, test } from "node:test";

import {
  Client,
  DaemonNotStarted,
  DaemonUnavailable,
  DeadlineExceeded,
  InvalidArgument,
  PermissionDenied,
  startDaemon,
} from "../src/index.js";
import { paths } from "../src/paths.js";
import { endRunners, eventually, PYTHON, pythonEnvironment, REPOSITORY } from "./daemon.js";

const root = fs.mkdtempSync(path.join(os.tmpdir(), "ft-"));
const command = [PYTHON, "-m", "finetuned_daemon.main"] as const;
const library = path.join(__dirname, "../src/index.js");
const environment = pythonEnvironment();

/** Sets variables for this test alone. */
function within(variables: Record<string, string>): Disposable {
  const before = { ...process.env };
  Object.assign(process.env, environment, variables);
  return {
    [Symbol.dispose]() {
      for (const name of Object.keys(process.env)) delete process.env[name];
      Object.assign(process.env, before);
    },
  };
}

function folder(name: string): { FINETUNED_STATE_DIR: string; FINETUNED_RUNTIME_DIR: string } {
  const own = path.join(root, name);
  return { FINETUNED_STATE_DIR: path.join(own, "state"), FINETUNED_RUNTIME_DIR: path.join(own, "run") };
}

after(() => {
  endRunners(root);
  fs.rmSync(root, { recursive: true, force: true, maxRetries: 5 });
});

test("the daemon is started by the first call and lives on after the program that started it", async () => {
  const variables = folder("started");
  const program = `
    const { Client } = require(${JSON.stringify(library)});
    const client = new Client({ startDaemon: ${JSON.stringify(command)} });
    Promise.all([client.systemInfo(), client.listDevices()]).then(([info]) => console.log(info.pid));
  `;
  // It ends by itself: neither a connection that is not closed nor the daemon holds it.
  const ran = spawnSync(process.execPath, ["-e", program], {
    env: { ...environment, ...variables, FINETUNED_TOKEN: "not-the-daemon's" },
    encoding: "utf8",
    timeout: 60_000,
  });
  assert.equal(ran.status, 0, ran.stderr);
  using _ = within(variables);
  const client = new Client();
  const info = await client.systemInfo();
  assert.equal(info.pid, Number(ran.stdout));
  assert.equal(await startDaemon({ command }), false, "one serves already");
  await client.shutdown();
  client.close();
  await eventually(() => !fs.existsSync(paths().socket), "it has ended");
});

test("a daemon that has ended is started again by the call after the one that found none", async () => {
  using _ = within(folder("again"));
  const client = new Client({ startDaemon: command });
  assert.equal(await client.isServing(), false, "asking starts none");
  const first = await client.systemInfo();
  const watch = client.watchTasks();
  await watch.next();
  await client.shutdown();
  await eventually(() => !fs.existsSync(paths().socket), "it has ended");
  while ((await watch.next()).value?.type !== "connectionLost");
  assert.equal(await client.isServing(), false, "neither asking nor a watch starts one");
  await assert.rejects(client.systemInfo({ timeoutMs: 200 }), DaemonUnavailable);
  const second = await client.systemInfo();
  assert.notEqual(second.pid, first.pid);
  while ((await watch.next()).value?.type !== "synced");
  await client.shutdown();
  client.close();
  await assert.rejects(client.systemInfo(), { reason: "CLIENT_CLOSED" });
});

test("while the daemon starts, the time of a call ends it, and so does closing the client", async () => {
  using _ = within(folder("slow"));
  const client = new Client({ startDaemon: [PYTHON, "-c", "import time; time.sleep(5)"] });
  await assert.rejects(client.systemInfo({ timeoutMs: 100 }), DeadlineExceeded);
  const call = client.listDevices();
  const watch = client.watchTasks().next();
  client.close();
  await assert.rejects(call, { reason: "CLIENT_CLOSED" });
  await assert.rejects(watch, { reason: "CLIENT_CLOSED" });
});

test("a command that is none, and a state folder that is a file, are errors of this package", async () => {
  for (const odd of ["finetuned", [], [""], [5], 1] as never[]) {
    assert.throws(() => new Client({ startDaemon: odd }), InvalidArgument);
    await assert.rejects(startDaemon({ command: odd }), InvalidArgument);
  }
  const variables = folder("file");
  fs.mkdirSync(path.dirname(variables.FINETUNED_STATE_DIR), { recursive: true });
  fs.writeFileSync(variables.FINETUNED_STATE_DIR, "");
  using _ = within(variables);
  const client = new Client({ startDaemon: command });
  await assert.rejects(client.systemInfo(), (error: Error) => {
    assert.ok(error instanceof DaemonNotStarted);
    assert.match(error.message, /^the daemon's log can't be written|^the daemon can't be started: ENOTDIR/);
    return true;
  });
});

test("a daemon that ends at once is told with the end of its log", async () => {
  using _ = within(folder("broken"));
  const client = new Client({ startDaemon: [PYTHON, "-c", "import sys; sys.exit('a reason of its own')"] });
  for (let attempt = 0; attempt < 2; attempt++) {
    await assert.rejects(client.systemInfo(), (error: Error) => {
      assert.ok(error instanceof DaemonNotStarted);
      assert.match(error.message, /^the daemon ended with status 1; the end of .*daemon\.log:\na reason of its own$/s);
      return true;
    });
  }
  assert.equal(fs.statSync(path.join(root, "broken/state")).mode & 0o777, 0o700);
});

test("a daemon that never answers is told in the end, and a program that is not there at once", async () => {
  using _ = within(folder("silent"));
  const silent = startDaemon({ command: [PYTHON, "-c", "import time; time.sleep(5)"], timeoutMs: 300 });
  await assert.rejects(silent, /did not answer within 0\.3 s/);
  await assert.rejects(startDaemon({ command: ["/no/such/program"] }), DaemonNotStarted);
});

test("the program is found on the path; where there is none, the error says what to do", async () => {
  const bin = path.join(root, "bin");
  fs.mkdirSync(bin);
  fs.writeFileSync(path.join(bin, "finetuned"), "#!/bin/sh\necho found by its name\nexit 1\n", { mode: 0o755 });
  {
    using _ = within({ ...folder("named"), PATH: `${bin}:${process.env["PATH"]}` });
    await assert.rejects(startDaemon(), /found by its name/);
  }
  fs.rmSync(path.join(bin, "finetuned"));
  {
    using _ = within({ ...folder("nowhere"), PATH: bin, VIRTUAL_ENV: "" });
    await assert.rejects(startDaemon(), /pip install 'finetuned\[daemon,train\]'/);
  }
});

test("a daemon is started at the default address alone", async () => {
  using _ = within({ ...folder("named-address"), FINETUNED_ADDRESS: `unix:${root}/absent.sock` });
  await assert.rejects(startDaemon({ command }), DaemonUnavailable);
});

test("a folder that others can write in is not trusted", async () => {
  const variables = folder("open");
  fs.mkdirSync(variables.FINETUNED_RUNTIME_DIR, { recursive: true, mode: 0o777 });
  fs.chmodSync(variables.FINETUNED_RUNTIME_DIR, 0o777);
  using _ = within(variables);
  await assert.rejects(new Client().systemInfo(), PermissionDenied);
});

test("folders are those that the daemon itself finds", () => {
  const runtime = path.join(root, "xdg");
  const shared = path.join(root, "shared");
  fs.mkdirSync(runtime, { mode: 0o700 });
  fs.mkdirSync(shared, { mode: 0o755 });
  fs.chmodSync(shared, 0o755);
  const cases: Record<string, string>[] = [
    {},
    { HOME: "/home/somebody" },
    { XDG_RUNTIME_DIR: runtime, XDG_STATE_HOME: "/var/tmp/state" },
    { XDG_RUNTIME_DIR: shared },
    { XDG_RUNTIME_DIR: "relative", XDG_STATE_HOME: "relative" },
    { FINETUNED_STATE_DIR: "/srv/ft/../ft//state/" },
    { FINETUNED_STATE_DIR: "some/./where", FINETUNED_RUNTIME_DIR: "here/run" },
    { FINETUNED_STATE_DIR: "/srv/ft", XDG_RUNTIME_DIR: runtime },
    { FINETUNED_RUNTIME_DIR: `/srv/${"deep/".repeat(30)}` },
    { FINETUNED_RUNTIME_DIR: `/srv/${"deep/".repeat(30)}`, TMPDIR: root },
    { TMPDIR: root, TEMP: "/nowhere" },
  ];
  const code = `
import json, os, sys, tempfile
from finetuned._paths import paths
kept = dict(os.environ)
for case in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(kept | case)
    tempfile.tempdir = None  # remembered otherwise
    p = paths()
    print(json.dumps([str(p.state_dir), str(p.runtime_dir), str(p.socket), str(p.endpoint), str(p.token), str(p.log)]))
`;
  const clean = { PATH: process.env["PATH"] ?? "", HOME: root };
  const python = [path.join(REPOSITORY, "client"), process.env["PYTHONPATH"]].filter(Boolean).join(":");
  const theirs = execFileSync(PYTHON, ["-c", code, JSON.stringify(cases)], {
    env: { ...clean, PYTHONPATH: python },
    encoding: "utf8",
  });
  const before = { ...process.env };
  try {
    const ours = cases.map((one) => {
      for (const name of Object.keys(process.env)) delete process.env[name];
      Object.assign(process.env, clean, one);
      const { stateDir, runtimeDir, socket, endpoint, token, log } = paths();
      return JSON.stringify([stateDir, runtimeDir, socket, endpoint, token, log]);
    });
    const lines = theirs.trim().split("\n").map((line) => JSON.stringify(JSON.parse(line)));
    assert.deepEqual(ours, lines);
  } finally {
    Object.assign(process.env, before);
  }
});
