/** What a client does before a run: parameters, templates, training data, environment, the daemon itself. */

import { randomUUID } from "node:crypto";

import { Caller, type CallOptions, type StreamOptions } from "./caller.js";
import { resumeChoice } from "./checkpoints.js";
import { badLinePolicy, type BadLinePolicyName, trainingType, type TrainingTypeName } from "./enums.js";
import { DaemonUnavailable, DeadlineExceeded, type FieldViolation, NotFound, refuse } from "./errors.js";
import type { DatasetReport, InspectionProgress } from "./gen/finetuned/v1/dataset_service.js";
import type {
  EstimateTaskResponse,
  GetParameterSchemaResponse,
  ParameterViolation as WireViolation,
} from "./gen/finetuned/v1/parameter_service.js";
import type {
  CheckEnvironmentResponse,
  Device,
  GetQuotaResponse,
  GetSystemInfoResponse,
} from "./gen/finetuned/v1/system_service.js";
import type { Task } from "./gen/finetuned/v1/task.js";
import type { Template } from "./gen/finetuned/v1/template_service.js";
import type { JsonValue } from "./json.js";
import { datasets, HEALTH_CHECK, parameters as parameterRpcs, system, tasks, templates } from "./methods.js";
import { type DevicesItem, DevicesPlace } from "./overview.js";
import { convertParameters, maskOf, type ParametersInput, toParameters } from "./parameters.js";
import { checkMs, shareTime } from "./time_limit.js";
import { wordOf } from "./words.js";

/** Milliseconds for calls that read the whole training file. */
export const READING_MS = 120_000;

// The training environment is asked in a process that imports torch.
const ENVIRONMENT_MS = 120_000;
// Presets have shorter ids than the daemon takes for others.
const TEMPLATE_ID = /^[a-z][a-z0-9-]{2,62}$/;
const TASK_ID = /^[a-z][a-z0-9-]{3,62}$/;

/** One thing about parameters that is wrong, unusual, or good to know. */
export interface ParameterViolation {
  /** Path, such as `training.batch_size`. */
  readonly field: string;
  /** Stable, in capitals, such as `OUT_OF_RANGE`. */
  readonly reason: string;
  /** A sentence, in the client's language. */
  readonly message: string;
  /** `error`: it can't be started like this. `warning`: it can, and is probably not what is wanted. `notice`: good to know. */
  readonly severity: "error" | "warning" | "notice";
  /** A value that would be right, of the field's own type; undefined where none is known. */
  readonly suggestedValue: JsonValue | undefined;
  /** The field that `suggestedValue` is for; empty where it is for `field`. */
  readonly suggestedField: string;
}

/** What parameters are judged with. */
export interface ValidateOptions extends CallOptions {
  /** `cpu`, `cuda:0` ... Absent: the first GPU if there is one, else the CPU. */
  device?: string | undefined;
  /** Any name of a template, for absent parameters. */
  template?: string | undefined;
  /** Any name of a task: judge an edit of it. */
  task?: string | undefined;
}

/** How a template is changed. */
export interface UpdateTemplateOptions extends CallOptions {
  /** A new one; absent: as it is. */
  displayName?: string | undefined;
  /** Parameters or sections, such as `training.batchSize`, that go back to their defaults; `parameters`: all of them. */
  reset?: string | readonly string[] | undefined;
  /** The `etag` when it was seen; absent: whatever is there. */
  etag?: string | undefined;
}

/** How a data file is read. */
export interface InspectOptions extends StreamOptions {
  /** Folder of a model or tokenizer, to count tokens and show what is learned. Absent: neither is told. */
  tokenizerPath?: string | undefined;
  /** Length in tokens at which samples are cut. Absent: 512. */
  maxSeqLength?: number | undefined;
  /** What a bad line makes of the file: `fail` (default) or `skip`. */
  badLinePolicy?: BadLinePolicyName | undefined;
  /** Samples shown in full, 0 to 20; default 3. */
  maxRenderedSamples?: number | undefined;
  /** Samples to read at most; absent: all. */
  maxSamples?: number | undefined;
}

