/**
 * Where the daemon is: its address, the token to show, and the channel options for both.
 *
 * In this order: the address given, the variable `FINETUNED_ADDRESS`, the socket of the runtime folder, the endpoint file that
 * the daemon writes there (for platforms where gRPC has no unix sockets).
 */

import * as fs from "node:fs";
import * as net from "node:net";

import { type ChannelOptions, credentials, type ChannelCredentials, Metadata } from "@grpc/grpc-js";

import { DaemonUnavailable, FinetunedError, InvalidArgument, PermissionDenied, refuse } from "./errors.js";
import { absolute, type Paths, paths, RUNTIME_DIR_VARIABLE } from "./paths.js";
import { readTLS, type TLS, TLS_HINT, type TLSContent } from "./tls.js";
import { shown } from "./words.js";

/** Names the daemon's address. */
export const ADDRESS_VARIABLE = "FINETUNED_ADDRESS";
/** Holds the token that TCP demands. */
export const TOKEN_VARIABLE = "FINETUNED_TOKEN";

const PROBE_MS = 1000;
const BOOT_ID = "/proc/sys/kernel/random/boot_id";

/** Where a client looks for the daemon. */
export interface Place {
  readonly address: string | undefined;
  readonly token: string | undefined;
  readonly tls: TLS | undefined;
}

/** A place where a daemon serves, or would. */
export class Endpoint {
  /** What gRPC dials: `unix:/path` or `host:port`. */
  readonly target: string;
  /** Neither argument nor environment named it, so a daemon that we start will serve it. */
  readonly isDefault: boolean;
  // Private fields, so that no log of an endpoint holds a token or a key.
  readonly #token: string;
  readonly #tls: TLSContent | undefined;

  constructor(target: string, isDefault: boolean, token = "", tls?: TLSContent) {
    this.target = target;
    this.isDefault = isDefault;
    this.#token = token;
    this.#tls = tls;
  }

  /** Sent with every call; empty on a unix socket, where the folder's mode is the wall. */
  get token(): string {
    return this.#token;
  }

  /** What TLS needs; undefined: without it, which is for this machine alone. */
  get tls(): TLSContent | undefined {
    return this.#tls;
  }

  /** Whether this is a unix socket. */
  get isUnix(): boolean {
    return this.target.startsWith("unix:");
  }

  /** Whether the daemon sees this machine's files; a port may be another's, forwarded. */
  get isHere(): boolean {
    return this.isUnix || this.isDefault;
  }

