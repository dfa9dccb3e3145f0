/** Every rpc of the daemon, by service and name, typed by the generated definitions. */

import { type FieldViolation, refuse } from "./errors.js";
import { DatasetServiceDefinition } from "./gen/finetuned/v1/dataset_service.js";
import { ParameterServiceDefinition } from "./gen/finetuned/v1/parameter_service.js";
import { SystemServiceDefinition } from "./gen/finetuned/v1/system_service.js";
import { TaskServiceDefinition } from "./gen/finetuned/v1/task_service.js";
import { TemplateServiceDefinition } from "./gen/finetuned/v1/template_service.js";
import { shown, snake } from "./words.js";

/** Bytes of a message. */
interface Writer {
  finish(): Uint8Array;
}

/** What ts-proto makes of an rpc, as far as a call needs it. */
interface Definition {
  readonly name: string;
  readonly requestType: { encode(message: never): Writer; fromPartial(part: never): unknown };
  readonly responseType: { decode(bytes: Uint8Array): unknown };
}

/** One rpc. */
export interface Method<Request, Response> {
  readonly path: string;
  encode(request: Request): Buffer;
  decode(bytes: Buffer): Response;
}

type RequestOf<D extends Definition> = Parameters<D["requestType"]["fromPartial"]>[0];
type ResponseOf<D extends Definition> = ReturnType<D["responseType"]["decode"]>;
type MethodsOf<Definitions> = {
  readonly [N in keyof Definitions]: Definitions[N] extends Definition
    ? Method<RequestOf<Definitions[N]>, ResponseOf<Definitions[N]>>
    : never;
};

/** The field that cannot be sent, found by sending each alone. */
function misfit(request: object, encode: (one: object) => unknown, error: Error): FieldViolation {
  for (const [name, value] of Object.entries(request)) {
    try {
      encode({ [name]: value });
    } catch {
      const description = `can't be ${shown(value)}${typeof value === "number" ? ": a whole number that fits is wanted" : ""}`;
      return { field: snake(name), description, reason: "WRONG_TYPE" };
    }
  }
  return { field: "", description: error.message, reason: "WRONG_TYPE" };
}

function methodsOf<T extends { fullName: string; methods: Record<string, Definition> }>(service: T): MethodsOf<T["methods"]> {
  const entries = Object.entries(service.methods).map(([key, { name, requestType, responseType }]) => {
    const method: Method<never, unknown> = {
      path: `/${service.fullName}/${name}`,
      encode: (request) => {
        const bytes = (one: never) => requestType.encode(requestType.fromPartial(one) as never).finish();
        try {
          return Buffer.from(bytes(request));
        } catch (error) {
          return refuse([misfit(request, (one) => bytes(one as never), error as Error)]);
        }
      },
      decode: (bytes) => responseType.decode(bytes),
    };
    return [key, method] as const;
  });
  return Object.fromEntries(entries) as MethodsOf<T["methods"]>;
}

/** The rpcs of TaskService. */
export const tasks = methodsOf(TaskServiceDefinition);
/** The rpcs of TemplateService. */
export const templates = methodsOf(TemplateServiceDefinition);
/** The rpcs of ParameterService. */
export const parameters = methodsOf(ParameterServiceDefinition);
/** The rpcs of DatasetService. */
export const datasets = methodsOf(DatasetServiceDefinition);
/** The rpcs of SystemService. */
export const system = methodsOf(SystemServiceDefinition);

/** The standard health check of gRPC, by hand: its answer is one field. */
export const HEALTH_CHECK: Method<object, boolean> = {
  path: "/grpc.health.v1.Health/Check",
  encode: () => Buffer.alloc(0),
  // HealthCheckResponse{status: SERVING}: field 1, a varint of 1.
  decode: (bytes) => bytes.equals(Buffer.from([8, 1])),
};