/** What reading a data file yields: progress now and then, and the report last. */
export type InspectionItem =
  | { readonly type: "progress"; readonly progress: InspectionProgress }
  | { readonly type: "report"; readonly report: DatasetReport };

/** How devices are watched. */
export interface WatchDevicesOptions extends StreamOptions {
  /** Milliseconds between two messages, 500 to 60,000; default 2000. */
  intervalMs?: number | undefined;
  /** Milliseconds to keep trying while the daemon is away; default: for ever. */
  reconnectTimeoutMs?: number | undefined;
}

/** The part of `Client` that comes before a run. */
export class Preparing extends Caller {
  /**
   * The form of a training type: sections and fields with labels, help, ranges, conditions. Labels and help are there in both
   * languages, whatever the client's.
   */
  async parameterSchema(type: TrainingTypeName, options: CallOptions = {}): Promise<GetParameterSchemaResponse> {
    return this.call(parameterRpcs.getParameterSchema, { trainingType: trainingType(type) }, options);
  }

  /**
   * All that is to be said about parameters: errors first, then warnings, then notices. Nothing is written, and wrong parameters
   * are an answer, not an exception. With no `error` among the violations, a task with these parameters can be started.
   *
   * @param type `sft` or `pretrain`; needed unless `options.task` is given.
   * @param parameters As for `createTask`; what is absent is the template's or the task's, else the default.
   * @throws {@link InvalidArgument} No training type, or no such device.
   * @throws {@link NotFound} No such template or task.
   */
  async validate(
    type: TrainingTypeName | undefined,
    parameters: ParametersInput = {},
    options: ValidateOptions & {
      /** Required fields may be missing. */
      allowUnfinished?: boolean | undefined;
    } = {},
  ): Promise<ParameterViolation[]> {
    options = shareTime(options);
    const { parameters: sendable, violations } = convertParameters(parameters);
    const answer = await this.call(
      parameterRpcs.validateParameters,
      {
        ...(type === undefined ? {} : { trainingType: trainingType(type) }),
        parameters: sendable,
        ...(await this.#judgedWith(options)),
        allowUnfinished: options.allowUnfinished ?? false,
      },
      options,
      { timeoutMs: READING_MS },
    );
    // What was not sent because of its shape is not missing as well.
    const wrong = new Set(violations.map((one) => one.field));
    const isTold = (field: string) => wrong.has(field) || wrong.has(field.replace(/\..*/, ""));
    return [...violations.map(ofShape), ...answer.violations.map(ofDaemon).filter(({ field }) => !isTold(field))];
  }

  /**
   * What a run would do and take: steps, checkpoints, disk, memory, time. Arguments are those of `validate`.
   *
   * @param options With `resume`: plan a run that goes on from a checkpoint, the `newest` or `best` of `options.task`, or the one in
   *   this folder; `resumePlan` tells then what goes on and what has changed.
   * @throws {@link InvalidArgument} Fields are wrong or missing, all of them in `violations`.
   * @throws {@link NotFound} No such template or task.
   * @throws {@link FailedPrecondition} The task has no such checkpoint.
   */
  async estimate(
    type: TrainingTypeName | undefined,
    parameters: ParametersInput = {},
    options: ValidateOptions & {
      /** `newest`, `best`, or the folder of a checkpoint. */
      resume?: string | undefined;
    } = {},
  ): Promise<EstimateTaskResponse> {
    options = shareTime(options);
    const given = toParameters(parameters);
    const { resume, resumePath } = resumeChoice(options.resume);
    if (resumePath) given.data = { ...given.data, resumeFromCheckpoint: resumePath };
    return this.call(
      parameterRpcs.estimateTask,
      {
        ...(type === undefined ? {} : { trainingType: trainingType(type) }),
        parameters: given,
        resume,
        ...(await this.#judgedWith(options)),
      },
      options,
      { timeoutMs: READING_MS },
    );
  }

  /**
   * Create a template to begin tasks with.
   *
   * @param displayName What a user sees; unique.
   * @param type `sft` or `pretrain`; needed unless `options.task` is given.
   * @param parameters As for `createTask`. Files and folders are not looked at.
   * @throws {@link InvalidArgument} Fields are wrong, all of them in `violations`.
   * @throws {@link AlreadyExists} The id or the display name is taken.
   * @throws {@link NotFound} No such task.
   */
  async createTemplate(
    displayName: string,
    type: TrainingTypeName | undefined,
    parameters: ParametersInput = {},
    options: CallOptions & {
      /** Any name of a task whose type and parameters it takes; `parameters` win. */
      task?: string | undefined;
      /** The id within `templates/{template_id}`. Absent: the daemon chooses. */
      templateId?: string | undefined;
      /** Makes repeats of this call by yourself safe. Absent: a new one. */
      requestId?: string | undefined;
    } = {},
  ): Promise<Template> {
    options = shareTime(options);
    const answer = await this.call(
      templates.createTemplate,
      {
        template: {
          displayName,
          ...(type === undefined ? {} : { trainingType: trainingType(type) }),
          parameters: toParameters(parameters),
        },
        templateId: options.templateId ?? "",
        task: options.task ? await this.resolve(options.task, options) : "",
        requestId: options.requestId || randomUUID(),
      },
      options,
    );
    return answer.template!;
  }

  /**
   * The template, by `templates/{template_id}`, id, or display name.
   *
   * @throws {@link NotFound} No such template.
   */
  async getTemplate(name: string, options: CallOptions = {}): Promise<Template> {
    options = shareTime(options);
    checkName(name, "template");
    if (name.startsWith("templates/")) {
      return (await this.call(templates.getTemplate, { name }, options)).template!;
    }
    if (TEMPLATE_ID.test(name)) {
      try {
        return await this.getTemplate(`templates/${name}`, options);
      } catch (error) {
        if (!(error instanceof NotFound)) throw error; // else it can be a display name of the same form
      }
    }
    const found = await this.call(templates.listTemplates, { displayName: name }, options);
    const [template] = found.templates;
    if (template === undefined) {
      throw new NotFound(`there is no template ${JSON.stringify(name)}`, { reason: "TEMPLATE_NOT_FOUND" });
    }
    return template;
  }

  /** Presets, then custom templates by display name; only those of one type if it is given. */
  async *listTemplates(
    options: CallOptions & {
      /** Only those of this type. */
      trainingType?: TrainingTypeName | undefined;
    } = {},
  ): AsyncGenerator<Template, void, undefined> {
    const type = options.trainingType === undefined ? {} : { trainingType: trainingType(options.trainingType) };
    let pageToken = "";
    do {
      const page = await this.call(templates.listTemplates, { ...type, pageToken }, options);
      yield* page.templates;
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /**
   * Change a custom template; tasks made from it stay as they are.
   *
   * @throws {@link InvalidArgument} Fields are wrong, all of them in `violations`.
   * @throws {@link FailedPrecondition} It is a preset.
   * @throws {@link AlreadyExists} The display name is taken.
   * @throws {@link Aborted} It has changed since `etag` was seen.
   */
  async updateTemplate(
    name: string,
    parameters: ParametersInput = {},
    options: UpdateTemplateOptions = {},
  ): Promise<Template> {
    options = shareTime(options);
    const given = toParameters(parameters);
    const updateMask = maskOf({ display_name: options.displayName }, given, options.reset);
    const template = {
      name: await this.resolveTemplate(name, options),
      displayName: options.displayName ?? "",
      parameters: given,
      etag: options.etag ?? "",
    };
    return (await this.call(templates.updateTemplate, { template, updateMask }, options)).template!;
  }

  /**
   * Delete a custom template; tasks made from it stay as they are.
   *
   * @throws {@link FailedPrecondition} It is a preset.
   * @throws {@link Aborted} It has changed since `etag` was seen.
   */
  async deleteTemplate(
    name: string,
    options: CallOptions & {
      /** The `etag` when it was seen; absent: whatever is there. */
      etag?: string | undefined;
      /** Succeed where there is no such template. */
      allowMissing?: boolean | undefined;
    } = {},
  ): Promise<void> {
    options = shareTime(options);
    const allowMissing = options.allowMissing ?? false;
    let whole: string;
    try {
      whole = await this.resolveTemplate(name, options);
    } catch (error) {
      if (allowMissing && error instanceof NotFound) return;
      throw error;
    }
    const request = { name: whole, etag: options.etag ?? "", allowMissing };
    // A repeat would be NOT_FOUND, so it is made only where that is no error.
    await this.call(templates.deleteTemplate, request, options, { repeatable: allowMissing });
  }

  /**
   * Read a whole data file as a run would: progress now and then, and the report last. Leaving the loop ends the reading.
   *
   * @param path Absolute path on the daemon's machine.
   * @param type What it is to be used for, `sft` or `pretrain`.
   * @throws {@link InvalidArgument} Fields are wrong, all of them in `violations`.
   * @throws {@link FailedPrecondition} The training environment can't run; see `checkEnvironment`.
   * @throws {@link ResourceExhausted} Too many inspections at once.
   */
  async *inspectDataset(
    path: string,
    type: TrainingTypeName = "sft",
    options: InspectOptions = {},
  ): AsyncGenerator<InspectionItem, void, undefined> {
    const request = {
      path,
      trainingType: trainingType(type),
      tokenizerPath: options.tokenizerPath ?? "",
      maxSeqLength: options.maxSeqLength ?? 0,
      badLinePolicy: badLinePolicy(options.badLinePolicy ?? "fail"),
      ...(options.maxRenderedSamples === undefined ? {} : { maxRenderedSamples: options.maxRenderedSamples }),
      maxSamples: options.maxSamples ?? 0,
    };
    for await (const { response } of this.once(datasets.inspectDataset, request, options)) {
      if (response?.$case === "progress") yield { type: "progress", progress: response.value };
      if (response?.$case === "report") yield { type: "report", report: response.value };
    }
  }

  /**
   * Whether the daemon is there and takes calls, by the standard health check of gRPC. It is asked once: that nobody answers is an
   * answer, and none is started. `checkEnvironment` tells whether it can train.
   *
   * @throws {@link Unauthenticated} It is there, and takes no calls with this token.
   */
  async isServing(options: CallOptions = {}): Promise<boolean> {
    try {
      return await this.call(HEALTH_CHECK, {}, options, { repeatable: false, starts: false });
    } catch (error) {
      if (error instanceof DaemonUnavailable || error instanceof DeadlineExceeded) return false;
      throw error;
    }
  }

  /** What the daemon is and where it keeps things. */
  async systemInfo(options: CallOptions = {}): Promise<GetSystemInfoResponse> {
    return this.call(system.getSystemInfo, {}, options);
  }

  /** The devices that a task can run on, GPUs first. */
  async listDevices(options: CallOptions = {}): Promise<Device[]> {
    return (await this.call(system.listDevices, {}, options)).devices;
  }

  /**
   * Follow the devices: memory, utilization, temperature, power, and which task has each. They come at once, at each interval, and
   * as soon as a device is taken or freed. Where the connection breaks, a `connectionLost` comes, and the watch goes on by itself.
   *
   * @throws {@link InvalidArgument} The interval is out of its range.
   * @throws {@link DaemonUnavailable} It was away for longer than `reconnectTimeoutMs`, or never there.
   */
  async *watchDevices(options: WatchDevicesOptions = {}): AsyncGenerator<DevicesItem, void, undefined> {
    const place = new DevicesPlace(checkMs("intervalMs", options.intervalMs ?? 2000), options.reconnectTimeoutMs);
    yield* this.follow(system.watchDevices, place, options);
  }

  /**
   * Whether this machine is ready to train, item by item, with a remedy for what is not.
   *
   * @param options With `refresh`: ask the training environment again, whatever is remembered; takes seconds.
   */
  async checkEnvironment(
    options: CallOptions & {
      /** Ask again, whatever is remembered. */
      refresh?: boolean | undefined;
    } = {},
  ): Promise<CheckEnvironmentResponse> {
    const request = { refresh: options.refresh ?? false };
    return this.call(system.checkEnvironment, request, options, { timeoutMs: ENVIRONMENT_MS });
  }

  /** The training quota and what is used of it; no `limit` where there is none. */
  async quota(options: CallOptions = {}): Promise<GetQuotaResponse> {
    return this.call(system.getQuota, {}, options);
  }

  /** End the daemon. Its runs go on; the next daemon adopts them. */
  async shutdown(options: CallOptions = {}): Promise<void> {
    // Never repeated: a lost answer would be followed by "nobody there".
    await this.call(system.shutdown, {}, options, { repeatable: false });
  }

  /**
   * The task as it stands, by `tasks/{task_id}`, id, or display name; where an id and a display name are the same word, the id wins.
   *
   * @throws {@link NotFound} No such task.
   */
  async getTask(name: string, options: CallOptions = {}): Promise<Task> {
    options = shareTime(options);
    checkName(name, "task");
    if (name.startsWith("tasks/")) return (await this.call(tasks.getTask, { name }, options)).task!;
    if (TASK_ID.test(name)) {
      try {
        return await this.getTask(`tasks/${name}`, options);
      } catch (error) {
        if (!(error instanceof NotFound)) throw error; // else it can be a display name of the same form
      }
    }
    const [task] = (await this.call(tasks.listTasks, { displayName: name }, options)).tasks;
    if (task === undefined) {
      throw new NotFound(`there is no task ${JSON.stringify(name)}`, { reason: "TASK_NOT_FOUND" });
    }
    return task;
  }

  /** The resource name `tasks/{task_id}` for any name of a task. */
  protected async resolve(name: string, options: CallOptions): Promise<string> {
    checkName(name, "task");
    return name.startsWith("tasks/") ? name : (await this.getTask(name, options)).name;
  }

  /** The resource name `templates/{template_id}` for any name of a template. */
  protected async resolveTemplate(name: string, options: CallOptions): Promise<string> {
    checkName(name, "template");
    return name.startsWith("templates/") ? name : (await this.getTemplate(name, options)).name;
  }

  async #judgedWith(options: ValidateOptions): Promise<{ device: string; template: string; task: string }> {
    return {
      device: options.device ?? "",
      template: options.template ? await this.resolveTemplate(options.template, options) : "",
      task: options.task ? await this.resolve(options.task, options) : "",
    };
  }
}

/** Throws where it can be no name: what came of it would be about another task or template. */
export function checkName(name: unknown, kind: string): asserts name is string {
  if (typeof name !== "string") {
    refuse([{ field: "name", description: `must be a string, such as ${kind}.name, not ${typeof name}`, reason: "WRONG_TYPE" }]);
  }
  if (!name.trim()) refuse([{ field: "name", description: `must name a ${kind}, and is empty`, reason: "REQUIRED" }]);
}

function ofShape(wrong: FieldViolation): ParameterViolation {
  const { field, reason, description } = wrong;
  return { field, reason, message: description, severity: "error", suggestedValue: undefined, suggestedField: "" };
}

function ofDaemon(violation: WireViolation): ParameterViolation {
  const { field, reason, message, suggestedField } = violation;
  const word = wordOf(violation.severity, "SEVERITY");
  const severity = word === "warning" || word === "notice" ? word : "error";
  const suggestedValue = violation.suggestedValue ?? undefined;
  return { field, reason, message, severity, suggestedValue, suggestedField };
}
