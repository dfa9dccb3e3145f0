/** Where daemon and clients meet: state folder and runtime folder, as the daemon itself finds them. */

import { createHash } from "node:crypto";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";

/** Names the state folder. */
export const STATE_DIR_VARIABLE = "FINETUNED_STATE_DIR";
/** Names the runtime folder. */
export const RUNTIME_DIR_VARIABLE = "FINETUNED_RUNTIME_DIR";

// sun_path holds 108 bytes on Linux and 104 on macOS, a closing NUL among them.
const LONGEST_SOCKET_PATH = 100;
const APPLICATION = "finetuned";

/** The folders of one daemon and the files in them that both sides know. */
export interface Paths {
  /** Database, run folders, daemon log. */
  readonly stateDir: string;
  /** Socket, lock, endpoint and token; of mode 0700. */
  readonly runtimeDir: string;
  /** The unix socket. */
  readonly socket: string;
  /** JSON of the live daemon: `addresses`, `pid`, `version`, `state_dir`. */
  readonly endpoint: string;
  /** The token that TCP demands. */
  readonly token: string;
  /** Stderr of a daemon that a client started in the background. */
  readonly log: string;
}

/** The folders in use: environment, else the platform's own places. */
export function paths(): Paths {
  const ownState = process.env[STATE_DIR_VARIABLE];
  let runtimeDir = process.env[RUNTIME_DIR_VARIABLE];
  if (!runtimeDir) {
    runtimeDir = platformRuntimeDir();
    // A state folder of one's own brings a runtime folder of its own, so that one variable sets two daemons apart.
    if (ownState) runtimeDir = path.join(runtimeDir, digest(ownState));
  }
  const stateDir = absolute(ownState || platformStateDir());
  runtimeDir = absolute(runtimeDir);
  if (Buffer.byteLength(below(runtimeDir, "finetuned.sock")) > LONGEST_SOCKET_PATH) {
    // A long HOME: the same name for daemon and clients, in a folder that the daemon checks.
    runtimeDir = path.join(temporaryDir(), `finetuned-${process.getuid?.() ?? 0}-${digest(runtimeDir)}`);
  }
  return {
    stateDir,
    runtimeDir,
    socket: below(runtimeDir, "finetuned.sock"),
    endpoint: below(runtimeDir, "daemon.json"),
    token: below(runtimeDir, "token"),
    log: below(stateDir, "daemon.log"),
  };
}

/** As Python's `Path.absolute()`, which lets `..` stand: the digest below is over its answer. */
export function absolute(folder: string): string {
  if (process.platform === "win32") return path.resolve(folder);
  const whole = path.isAbsolute(folder) ? folder : `${process.cwd()}/${folder}`;
  return `/${whole.split("/").filter((part) => part !== "" && part !== ".").join("/")}`;
}

/** Not `path.join`, which takes `..` away: behind a link that is another folder. */
function below(folder: string, name: string): string {
  return `${folder}${path.sep}${name}`;
}

function digest(folder: string): string {
  return createHash("sha256").update(absolute(folder)).digest("hex").slice(0, 12);
}

function platformStateDir(): string {
  switch (process.platform) {
    case "win32":
      return path.join(windowsLocal(), APPLICATION, APPLICATION);
    case "darwin":
      return path.join(xdg("XDG_STATE_HOME") ?? path.join(home(), "Library/Application Support"), APPLICATION);
    default:
      return path.join(xdg("XDG_STATE_HOME") ?? path.join(home(), ".local/state"), APPLICATION);
  }
}

function platformRuntimeDir(): string {
  if (process.platform === "win32") return path.join(windowsLocal(), "Temp", APPLICATION, APPLICATION);
  const given = xdg("XDG_RUNTIME_DIR");
  if (given !== undefined && isPrivate(given, true)) return path.join(given, APPLICATION);
  if (process.platform === "darwin") return path.join(home(), "Library/Caches/TemporaryItems", APPLICATION);
  const uid = process.getuid?.() ?? 0;
  const ofLogin = `/run/user/${uid}`;
  return path.join(isPrivate(ofLogin, false) ? ofLogin : path.join(temporaryDir(), `runtime-${uid}`), APPLICATION);
}

/** Whether a folder is this user's alone: others are passed over by the daemon too. */
function isPrivate(folder: string, missingIsFine: boolean): boolean {
  try {
    const found = fs.lstatSync(absolute(folder));
    return found.isDirectory() && found.uid === process.geteuid?.() && (found.mode & 0o777) === 0o700;
  } catch (error) {
    return missingIsFine && (error as NodeJS.ErrnoException).code === "ENOENT";
  }
}

function xdg(variable: string): string | undefined {
  const value = process.env[variable];
  return value?.startsWith("/") ? value : undefined;
}

function home(): string {
  return process.env["HOME"]?.startsWith("/") ? process.env["HOME"] : os.userInfo().homedir;
}

function windowsLocal(): string {
  return process.env["LOCALAPPDATA"] || path.join(os.homedir(), "AppData", "Local");
}

/** Python's order, which is another one than Node's. */
function temporaryDir(): string {
  const { TMPDIR, TEMP, TMP } = process.env;
  for (const folder of [TMPDIR, TEMP, TMP, "/tmp", "/var/tmp", "/usr/tmp"]) {
    if (!folder) continue;
    try {
      fs.accessSync(folder, fs.constants.W_OK | fs.constants.X_OK);
      return absolute(folder);
    } catch {
      continue; // not there, or not ours to write in
    }
  }
  return process.cwd();
}
