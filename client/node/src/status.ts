/** From what gRPC gives to this package's errors, by the typed details of `google.rpc`. */

import { BinaryReader } from "@bufbuild/protobuf/wire";
import { type Metadata, type ServiceError, status } from "@grpc/grpc-js";

import {
  BY_CODE,
  DaemonUnavailable,
  FailedPrecondition,
  type FieldViolation,
  type FinetunedError,
  InternalError,
  InvalidArgument,
  type PreconditionViolation,
} from "./errors.js";

/** Metadata of a call: its id in the daemon's log. */
export const REQUEST_ID_KEY = "request-id";

const DETAILS_KEY = "grpc-status-details-bin";
const TOO_LARGE = "message larger than max";

/** What the details of a status say. */
interface Details {
  code: number;
  reason: string;
  metadata: Record<string, string>;
  fields: FieldViolation[];
  preconditions: PreconditionViolation[];
}

/**
 * The error that a failed call stands for.
 *
 * @param error What gRPC gave.
 * @param sent Metadata of the call; its id is the error's where no answer has it.
 */
export function fromServiceError(error: ServiceError, sent?: Metadata): FinetunedError {
  const code = status[error.code] ?? "UNKNOWN";
  const details = detailsOf(error);
  let reason = details?.reason ?? "";
  if (code === "RESOURCE_EXHAUSTED" && details === undefined && error.details.includes(TOO_LARGE)) {
    reason = "LIMIT_MESSAGE_BYTES"; // far too large: gRPC itself answers, which knows no reasons
  }
  if (code === "CANCELLED" && details === undefined) {
    // Not by us, who would know it: gRPC ends so what comes while its server stops.
    const stops = new DaemonUnavailable("the daemon stops", { cause: error });
    stops.requestId = sent?.get(REQUEST_ID_KEY)[0]?.toString() ?? "";
    return stops;
  }
  const options = { reason, code, metadata: details?.metadata ?? {}, cause: error };
  const kind = BY_CODE.get(code) ?? InternalError;
  let result: FinetunedError;
  if (kind === InvalidArgument) {
    result = new InvalidArgument(error.details, { ...options, violations: details?.fields ?? [] });
  } else if (kind === FailedPrecondition) {
    result = new FailedPrecondition(error.details, { ...options, violations: details?.preconditions ?? [] });
  } else {
    result = new kind(error.details || code, options);
  }
  for (const metadata of [sent, error.metadata]) {
    const id = metadata?.get(REQUEST_ID_KEY)[0];
    if (id !== undefined) result.requestId = id.toString();
  }
  return result;
}

/** Whether gRPC itself made this error. */
export function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && "code" in error && typeof error.code === "number" && "details" in error;
}

function detailsOf(error: ServiceError): Details | undefined {
  // A call that ended on this side, such as by its deadline, has no trailing metadata.
  const value = error.metadata?.get(DETAILS_KEY)[0];
  if (!(value instanceof Uint8Array)) return undefined;
  try {
    const details = readStatus(value);
    return details.code === (error.code as number) ? details : undefined;
  } catch {
    return undefined; // bytes that are no status: not our daemon's
  }
}

// The four messages of google.rpc that the daemon sends are read by hand: their classes would be larger than all of this file.

/** Calls `take` with the number of each length-delimited field; returns varints by field number. */
function read(bytes: Uint8Array, take: (field: number, content: Uint8Array) => void): Map<number, number> {
  const reader = new BinaryReader(bytes);
  const numbers = new Map<number, number>();
  while (reader.pos < reader.len) {
    const [field, wire] = reader.tag();
    if (wire === 2) take(field, reader.bytes());
    else if (wire === 0) numbers.set(field, Number(reader.int64()));
    else reader.skip(wire);
  }
  return numbers;
}

function texts(bytes: Uint8Array): Map<number, string> {
  const result = new Map<number, string>();
  read(bytes, (field, content) => result.set(field, new TextDecoder().decode(content)));
  return result;
}

function readStatus(bytes: Uint8Array): Details {
  const result: Details = { code: 0, reason: "", metadata: {}, fields: [], preconditions: [] };
  const numbers = read(bytes, (field, content) => {
    if (field === 3) readDetail(content, result);
  });
  result.code = numbers.get(1) ?? 0;
  return result;
}

function readDetail(bytes: Uint8Array, result: Details): void {
  let type = "";
  let content = new Uint8Array();
  read(bytes, (field, value) => {
    if (field === 1) type = new TextDecoder().decode(value);
    if (field === 2) content = new Uint8Array(value);
  });
  switch (type.slice(type.lastIndexOf("/") + 1)) {
    case "google.rpc.ErrorInfo":
      read(content, (field, value) => {
        if (field === 1) result.reason = new TextDecoder().decode(value);
        if (field === 3) {
          const entry = texts(value);
          result.metadata[entry.get(1) ?? ""] = entry.get(2) ?? "";
        }
      });
      break;
    case "google.rpc.BadRequest":
      read(content, (field, value) => {
        const violation = texts(value);
        if (field === 1) {
          result.fields.push({
            field: violation.get(1) ?? "",
            description: violation.get(2) ?? "",
            reason: violation.get(3) ?? "",
          });
        }
      });
      break;
    case "google.rpc.PreconditionFailure":
      read(content, (field, value) => {
        const violation = texts(value);
        if (field === 1) {
          result.preconditions.push({
            type: violation.get(1) ?? "",
            subject: violation.get(2) ?? "",
            description: violation.get(3) ?? "",
          });
        }
      });
      break;
    default:
      break;
  }
}
