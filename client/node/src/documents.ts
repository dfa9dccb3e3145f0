/** Parameters as documents: plain values by section, as in YAML, JSON and parameter files. */

import type { GetParameterSchemaResponse } from "./gen/finetuned/v1/parameter_service.js";
import type { Template } from "./gen/finetuned/v1/template_service.js";
import { flattenParameters, type ParameterValue } from "./parameters.js";
import { wordOf } from "./words.js";

/** A template as a document. */
export interface TemplateDocument {
  kind: "template";
  /** `sft` or `pretrain`. */
  training_type: string;
  display_name: string;
  /** Section to field to value. */
  parameters: Record<string, Record<string, ParameterValue>>;
}

/**
 * A template as a document, which `finetunectl train -f` and `template import` read once it is written as JSON or YAML.
 *
 * @param template The template.
 * @param schema Of its training type, to leave out what equals its default. Absent: everything that is set.
 */
export function templateDocument(template: Template, schema?: GetParameterSchemaResponse): TemplateDocument {
  const defaults = new Map(schema?.sections.flatMap((one) => one.fields.map((field) => [field.path, field.defaultValue])));
  const parameters: TemplateDocument["parameters"] = {};
  for (const [path, value] of Object.entries(flattenParameters(template.parameters))) {
    const isDefault = JSON.stringify(value) === JSON.stringify(defaults.get(path));
    // An empty text is as good as none.
    if (value === "" || (schema !== undefined && (isDefault || !defaults.has(path)))) continue;
    const [section = "", name = ""] = path.split(".");
    (parameters[section] ??= {})[name] = value;
  }
  return {
    kind: "template",
    training_type: wordOf(template.trainingType, "TRAINING_TYPE"),
    display_name: template.displayName,
    parameters,
  };
}
