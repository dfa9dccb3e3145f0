"""Writes the pages that are made from code: the parameters, in English and Chinese, and the API.

Run as `python docs/generate.py` (or `make docs`) after a change of a parameter or a proto, and
commit the result; a test compares.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, json_format, struct_pb2
from grpc_tools import _proto, protoc  # type: ignore[attr-defined]

from finetuned.v1 import parameter_service_pb2 as wire
from finetuned_daemon.parameters.schema import (
    FOLD_LABELS,
    SECTION_LABELS,
    TRAINING_TYPE_LABELS,
    build_schema,
)
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.texts import Language, Text

DOCS = Path(__file__).resolve().parent
PROTO_DIR = DOCS.parent / "proto"

# --- parameters

_MADE = Text(
    "Made by `make docs` from the daemon's own table; a change here is lost.",
    "本页由 `make docs` 根据守护进程自身的参数表生成，请勿直接修改。",
)
_TITLE = Text("Parameters", "参数")
_INTRO = Text(
    "All {count} parameters, and the extensions, as the daemon serves them to every front-end "
    "(`GetParameterSchema`). A value is given by its path: `--set training.batch_size=4`, or in "
    "a file by section. `finetunectl params PATH` shows the same at the terminal.",
    "全部 {count} 个参数以及扩展功能，与守护进程提供给各前端的内容一致（`GetParameterSchema`）。"
    "通过路径设置参数：`--set training.batch_size=4`，或在文件中按分组填写。"
    "在终端可用 `finetunectl params PATH` 查看相同内容。",
)
_CONDITIONS = Text(
    "A parameter that is shown or that counts only with certain values of others says so. One "
    "that is not shown, or greyed out, may have any value: it has no effect.",
    "仅在其他参数取特定值时才显示或生效的参数会注明条件。未显示或被禁用的参数可以取任意值，不产生影响。",
)
_OTHER = Text("[中文](parameters.zh.md)", "[English](parameters.md)")
_PATH = Text("path", "路径")
_LABEL = Text("label", "名称")
_DEFAULT = Text("default", "默认值")
_RANGE = Text("range", "取值范围")
_TYPES = Text("training", "训练类型")
_TYPE = Text("type", "类型")
_FOLD = Text("place in the form", "所在栏目")
_STEP = Text("step", "步长")
_CHOICES = Text("choices", "可选值")
_OTHERS = Text("others may be given", "可填写其他值")
_NOTE = Text("special values", "特殊取值")
_VISIBLE = Text("shown when", "显示条件")
_ENABLED = Text("counts when", "生效条件")
_REQUIRED = Text("to be confirmed before a start", "启动前需确认")
_FILLED = Text("to be filled before a start", "启动前必须填写")
_DISCOURAGED = Text("better left as it is", "不建议修改")
_IS = Text("is", "为")
_IS_NOT = Text("is not", "不为")
_OR = Text(" or ", " 或 ")
_AND = Text(" and ", "，且 ")
_EMPTY = Text("empty", "空")
_NONE = Text("none", "无")
_BOTH = Text("both", "全部")
_FROM_TO = Text("from {low} to {high}", "{low} 到 {high}")
_FROM = Text("from {low} on", "不小于 {low}")
_TO = Text("up to {high}", "不大于 {high}")
_KINDS: Mapping[str, Text] = {
    "BOOL": Text("on or off", "开关"),
    "INT": Text("whole number", "整数"),
    "FLOAT": Text("number", "数值"),
    "CHOICE": Text("one of the choices", "单选"),
    "MULTICHOICE": Text("list of names", "名称列表"),
    "FILE": Text("path of a file", "文件路径"),
    "DIRECTORY": Text("path of a folder", "文件夹路径"),
}


@dataclass(frozen=True)
class Parameter:
    """A field of the form, and the trainings whose form has it."""

    field: wire.ParameterField
    types: tuple[TrainingType, ...]


def all_parameters() -> dict[str, list[Parameter]]:
    """By section, in the order of the form."""
    schemas = {kind: build_schema(kind) for kind in TrainingType}
    types = dict[str, list[TrainingType]]()
    fields = dict[str, wire.ParameterField]()
    for kind, schema in schemas.items():
        for section in schema.sections:
            for field in section.fields:
                types.setdefault(field.path, []).append(kind)
                fields[field.path] = field
    result: dict[str, list[Parameter]] = {name: [] for name in SECTION_LABELS}
    for path, field in fields.items():
        result[path.partition(".")[0]].append(Parameter(field, tuple(types[path])))
    return result


def parameters_page(language: Language) -> str:
    """The page of all parameters."""

    def say(text: Text, **values: object) -> str:
        return text.within(language).format(**values) if values else text.within(language)

    sections = all_parameters()
    count = sum(not p.field.extension for section in sections.values() for p in section)
    lines = [f"# {say(_TITLE)}", "", f"<!-- {say(_MADE)} -->", "", say(_OTHER), ""]
    lines += [say(_INTRO, count=count), "", say(_CONDITIONS), ""]
    head = " | ".join(say(text) for text in (_PATH, _LABEL, _DEFAULT, _RANGE, _TYPES))
    for name, parameters in sections.items():
        label = say(SECTION_LABELS[name])
        lines += [f"## {label}", "", f"| {head} |", "|---|---|---|---|---|"]
        for one in parameters:
            field = one.field
            cells = [
                f"[`{field.path}`](#{_slug(field.path)})",
                _local(field.label, language),
                _default(field, language),
                _range(field, language),
                _trainings(one, language),
            ]
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        lines.append("")
        for one in parameters:
            lines += [*_one(one, language), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _one(one: Parameter, language: Language) -> Iterator[str]:
    field = one.field

    def row(name: Text, value: str) -> str:
        colon = "：" if language == "zh" else ": "
        return f"- {name.within(language)}{colon}{value}".rstrip()

    def local(text: wire.LocalizedText) -> str:
        return _local(text, language)

    yield f"### `{field.path}`"
    yield ""
    yield f"**{local(field.label)}**{'。' if language == 'zh' else '. '}{local(field.help)}"
    yield ""
    kind = wire.ParameterType.Name(field.type).removeprefix("PARAMETER_TYPE_")
    yield row(_TYPE, _KINDS[kind].within(language))
    yield row(_DEFAULT, _default(field, language))
    if field.HasField("minimum") or field.HasField("maximum"):
        yield row(_RANGE, _range(field, language))
    if field.HasField("step") and field.step != 1:
        yield row(_STEP, _number(field.step))
    if local(field.note):
        yield row(_NOTE, local(field.note))
    if field.choices:
        others = f" ({_OTHERS.within(language)})" if field.allows_other_choices else ""
        yield row(_CHOICES, others.strip())
        for choice in field.choices:
            yield f"  - `{choice.value}`: {local(choice.label)}"
    yield row(_TYPES, _trainings(one, language))
    yield row(_FOLD, FOLD_LABELS[field.fold].within(language))  # type: ignore[index]
    for name, conditions in ((_VISIBLE, field.visible_when), (_ENABLED, field.enabled_when)):
        if told := _AND.within(language).join(
            _condition(condition, language)
            for condition in conditions
            if condition.field != "training_type"
        ):
            yield row(name, told)
    if field.required:
        has_none = not field.HasField("default_value")
        yield f"- {(_FILLED if has_none else _REQUIRED).within(language)}"
    if field.discouraged:
        yield f"- {_DISCOURAGED.within(language)}"


def _condition(condition: wire.Condition, language: Language) -> str:
    is_negated = condition.operator == wire.CONDITION_OPERATOR_NONE_OF
    values = _OR.within(language).join(_value(value, language) for value in condition.values)
    verb = (_IS_NOT if is_negated else _IS).within(language)
    return f"[`{condition.field}`](#{_slug(condition.field)}) {verb} {values}"


def _trainings(one: Parameter, language: Language) -> str:
    if len(one.types) == len(TrainingType):
        return _BOTH.within(language)
    return ", ".join(TRAINING_TYPE_LABELS[kind].within(language) for kind in one.types)


def _default(field: wire.ParameterField, language: Language) -> str:
    if not field.HasField("default_value"):
        return _NONE.within(language)
    return _value(field.default_value, language)


def _value(value: struct_pb2.Value, language: Language) -> str:
    plain: Any = json_format.MessageToDict(value)
    if plain is None or plain == []:
        return _EMPTY.within(language)
    if isinstance(plain, list):
        return ", ".join(f"`{item}`" for item in plain)
    if isinstance(plain, bool):
        return f"`{str(plain).lower()}`"
    return f"`{_number(plain)}`" if isinstance(plain, int | float) else f"`{plain}`"


def _number(number: float) -> str:
    return f"{number:.0f}" if number % 1 == 0 else f"{number:g}"


def _range(field: wire.ParameterField, language: Language) -> str:
    low = _number(field.minimum) if field.HasField("minimum") else ""
    high = _number(field.maximum) if field.HasField("maximum") else ""
    text = _FROM_TO if low and high else _FROM if low else _TO if high else None
    if text is None:
        return ""
    told = text.within(language).format(low=low, high=high)
    return f"{told} {_local(field.unit, language)}".rstrip()


def _local(text: wire.LocalizedText, language: Language) -> str:
    return text.zh if language == "zh" else text.en


def _slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# --- the API

_API_INTRO = """\
# API

