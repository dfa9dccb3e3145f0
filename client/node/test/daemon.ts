/** Real daemons for tests: started, killed, started again; their runs go to the fake runner (`tests/fake_runner.py`). */

import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

import { Client, type ClientOptions } from "../src/index.js";

/** The checkout: build/test/ lies three folders below client/node's parent. */
export const REPOSITORY = path.resolve(__dirname, "../../../..");
export const PYTHON = process.env["FINETUNED_TEST_PYTHON"] ?? path.join(REPOSITORY, ".venv/bin/python");

// What the machine says about other daemons is none of the tests' business.
for (const variable of Object.keys(process.env)) {
  if (variable.startsWith("FINETUNED_") && variable !== "FINETUNED_TEST_PYTHON") delete process.env[variable];
}
process.env["LC_ALL"] = "C.UTF-8";

/** Waits until `look` gives something true. */
export async function eventually<T>(look: () => T | Promise<T>, what: string, seconds = 60): Promise<NonNullable<T>> {
  const deadline = performance.now() + seconds * 1000;
  for (;;) {
    const answer = await look();
    if (answer) return answer;
    if (performance.now() > deadline) throw new Error(`not seen within ${seconds} s: ${what}`);
    await sleep(10);
  }
}

/** A state folder of its own, and the daemon that serves it at present. */
export class Daemon {
  readonly root = fs.mkdtempSync(path.join(os.tmpdir(), "ft-"));
  readonly stateDir = path.join(this.root, "state");
  readonly runtimeDir = path.join(this.root, "run");
  readonly #options: string[];
  readonly #clients: Client[] = [];
  #process: ChildProcess | undefined;

  constructor(...options: string[]) {
    this.#options = options;
  }

  get address(): string {
    return `unix:${path.join(this.runtimeDir, "finetuned.sock")}`;
  }

  get pid(): number {
    return this.#process!.pid!;
  }

  /** What the daemon has written beside its socket. */
  get endpoint(): { pid: number; addresses: string[] } {
    return JSON.parse(fs.readFileSync(path.join(this.runtimeDir, "daemon.json"), "utf8")) as never;
  }

  /** A client of it, closed with it. */
  client(options: ClientOptions = {}): Client {
    const client = new Client({ address: this.address, language: "en", ...options });
    this.#clients.push(client);
    return client;
  }

  /** Starts a daemon and waits until it serves. */
  async start(): Promise<this> {
    const log = fs.openSync(path.join(this.root, "daemon.log"), "a");
    this.#process = spawn(
      PYTHON,
      [
        ...["-m", "finetuned_daemon.main", "serve", "--state-dir", this.stateDir, "--runtime-dir", this.runtimeDir],
        ...["--runner-module", "fake_runner", "--heartbeat-seconds", "0.3", ...this.#options],
      ],
      { stdio: ["ignore", log, log], env: pythonEnvironment() },
    );
    fs.closeSync(log);
    const { pid } = this;
    await eventually(() => {
      if (this.#process?.exitCode !== null) throw new Error(`the daemon ended:\n${this.log}`);
      try {
        return this.endpoint.pid === pid;
      } catch {
        return false; // not written yet
      }
    }, "the daemon serves");
    return this;
  }

  /** What it has written to its terminal. */
  get log(): string {
    return fs.readFileSync(path.join(this.root, "daemon.log"), "utf8");
  }

  /** `kill -9`, or another signal. */
  async kill(signal: NodeJS.Signals = "SIGKILL"): Promise<void> {
    const daemon = this.#process;
    if (daemon === undefined || daemon.exitCode !== null || daemon.signalCode !== null) return;
    const ended = new Promise((resolve) => daemon.once("exit", resolve));
    daemon.kill(signal);
    await ended;
  }

  /** Ends daemon, clients and every runner that is left. */
  async close(): Promise<void> {
    for (const client of this.#clients) client.close();
    await this.kill();
    endRunners(this.stateDir);
    fs.rmSync(this.root, { recursive: true, force: true, maxRetries: 5 });
  }
}

/** An environment in which Python finds the fake runner. */
export function pythonEnvironment(): NodeJS.ProcessEnv {
  const folders = [path.join(REPOSITORY, "tests"), process.env["PYTHONPATH"]].filter(Boolean);
  return { ...process.env, PYTHONPATH: folders.join(path.delimiter) };
}

/** Ends every process whose last word is a folder of this daemon's. */
export function endRunners(stateDir: string): void {
  for (const line of execFileSync("ps", ["-Ao", "pid=,args="], { encoding: "utf8" }).split("\n")) {
    const [pid, ...words] = line.trim().split(/\s+/);
    if (words.at(-1)?.startsWith(stateDir)) {
      try {
        process.kill(Number(pid), "SIGKILL");
      } catch {
        continue; // it has ended meanwhile
      }
    }
  }
}

/** What a run of the fake runner needs, and a hand on its steps. */
export class Scene {
  readonly root: string;
  readonly model: string;
  readonly data: string;
  #held: number[] = [];

  constructor(root: string) {
    this.root = root;
    this.model = path.join(root, "model");
    this.data = path.join(root, "chats.jsonl");
    fs.mkdirSync(this.model, { recursive: true });
    const config = { model_type: "llama", hidden_size: 8, num_hidden_layers: 1, vocab_size: 8 };
    fs.writeFileSync(path.join(this.model, "config.json"), JSON.stringify(config));
    fs.writeFileSync(path.join(this.model, "tokenizer.json"), '{"model": {}}');
    fs.writeFileSync(path.join(this.model, "chat_template.jinja"), "{{ messages }}");
    fs.writeFileSync(path.join(this.model, "model.safetensors"), safetensors());
    const messages = [
      { role: "user", content: "a" },
      { role: "assistant", content: "b" },
    ];
    fs.writeFileSync(this.data, `${JSON.stringify({ messages })}\n`);
    this.play({});
  }

  get output(): string {
    return path.join(this.root, "out");
  }

  /** Says what the next run does; the parameters for it. */
  play(scenario: Record<string, unknown>) {
    fs.writeFileSync(path.join(this.model, "scenario.json"), JSON.stringify(scenario));
    const gate = path.join(this.model, "gate");
    if (scenario["gated"] && !fs.existsSync(gate)) execFileSync("mkfifo", [gate]);
    return { data: { trainFile: this.data, modelPath: this.model, outputDir: this.output } };
  }

  /** Lets a gated run take so many steps more. */
  letPass(steps: number): void {
    const gate = fs.openSync(path.join(this.model, "gate"), fs.constants.O_RDWR);
    fs.writeSync(gate, ".".repeat(steps));
    // The reader may not have come yet; a FIFO keeps its bytes only while somebody has it open.
    this.#held.push(gate);
  }

  close(): void {
    for (const gate of this.#held) fs.closeSync(gate);
    this.#held = [];
  }
}

/** Matrices of zeros with the names of a small llama. */
function safetensors(): Buffer {
  const size = 8 * 8 * 4;
  const modules = ["q", "k", "v", "o", "gate", "up", "down"].map((one) => `model.layers.0.${one}_proj`);
  const names = ["model.embed_tokens", "lm_head", ...modules].map((one) => `${one}.weight`);
  const header = Buffer.from(
    JSON.stringify(
      Object.fromEntries(
        names.map((name, i) => [name, { dtype: "F32", shape: [8, 8], data_offsets: [i * size, (i + 1) * size] }]),
      ),
    ),
  );
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  return Buffer.concat([length, header, Buffer.alloc(size * names.length)]);
}

/** All that an iterator yields. */
export async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const result: T[] = [];
  for await (const item of items) result.push(item);
  return result;
}
