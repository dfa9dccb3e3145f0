/** TCP with its token, and TLS. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as net from "node:net";
import * as os from "node:os";
import * as path from "node:path";
import { after, before, test } from "node:test";

import { Client, type ClientOptions, DaemonUnavailable, InvalidArgument, Unauthenticated } from "../src/index.js";
import { splitAddress } from "../src/connect.js";
import { Daemon, eventually, PYTHON, REPOSITORY } from "./daemon.js";

const plain = new Daemon("--listen", "127.0.0.1:0", "--training-quota", "1000");
const pki = fs.mkdtempSync(path.join(os.tmpdir(), "ft-"));
const secure = new Daemon(...makeCertificates(), "--listen", "127.0.0.1:0");
let address: string;
let secureAddress: string;

/** Address of TCP, as the daemon has announced it. */
function announced(daemon: Daemon): string {
  return daemon.endpoint.addresses.find((one) => !one.startsWith("unix:"))!;
}

function token(daemon: Daemon): string {
  return fs.readFileSync(path.join(daemon.runtimeDir, "token"), "utf8").trim();
}

function file(name: string): string {
  return path.join(pki, name);
}

const trusting = () => ({ ca: file("ca.pem"), certificate: file("me.pem"), key: file("me.key") });

/** Daemon's options for TLS that demands certificates of clients, with fresh ones for both. */
function makeCertificates(): string[] {
  const code = `
import sys
from pathlib import Path
from reach import Pki
pki = Pki(Path(sys.argv[1]))
pki.issue("localhost")
pki.issue("me@localhost", file="me")
Pki(Path(sys.argv[1]) / "other")
`;
  const environment = { ...process.env, PYTHONPATH: ["tests", "client", "daemon"].map((one) => path.join(REPOSITORY, one)).join(":") };
  execFileSync(PYTHON, ["-c", code, file("")], { env: environment });
  return ["--tls-cert", file("daemon.pem"), "--tls-key", file("daemon.key"), "--tls-client-ca", file("ca.pem")];
}

before(async () => {
  await Promise.all([plain.start(), secure.start()]);
  address = announced(plain);
  secureAddress = announced(secure).replace("127.0.0.1", "localhost");
});
after(async () => {
  await plain.close();
  await secure.close();
  fs.rmSync(pki, { recursive: true });
});

async function rejects(options: ClientOptions, kind: new (...words: never[]) => Error, message?: RegExp): Promise<void> {
  const client = new Client({ language: "en", ...options });
  try {
    await assert.rejects(client.systemInfo({ timeoutMs: 2000 }), (error: Error) => {
      assert.ok(error instanceof kind, String(error));
      if (message) assert.match(error.message, message);
      return true;
    });
  } finally {
    client.close();
  }
}

test("TCP takes the token, and nothing without it", async () => {
  const client = plain.client({ address, token: token(plain) });
  assert.equal((await client.systemInfo()).pid, plain.pid);
  await rejects({ address }, Unauthenticated);
  await rejects({ address, token: "wrong" }, Unauthenticated);
  await rejects({ address, token: "not\none line" }, InvalidArgument, /no token/);
  await rejects({ address, token: 5 as never }, InvalidArgument, /no token/);
});

test("the token file is for the address that its daemon has announced, and for no other", async () => {
  process.env["FINETUNED_RUNTIME_DIR"] = plain.runtimeDir;
  try {
    assert.equal((await plain.client({ address }).systemInfo()).pid, plain.pid);
    // Somebody else's server, which must not be shown the token.
    const seen: Buffer[] = [];
    const sockets: net.Socket[] = [];
    const thief = net.createServer((socket) => {
      sockets.push(socket);
      socket.on("data", (data) => seen.push(data)).on("error", () => undefined);
    });
    await new Promise<void>((resolve) => thief.listen(0, "127.0.0.1", resolve));
    const { port } = thief.address() as net.AddressInfo;
    const client = new Client({ address: `127.0.0.1:${port}` });
    await assert.rejects(client.systemInfo({ timeoutMs: 500 }));
    client.close();
    thief.close();
    for (const socket of sockets) socket.destroy();
    assert.ok(seen.length > 0 && !Buffer.concat(seen).includes(token(plain)));
  } finally {
    delete process.env["FINETUNED_RUNTIME_DIR"];
  }
});

