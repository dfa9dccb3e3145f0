/** Start the daemon in the background where none serves. */

import { type ChildProcess, execFile, spawn } from "node:child_process";
import * as fs from "node:fs";
import * as path from "node:path";
import { promisify } from "node:util";

import { Client as Channel, status } from "@grpc/grpc-js";

import { ADDRESS_VARIABLE, type Endpoint, findEndpoint, type Place, TOKEN_VARIABLE } from "./connect.js";
import { DaemonNotStarted, DaemonUnavailable, FinetunedError, refuse } from "./errors.js";
import { system } from "./methods.js";
import { absolute, paths, RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE } from "./paths.js";
import { pause } from "./signals.js";
import { checkMs } from "./time_limit.js";
import type { TLS } from "./tls.js";
import { shown } from "./words.js";

/** A program that starts the daemon, with its first arguments, such as `["/opt/finetuned/bin/finetuned"]`; `serve` is added. */
export type DaemonCommand = readonly [string, ...string[]];

/** How a daemon is started. */
export interface StartOptions {
  /** As of `Client`; a daemon is started only at the default address. */
  address?: string | undefined;
  /** As of `Client`. */
  token?: string | undefined;
  /** As of `Client`. */
  tls?: TLS | undefined;
  /**
   * What starts it. Default: `finetuned` on the path, else `python -m finetuned_daemon.main` with the Python of the active virtual
   * environment or the path, where that has it. An application that is started from a desktop sees a short path: name it there.
   */
  command?: DaemonCommand | undefined;
  /** Milliseconds within which the daemon must answer; default 15,000. */
  timeoutMs?: number | undefined;
  /** Ends the waiting with the signal's reason; a process that was started goes on. */
  signal?: AbortSignal | undefined;
  /** Called with the path of the daemon's log once its process has been started. */
  onStart?: ((log: string) => void) | undefined;
}

const START_MS = 15_000;
const POLL_MS = 50;
const LOG_TAIL_BYTES = 4000;
// The daemon's exit status for "another one serves this state folder".
const ALREADY_SERVED = 3;

/**
 * Start the daemon if none serves, and wait until it answers. The daemon lives on after this process. Where two processes start
 * one at once, one daemon stays, as the other finds the state folder locked, and both return.
 *
 * @returns Whether a process was started.
 * @throws {@link DaemonNotStarted} It is not installed, ended, or did not answer in time; the message has the end of its log.
 * @throws {@link DaemonUnavailable} Nobody serves the address that was named.
 * @throws {@link InvalidArgument} An option is none.
 */
export async function startDaemon(options: StartOptions = {}): Promise<boolean> {
  const timeoutMs = checkMs("timeoutMs", options.timeoutMs ?? START_MS);
  if (options.command !== undefined) checkCommand(options.command);
  const { signal } = options;
  signal?.throwIfAborted();
  const deadline = performance.now() + timeoutMs;
  const place: Place = { address: options.address, token: options.token, tls: options.tls };
  const endpoint = find(place);
  if (endpoint !== undefined && (await endpoint.isListening())) return false;
  if (endpoint !== undefined && !endpoint.isDefault) {
    throw new DaemonUnavailable(
      `nobody serves ${endpoint.target}; a daemon is started only where no address is named by option or ${ADDRESS_VARIABLE}`,
    );
  }
  const command = options.command ?? (await findCommand());
  const { log } = paths();
  const startOfLog = prepareLog(log);
  let daemon = await start(command, log);
  options.onStart?.(log);
  while (performance.now() < deadline) {
    const { exitCode, signalCode } = daemon;
    const hasEnded = exitCode !== null || signalCode !== null;
    const isServed = await answersAt(place);
    if (isServed) return true;
    if (exitCode === ALREADY_SERVED) {
      // The one before has closed its socket and still holds its lock.
      await pause(POLL_MS, signal);
      daemon = await start(command, log);
    } else if (hasEnded) {
      throw new DaemonNotStarted(
        `the daemon ended with ${signalCode ?? `status ${exitCode}`}; the end of ${log}:\n${tail(log, startOfLog)}`,
      );
    }
    await pause(POLL_MS, signal);
  }
  throw new DaemonNotStarted(
    `the daemon did not answer within ${timeoutMs / 1000} s; the end of ${log}:\n${tail(log, startOfLog)}`,
  );
}

/** Throws where it can be no command. */
export function checkCommand(command: unknown): void {
  const isList = Array.isArray(command) && command.length > 0;
  if (isList && command.every((word) => typeof word === "string") && command[0] !== "") return;
  const description = `must be true, false, or a list of program and arguments such as ["finetuned"], not ${shown(command)}`;
  refuse([{ field: "startDaemon", description, reason: "WRONG_TYPE" }]);
}

/** Makes the folder of the log; returns where what is written from now on begins. */
function prepareLog(log: string): number {
  try {
    makePrivate(path.dirname(log));
    return fs.statSync(log, { throwIfNoEntry: false })?.size ?? 0;
  } catch (error) {
    throw new DaemonNotStarted(`the daemon's log can't be written: ${(error as Error).message}`, { cause: error });
  }
}

