/**
 * Client of the fine-tuning daemon `finetuned`, for Node and Electron's main process.
 *
 * ```ts
 * import { Client } from "@finetuned/client";
 *
 * const client = new Client({ startDaemon: true });
 * const task = await client.train("sft", {
 *   data: { trainFile: "chats.jsonl", modelPath: "~/models/small", outputDir: "out" },
 * });
 * for await (const item of task.watch()) {
 *   if (item.type === "event" && item.event.payload?.$case === "progress") console.log(item.event.payload.value.loss);
 * }
 * client.close();
 * ```
 *
 * @packageDocumentation
 */

export type { CallOptions, ClientOptions, StreamOptions } from "./caller.js";
export { Client } from "./client.js";
export { templateDocument, type TemplateDocument } from "./documents.js";
export type { BadLinePolicyName, ConfigFormatName, LogLevel, TaskStateName, TrainingTypeName } from "./enums.js";
export {
  Aborted,
  AlreadyExists,
  DaemonNotStarted,
  DaemonUnavailable,
  DeadlineExceeded,
  type ErrorObject,
  type ErrorOptions,
  EventsLost,
  FailedPrecondition,
  type FieldViolation,
  FinetunedError,
  InternalError,
  InvalidArgument,
  NotFound,
  OutOfRange,
  PermissionDenied,
  type PreconditionViolation,
  ProbeFailed,
  ResourceExhausted,
  RunFailed,
  Unauthenticated,
  Unimplemented,
} from "./errors.js";
export { TaskHandle } from "./handle.js";
export { type DaemonCommand, startDaemon, type StartOptions } from "./launch.js";
export type { JsonValue } from "./json.js";
export type { Metrics, Series } from "./metrics.js";
export type {
  ChangeOptions,
  CreateTaskOptions,
  DeleteTaskOptions,
  LogEntry,
  LogsOptions,
  MetricsOptions,
  StartTaskOptions,
  TrainOptions,
  UpdateTaskOptions,
  WaitOptions,
  WatchTaskOptions,
  WatchTasksOptions,
} from "./options.js";
export type { ConnectionLost } from "./outage.js";
export type { DevicesItem, TasksItem } from "./overview.js";
export { flattenParameters, parameterPaths, type ParametersInput, type ParameterValue } from "./parameters.js";
export type {
  InspectionItem,
  InspectOptions,
  ParameterViolation,
  UpdateTemplateOptions,
  ValidateOptions,
  WatchDevicesOptions,
} from "./preparing.js";
export type { TLS } from "./tls.js";
export type { WatchItem } from "./watch.js";

export {
  type BadDataLine,
  BadLinePolicy,
  DataFormat,
  type DatasetReport,
  type FormatCount,
  type HistogramBin,
  type InspectionProgress,
  type RenderedPiece,
  type RenderedSample,
  type RoleCount,
  type TokenLengths,
  type TurnCount,
} from "./gen/finetuned/v1/dataset_service.js";
export type {
  BestCheckpoint,
  CheckpointDeleted,
  CheckpointSaved,
  Evaluation,
  Event,
  Evidence,
  LogLine,
  Metrics as MetricsEvent,
  Notice,
  PhaseChange,
  ProbeReport,
  Result,
  StateChange,
  TaskEdited,
} from "./gen/finetuned/v1/event.js";
export {
  type Calibration,
  type Condition,
  ConditionOperator,
  type EstimateTaskResponse,
  type GetParameterSchemaResponse,
  type LocalizedText,
  type MemoryPart,
  type ParameterChoice,
  type ParameterField,
  type ParameterFold,
  type ParameterSection,
  ParameterType,
  type ParameterViolation as EstimateViolation,
  ResumeEffect,
  type ResumeItem,
  type ResumePlan,
  Severity,
  type TaskStateLabel,
  type TrainingTypeLabel,
  Widget,
} from "./gen/finetuned/v1/parameter_service.js";
export type {
  DataParameters,
  ExtensionParameters,
  GeneralParameters,
  LoggingParameters,
  LoraParameters,
  OptimizationParameters,
  Parameters,
  StringList,
  TrainingParameters,
} from "./gen/finetuned/v1/parameters.js";
export {
  type CheckEnvironmentResponse,
  CheckStatus,
  type Device,
  type DeviceCapability,
  DeviceType,
  type EnvironmentItem,
  type GetQuotaResponse,
  type GetSystemInfoResponse,
  type Limit,
  type Standby,
  StandbyState,
} from "./gen/finetuned/v1/system_service.js";
export {
  type Checkpoint,
  EndReason,
  PauseReason,
  type Progress,
  type Run,
  RunPhase,
  type Task,
  TaskState,
  TrainingType,
} from "./gen/finetuned/v1/task.js";
export {
  ConfigFormat,
  type DeleteCheckpointResponse,
  type DeleteTaskResponse,
  type ExportTaskConfigResponse,
} from "./gen/finetuned/v1/task_service.js";
export type { Template } from "./gen/finetuned/v1/template_service.js";