test("a connection that another one has replaced is closed", async () => {
  const { port } = splitAddress(address);
  const open = new Set<net.Socket>();
  const between = net.createServer((socket) => {
    const daemon = net.connect(port, "127.0.0.1");
    open.add(socket);
    socket.on("close", () => open.delete(socket)).on("error", () => daemon.destroy());
    daemon.on("error", () => socket.destroy());
    socket.pipe(daemon).pipe(socket);
  });
  await new Promise<void>((resolve) => between.listen(0, "127.0.0.1", resolve));
  const client = plain.client({ address: `127.0.0.1:${(between.address() as net.AddressInfo).port}` });
  try {
    for (let change = 0; change < 4; change++) {
      process.env["FINETUNED_TOKEN"] = "another";
      await assert.rejects(client.systemInfo(), Unauthenticated);
      process.env["FINETUNED_TOKEN"] = token(plain);
      assert.equal((await client.systemInfo()).pid, plain.pid);
    }
    await eventually(() => open.size === 1, "the old ones are closed", 10);
    assert.equal((await client.systemInfo()).pid, plain.pid, "and the new one is not");
  } finally {
    delete process.env["FINETUNED_TOKEN"];
    client.close();
    between.close();
    for (const socket of open) socket.destroy();
  }
});

test("the quota is told", async () => {
  assert.equal((await plain.client().quota()).limit, 1000);
});

test("an endpoint shows neither token nor key to whoever logs the client", async () => {
  const client = plain.client({ address, token: token(plain) });
  await client.systemInfo();
  const { inspect } = await import("node:util");
  assert.ok(!inspect(client, { depth: 20, showHidden: true }).includes(token(plain)));
});

test("another machine is not called without TLS, and what is no address is named", async () => {
  await rejects({ address: "192.0.2.1:7411" }, InvalidArgument, /without TLS/);
  await rejects({ address: "somewhere" }, InvalidArgument, /is no address/);
  await rejects({ address: `http://${address}` }, InvalidArgument, /is no address; http:\/\/ does not belong there/);
  await rejects({ address: 7411 as never }, InvalidArgument, /must be unix:\/path or host:port, not 7411/);
  await rejects({ address: "127.0.0.1:99999" }, InvalidArgument, /is no address/);
});

test("TLS with a certificate of one's own", async () => {
  const client = secure.client({ address: secureAddress, token: token(secure), tls: trusting() });
  assert.equal((await client.systemInfo()).pid, secure.pid);
});

test("where a TLS connection does not come about, the error says why and what to do", async () => {
  const given = { address: secureAddress, token: token(secure) };
  const wrongCa = { ...trusting(), ca: file("other/ca.pem") };
  await rejects({ ...given, tls: wrongCa }, DaemonUnavailable, /does not come from the CA that you trust/);
  await rejects({ ...given, tls: { ca: file("ca.pem") } }, DaemonUnavailable, /--tls-client-ca/);
  await rejects(given, DaemonUnavailable, /--tls-cert/);
  await rejects({ address, token: token(plain), tls: { ca: file("ca.pem") } }, DaemonUnavailable, /does not speak TLS/);
  await rejects({ ...given, address: announced(secure), tls: trusting() }, DaemonUnavailable, /for another name/);
  await rejects({ ...given, tls: { certificate: file("me.pem") } }, InvalidArgument, /go together/);
  await rejects({ ...given, tls: { ...trusting(), key: file("daemon.key") } }, InvalidArgument, /can't be used together/);
  await rejects({ ...given, tls: { ca: file("me.key") } }, InvalidArgument, /holds no certificate in PEM/);
});