function find(place: Place): Endpoint | undefined {
  try {
    return findEndpoint(place);
  } catch (error) {
    if (error instanceof DaemonUnavailable) return undefined; // no sockets here, and no daemon has written its address yet
    throw error;
  }
}

async function answersAt(place: Place): Promise<boolean> {
  const endpoint = find(place);
  return endpoint !== undefined && (await endpoint.isListening()) && (await answers(endpoint));
}

function answers(endpoint: Endpoint): Promise<boolean> {
  const channel = new Channel(endpoint.target, endpoint.credentials(), endpoint.options());
  const { path: rpc, encode, decode } = system.getSystemInfo;
  return new Promise((resolve) => {
    channel.makeUnaryRequest(rpc, encode, decode, {}, endpoint.metadata(), { deadline: Date.now() + 1000 }, (error) => {
      channel.close();
      // Any answer of its own shows that it serves; what it thinks of us comes out later.
      resolve(error?.code !== status.UNAVAILABLE && error?.code !== status.DEADLINE_EXCEEDED);
    });
  });
}

async function start(command: DaemonCommand, log: string): Promise<ChildProcess> {
  const environment = { ...process.env };
  delete environment[TOKEN_VARIABLE]; // a client's, and no business of the daemon's
  // The daemon's working folder is another one: what is relative here must not be relative there.
  for (const variable of [STATE_DIR_VARIABLE, RUNTIME_DIR_VARIABLE]) {
    if (environment[variable]) environment[variable] = absolute(environment[variable]);
  }
  let output: number | undefined;
  try {
    output = fs.openSync(log, "a", 0o600);
    const [program, ...words] = command;
    const daemon = spawn(program, [...words, "serve"], {
      stdio: ["ignore", output, output],
      cwd: path.parse(process.execPath).root,
      env: environment,
      // A session of its own: the terminal's Ctrl-C and hang-up do not reach it, and it outlives this process.
      detached: true,
      windowsHide: true,
    });
    await new Promise<void>((resolve, reject) => {
      daemon.once("spawn", resolve);
      daemon.once("error", (error) =>
        reject(new DaemonNotStarted(`${program} can't be started: ${error.message}`, { cause: error })),
      );
    });
    daemon.unref();
    return daemon;
  } catch (error) {
    if (error instanceof FinetunedError) throw error;
    // A log that is none, or a word that no program can take.
    throw new DaemonNotStarted(`the daemon can't be started: ${(error as Error).message}`, { cause: error });
  } finally {
    if (output !== undefined) fs.closeSync(output);
  }
}

async function findCommand(): Promise<DaemonCommand> {
  const program = which("finetuned");
  if (program !== undefined) return [program];
  const environment = process.env["VIRTUAL_ENV"];
  const folder = process.platform === "win32" ? "Scripts" : "bin";
  for (const name of [...(environment ? [path.join(environment, folder, "python")] : []), "python3", "python"]) {
    const python = which(name);
    if (python !== undefined && (await hasDaemon(python))) return [python, "-m", "finetuned_daemon.main"];
  }
  throw new DaemonNotStarted(
    "the daemon is not installed here: pip install 'finetuned[daemon,train]', or name its program by `startDaemon`",
    { reason: "NOT_INSTALLED" },
  );
}

async function hasDaemon(python: string): Promise<boolean> {
  const code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('finetuned_daemon') is None)";
  try {
    await promisify(execFile)(python, ["-c", code], { timeout: 10_000, windowsHide: true });
    return true;
  } catch {
    return false; // a Python without it, or one that does not start
  }
}

/** The program of that name on the path. */
function which(name: string): string | undefined {
  const endings = process.platform === "win32" ? [".exe", ""] : [""];
  const folders = path.isAbsolute(name) ? [""] : (process.env["PATH"] ?? "").split(path.delimiter).filter(path.isAbsolute);
  for (const folder of folders) {
    for (const ending of endings) {
      const file = path.join(folder, name + ending);
      try {
        fs.accessSync(file, fs.constants.X_OK);
        if (fs.statSync(file).isFile()) return file;
      } catch {
        continue; // not there, or no program
      }
    }
  }
  return undefined;
}

/** Makes the folder and what is missing above it, for this user alone: the daemon refuses folders that others can write in. */
function makePrivate(folder: string): void {
  const missing: string[] = [];
  for (let one = folder; !fs.existsSync(one); one = path.dirname(one)) missing.push(one);
  for (const one of missing.reverse()) {
    try {
      fs.mkdirSync(one, { mode: 0o700 });
      fs.chmodSync(one, 0o700); // a umask can take from the owner too
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error; // another process was faster
    }
  }
}

function tail(log: string, start: number): string {
  try {
    const content = fs.readFileSync(log);
    return content.subarray(Math.max(start, content.length - LOG_TAIL_BYTES)).toString().trim() || "(empty)";
  } catch (error) {
    return `(${(error as Error).message})`;
  }
}