<!-- Made by `make docs` from the protos; a change here is lost. -->

All services and messages of `finetuned.v1`, from the comments of the protos.
[`proto/README.md`](../proto/README.md) says what is promised, where the daemon is, and how to
call it from any language.
"""

_MESSAGE_FIELD, _ENUM_VALUE = 2, 2
_FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 4, 5, 6
_NESTED_MESSAGE, _NESTED_ENUM = 3, 4
_PACKAGE = ".finetuned.v1."

Comments = Mapping[tuple[int, ...], str]


def descriptors() -> list[descriptor_pb2.FileDescriptorProto]:
    """The protos' files with their comments, by name."""
    protos = sorted(str(p.relative_to(PROTO_DIR)) for p in PROTO_DIR.glob("finetuned/v1/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "set")
        status = protoc.main(
            [
                *("protoc", f"-I{PROTO_DIR}", f"-I{next(iter(_proto.__path__))}"),
                *("--include_source_info", f"--descriptor_set_out={out}", *protos),
            ]
        )
        if status:
            raise SystemExit(status)
        return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def api_page() -> str:
    """The page of services and messages."""
    files = descriptors()
    lines = [_API_INTRO]
    lines += ["| rpc | |", "|---|---|"]
    for file in files:
        comments = _comments(file)
        for at, service in enumerate(file.service):
            for number, method in enumerate(service.method):
                name = f"{service.name}.{method.name}"
                first = comments[_FILE_SERVICE, at, 2, number].split("\n\n")[0]
                told = re.match(r".*?\.(?= |$)", first)
                lines.append(
                    f"| [`{name}`](#{_slug(name)}) | {_cell(told[0] if told else first)} |"
                )
    lines.append("")
    for file in files:
        comments = _comments(file)
        for at, service in enumerate(file.service):
            lines += _service(service, comments, (_FILE_SERVICE, at))
    for file in files:
        comments = _comments(file)
        lines += [f"## {Path(file.name).name}", ""]
        for at, message in enumerate(file.message_type):
            lines += _message(message, comments, (_FILE_MESSAGE, at), "")
        for at, enum in enumerate(file.enum_type):
            lines += _enum(enum, comments, (_FILE_ENUM, at), "")
    return "\n".join(lines).rstrip("\n") + "\n"


def _comments(file: descriptor_pb2.FileDescriptorProto) -> Comments:
    """Comments by the path of what they stand before; a paragraph has no line break."""
    return {
        tuple(place.path): "\n\n".join(
            " ".join(paragraph.split())
            for paragraph in re.split(r"\n\s*\n", place.leading_comments.strip())
        )
        for place in file.source_code_info.location
    }


def _service(
    service: descriptor_pb2.ServiceDescriptorProto, comments: Comments, path: tuple[int, ...]
) -> Iterator[str]:
    yield from (f"## {service.name}", "", comments[path], "")
    for number, method in enumerate(service.method):
        stream = "stream " if method.server_streaming else ""
        yield from (f"### {service.name}.{method.name}", "")
        yield f"{_link(method.input_type)} → {stream}{_link(method.output_type)}"
        yield from ("", comments[*path, 2, number], "")


def _message(
    message: descriptor_pb2.DescriptorProto, comments: Comments, path: tuple[int, ...], above: str
) -> Iterator[str]:
    if message.options.map_entry:
        return
    name = f"{above}{message.name}"
    entries = {
        f"{_PACKAGE}{name}.{nested.name}": nested
        for nested in message.nested_type
        if nested.options.map_entry
    }
    yield from (f"### {name}", "", comments[path], "")
    if message.field:
        yield from ("| field | type | |", "|---|---|---|")
    for number, field in enumerate(message.field):
        told = comments.get((*path, _MESSAGE_FIELD, number), "")
        if field.HasField("oneof_index") and not field.proto3_optional:
            told = f"One of `{message.oneof_decl[field.oneof_index].name}`. {told}"
        kind = _type(field, entries)
        yield f"| `{field.name}` = {field.number} | {kind} | {_cell(_plain(told))} |"
    if message.field:
        yield ""
    for number, nested in enumerate(message.nested_type):
        yield from _message(nested, comments, (*path, _NESTED_MESSAGE, number), f"{name}.")
    for number, enum in enumerate(message.enum_type):
        yield from _enum(enum, comments, (*path, _NESTED_ENUM, number), f"{name}.")


def _enum(
    enum: descriptor_pb2.EnumDescriptorProto, comments: Comments, path: tuple[int, ...], above: str
) -> Iterator[str]:
    yield from (f"### {above}{enum.name}", "", comments[path], "", "| value | |", "|---|---|")
    for number, value in enumerate(enum.value):
        told = comments.get((*path, _ENUM_VALUE, number), "")
        yield f"| `{value.name}` = {value.number} | {_cell(_plain(told))} |"
    yield ""


def _type(
    field: descriptor_pb2.FieldDescriptorProto,
    entries: Mapping[str, descriptor_pb2.DescriptorProto],
) -> str:
    if entry := entries.get(field.type_name):
        return f"map of {_type(entry.field[0], {})} to {_type(entry.field[1], {})}"
    kind = (
        _link(field.type_name)
        if field.type_name
        else f"`{field.Type.Name(field.type).removeprefix('TYPE_').lower()}`"
    )
    if field.label == field.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def _link(name: str) -> str:
    if not name.startswith(_PACKAGE):
        return f"`{name.removeprefix('.')}`"
    short = name.removeprefix(_PACKAGE)
    return f"[`{short}`](#{_slug(short)})"


def _plain(text: str) -> str:
    return text.replace("\n\n", " ")


def pages() -> dict[str, str]:
    """Every page that is made, by name."""
    return {
        "parameters.md": parameters_page("en"),
        "parameters.zh.md": parameters_page("zh"),
        "api.md": api_page(),
    }


def write(folder: Path, names: Iterable[str] = ()) -> None:
    """Writes the pages, or those of these names."""
    made = pages()
    for name in names or made:
        (folder / name).write_text(made[name])


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