  /** Whether a channel to the other endpoint serves this one as well. */
  equals(other: Endpoint | undefined): boolean {
    return (
      other !== undefined &&
      this.target === other.target &&
      this.#token === other.#token &&
      sameContent(this.#tls, other.#tls)
    );
  }

  /** Metadata of every call. Not gRPC's call credentials: those refuse a channel without TLS. */
  metadata(): Metadata {
    const metadata = new Metadata();
    if (this.#token) metadata.set("authorization", `Bearer ${this.#token}`);
    return metadata;
  }

  /** Credentials of the channel. */
  credentials(): ChannelCredentials {
    if (this.#tls === undefined) return credentials.createInsecure();
    const { ca, key, certificate } = this.#tls;
    try {
      return credentials.createSsl(ca ?? null, key ?? null, certificate ?? null);
    } catch (error) {
      // The key of another certificate, or what only looks like one.
      const message = `the files for TLS can't be used together: ${(error as Error).message}`;
      throw new InvalidArgument(message, { reason: "BAD_TLS", cause: error });
    }
  }

  /** Options of the channel. */
  options(): ChannelOptions {
    return {
      // A proxy from the environment has no business between us and this machine's daemon.
      "grpc.enable_http_proxy": 0,
      // gRPC's own backoff grows to two minutes; a local daemon is back within a second.
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": 1000,
      // Else two clients of one process share a connection, and its backoff.
      "grpc.use_local_subchannel_pool": 1,
      // No name server is asked how to call a daemon.
      "grpc.service_config_disable_resolution": 1,
      // A page of events may hold long tracebacks.
      "grpc.max_receive_message_length": 64 * 1024 * 1024,
      // Some libraries send the path of a socket as :authority, which some servers refuse.
      ...(this.isUnix ? { "grpc.default_authority": "localhost" } : {}),
    };
  }

  /** Whether anybody accepts connections there, found out by connecting. */
  isListening(): Promise<boolean> {
    return new Promise((resolve) => {
      const socket = this.isUnix
        ? net.connect({ path: this.target.slice("unix:".length) })
        : net.connect(splitAddress(this.target));
      const tell = (answer: boolean) => {
        socket.destroy();
        resolve(answer);
      };
      socket.setTimeout(PROBE_MS, () => tell(false));
      socket.once("connect", () => tell(true));
      socket.once("error", () => tell(false));
    });
  }
}

/** The endpoint to use now. It can change when another daemon takes over. */
export function findEndpoint(place: Place): Endpoint {
  try {
    return find(place);
  } catch (error) {
    if (error instanceof FinetunedError) throw error;
    // A folder that cannot be looked into, or a current folder that is gone.
    const message = `the daemon's place can't be found: ${(error as Error).message}`;
    throw new DaemonUnavailable(message, { cause: error });
  }
}

function find(place: Place): Endpoint {
  const address = place.address || process.env[ADDRESS_VARIABLE];
  if (address) return endpointOf(address, place, false);
  const here = paths();
  checkOwner(here);
  const hasSockets = process.platform !== "win32";
  // Read once: a daemon that ends takes both files away, one after the other.
  const served = hasSockets && fs.existsSync(here.socket) ? undefined : addressesOf(contentOf(here.endpoint))[0];
  if (served !== undefined) return endpointOf(served, place, true);
  if (hasSockets) return endpointOf(`unix:${here.socket}`, place, true);
  throw new DaemonUnavailable(`no daemon has left its address in ${here.endpoint}`);
}

/** Host and port of an address. */
export function splitAddress(address: string): { host: string; port: number } {
  const scheme = /^[a-z][a-z0-9+.-]*:\/\//i.exec(address)?.[0];
  if (scheme !== undefined) {
    throw new InvalidArgument(
      `${JSON.stringify(address)} is no address; ${scheme} does not belong there: use host:port, or unix:/path/of.sock`,
      { reason: "BAD_ADDRESS" },
    );
  }
  const colon = address.lastIndexOf(":");
  const host = address.slice(0, Math.max(colon, 0));
  const digits = address.slice(colon + 1);
  const port = Number(digits);
  // eslint-disable-next-line no-control-regex
  if (!/^[\x20-\x7e]+$/.test(host) || !/^[0-9]{1,5}$/.test(digits) || port < 1 || port > 65535) {
    throw new InvalidArgument(
      `${JSON.stringify(address)} is no address; use unix:/path/of.sock or host:port`,
      { reason: "BAD_ADDRESS" },
    );
  }
  return { host: host.replace(/^\[|\]$/g, ""), port };
}

/** Whoever else owns the daemon's place could show us a daemon of his own. */
function checkOwner(here: Paths): void {
  const uid = process.getuid?.();
  if (uid === undefined) return;
  for (const file of [here.runtimeDir, here.socket, here.endpoint, here.token]) {
    const found = fs.lstatSync(file, { throwIfNoEntry: false });
    if (found === undefined) continue;
    const isOurs = found.uid === uid;
    const isOpen = file === here.runtimeDir && found.isDirectory() && (found.mode & 0o022) !== 0;
    if (isOurs && !isOpen) continue;
    throw new PermissionDenied(
      `${file} ${isOurs ? "can be written by others" : "belongs to another user"}, so whoever serves there may not be your ` +
        `daemon; have it removed, or choose another folder by ${RUNTIME_DIR_VARIABLE}`,
      { reason: "NOT_YOURS" },
    );
  }
}

function endpointOf(address: string, place: Place, isDefault: boolean): Endpoint {
  if (typeof address !== "string") {
    refuse([{ field: "address", description: `must be unix:/path or host:port, not ${shown(address)}`, reason: "WRONG_TYPE" }]);
  }
  if (address.startsWith("/")) return endpointOf(`unix:${address}`, place, isDefault);
  if (address.startsWith("unix:")) {
    return new Endpoint(`unix:${absolute(address.slice("unix:".length))}`, isDefault);
  }
  const { host, port } = splitAddress(address);
  const content = readTLS(place.tls);
  if (content === undefined && !isHere(host)) {
    throw new InvalidArgument(
      `${address} is another machine's, and without TLS anybody between could read the token and what you send; name the CA ` +
        `of its certificate by ${TLS_HINT} or \`tls\`, or forward the port over ssh`,
      { reason: "TLS_NEEDED" },
    );
  }
  return new Endpoint(address, isDefault, tokenFor(host, port, place.token), content);
}

function tokenFor(host: string, port: number, given: string | undefined): string {
  if (given) return checked(given, "the token");
  const ofEnvironment = process.env[TOKEN_VARIABLE];
  if (ofEnvironment) return checked(ofEnvironment, TOKEN_VARIABLE);
  // The file's token belongs to the daemon of our runtime folder. Whoever else serves on this machine, another user's program
  // perhaps, must not be shown it; after a crash that may be at the very port.
  const here = paths();
  const content = contentOf(here.endpoint);
  const isOwn = addressesOf(content)
    .filter((one) => !one.startsWith("unix:"))
    .map(splitAddress)
    .some((own) => own.host === host && own.port === port);
  if (!isOwn || !lives(content)) return "";
  checkOwner(here);
  return checked(readText(here.token), here.token);
}

/** Whether nobody but this machine is reached by it. */
function isHere(host: string): boolean {
  if (host === "localhost") return true;
  if (net.isIPv4(host)) return host.startsWith("127.");
  return net.isIPv6(host) && /^(0*:)*:?0*1$/.test(host) && host !== "1";
}

function checked(token: string, source: string): string {
  const trimmed = typeof token === "string" ? token.trim() : "\n";
  if (!/^[\x20-\x7e]*$/.test(trimmed)) {
    throw new InvalidArgument(`${source} is no token of a daemon: those are one line of printable ASCII`, {
      reason: "BAD_TOKEN",
    });
  }
  return trimmed;
}

/** What the daemon has left there; empty where nothing of a daemon's is. */
function contentOf(file: string): Record<string, unknown> {
  try {
    const content: unknown = JSON.parse(readText(file) || "{}");
    return typeof content === "object" && content !== null ? (content as Record<string, unknown>) : {};
  } catch {
    return {}; // written by something else than a daemon
  }
}

function addressesOf(content: Record<string, unknown>): string[] {
  const addresses = content["addresses"];
  if (!Array.isArray(addresses)) return [];
  return addresses.filter((one): one is string => typeof one === "string" && /^\P{C}*$/u.test(one));
}

/** Whether the daemon that has left this still runs, and as this user. */
function lives(content: Record<string, unknown>): boolean {
  if (process.platform === "win32") return true; // elsewhere a signal of 0 would end it
  const here = readText(BOOT_ID).trim();
  const bootId = content["boot_id"] ?? here;
  if (here && bootId !== here && bootId !== "") return false;
  const pid = content["pid"];
  if (typeof pid !== "number" || !Number.isInteger(pid) || pid < 1) return false;
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false; // nobody's, or another user's
  }
}

function readText(file: string): string {
  try {
    return fs.readFileSync(file, "utf8");
  } catch {
    return "";
  }
}

function sameContent(one: TLSContent | undefined, other: TLSContent | undefined): boolean {
  if (one === undefined || other === undefined) return one === other;
  const same = (a: Buffer | undefined, b: Buffer | undefined) => (a && b ? a.equals(b) : a === b);
  return same(one.ca, other.ca) && same(one.certificate, other.certificate) && same(one.key, other.key);
}
