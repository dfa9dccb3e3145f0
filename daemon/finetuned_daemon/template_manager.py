"""What can be done with templates: create, list, update, delete. Knows no gRPC."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetuned_daemon.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    Severity,
    StaleEtag,
    Violation,
    WrongState,
)
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.requests import (
    Given,
    Repeats,
    RequestId,
    check_display_name,
    check_id,
    check_mask,
    check_training_type,
    masked,
    merged,
)
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.template_rows import TemplateRows
from finetuned_daemon.tasks import Task, now_us
from finetuned_daemon.templates import Template, preset_of, presets
from finetuned_daemon.texts import Text

_OF_ONE_TASK = ("data.output_dir", "data.resume_from_checkpoint")


@dataclass(frozen=True, kw_only=True)
class NewTemplate:
    """A template as asked for."""

    training_type: TrainingType | None
    parameters: Given
    display_name: str
    template_id: str = ""
    wrong: Sequence[Violation] = ()
    """What was found wrong as the request was read."""


class TemplateManager:
    """All operations on templates. Runs on the event loop's thread; reads no files."""

    def __init__(self, database: Database, repeats: Repeats) -> None:
        self._database = database
        self._rows = TemplateRows(database)
        self._repeats = repeats

    # --- read

    def get(self, name: str) -> Template:
        """The template of a resource name.

        Raises:
            NotFound: There is none.
        """
        template_id = name.removeprefix("templates/") if name.startswith("templates/") else ""
        for preset in presets():
            if preset.template_id == template_id:
                return preset
        template = self._rows.template(template_id)
        if template is None:
            raise NotFound("template", name)
        return template

    def list(
        self, training_type: TrainingType | None, display_name: str, *, skipped: int, limit: int
    ) -> list[Template]:
        """Presets, then custom templates by display name: a page of them."""
        listed = [
            preset
            for preset in presets()
            if training_type in (None, preset.training_type)
            if display_name in ("", preset.display_name)
        ]
        found = listed[skipped : skipped + limit]
        if len(found) < limit:
            skipped = max(0, skipped - len(listed))
            found += self._rows.page(training_type, display_name, skipped, limit - len(found))
        return found

    # --- write

    def create(
        self,
        new: NewTemplate,
        source: Callable[[], Task] | None,
        request: RequestId[Template] | None,
    ) -> Template | bytes:
        """Creates a custom template.

        Args:
            new: What is asked for.
            source: Looks up the task that it is made from; None: defaults. Not asked for a repeat:
                the task may have gone since.
            request: For a safe repeat.

        Returns:
            The template, or the serialized first answer to a repeated request.

        Raises:
            InvalidRequest: With every wrong field; nothing was written.
            AlreadyExists: The id or the display name is taken.
            NotFound: There is no task to make it from.
        """
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        task = None if source is None else source()
        if task is not None and new.training_type is None:
            new = replace(new, training_type=task.training_type)
        violations = [*new.wrong, *check_id("template_id", new.template_id)]
        violations += _check_name(new.display_name) + check_display_name(new.display_name)
        violations += check_training_type(new.training_type, violations)
        training_type = new.training_type or TrainingType.SFT
        if task is None:
            base = preset_of(training_type).parameters
        else:
            base = Parameters.model_validate(_shared(task.parameters.model_dump()))
        parameters, wrong = _judged(merged(base, new.parameters), training_type)
        violations += wrong
        if violations or parameters is None:
            raise InvalidRequest(violations)
        now = now_us()
        template = Template(
            template_id=new.template_id or f"template-{secrets.token_hex(5)}",
            display_name=new.display_name,
            training_type=training_type,
            parameters=parameters,
            create_time=now,
            update_time=now,
        )
        self._check_free(template)
        with self._database.transaction(durable=True) as connection:
            template = self._rows.insert(connection, template)
            self._repeats.keep(connection, request, template)
        return template

    def update(
        self,
        name: str,
        *,
        display_name: str,
        given: Given,
        paths: Sequence[str],
        etag: str,
    ) -> Template:
        """Changes a custom template; with no `paths`, what is given.

        Raises:
            NotFound: There is none.
            WrongState: It is a preset.
            StaleEtag: It has changed.
            InvalidRequest: With every wrong field.
            AlreadyExists: The display name is taken.
        """
        template = self._custom(name)
        _check_etag(template, etag)
        violations = check_mask(paths, ("display_name", "parameters"))
        if "display_name" in paths or (not paths and display_name):
            violations += _check_name(display_name) + check_display_name(display_name)
        else:
            display_name = template.display_name
        values = (
            masked(template.parameters, given, paths)
            if paths
            else merged(template.parameters, given)
        )
        parameters, wrong = _judged(values, template.training_type)
        violations += wrong
        if violations or parameters is None:
            raise InvalidRequest(violations)
        changed = replace(template, display_name=display_name, parameters=parameters)
        self._check_free(changed)
        with self._database.transaction(durable=True) as connection:
            return self._save(connection, changed)

    def check_writable(self, name: str) -> Template:
        """The custom template that a task's parameters are to be written into.

        Raises:
            NotFound: There is none.
            WrongState: It is a preset, or the task has none.
        """
        if not name:
            raise WrongState(
                "update_template",
                "NO_TEMPLATE",
                "the task has no template to write to; save its parameters as a new one",
            )
        return self._custom(name)

    def write(self, connection: sqlite3.Connection, name: str, edits: Given) -> None:
        """Writes a task's edits into its custom template, in the task's transaction."""
        template = self._custom(name)
        values = merged(template.parameters, _shared(edits))
        parameters = Parameters.model_validate(values)
        self._save(connection, replace(template, parameters=parameters))

    def delete(self, name: str, *, etag: str, allow_missing: bool) -> None:
        """Deletes a custom template.

        Raises:
            NotFound: There is none.
            WrongState: It is a preset.
            StaleEtag: It has changed.
        """
        try:
            template = self._custom(name)
        except NotFound:
            if allow_missing:
                return
            raise
        _check_etag(template, etag)
        with self._database.transaction(durable=True) as connection:
            self._rows.delete(connection, template)

    # --- parts

    def _custom(self, name: str) -> Template:
        template = self.get(name)
        if template.is_preset:
            raise WrongState(
                template.name,
                "TEMPLATE_IMMUTABLE",
                f"{template.display_name} is a preset and never changes; save a copy of it",
            )
        return template

    def _check_free(self, template: Template) -> None:
        """Raises AlreadyExists where another template has this id or display name."""
        ids = [preset for preset in presets() if preset.template_id == template.template_id]
        other = self._rows.template(template.template_id)
        if ids or (other is not None and other.key != template.key):
            raise AlreadyExists(
                "template",
                template.name,
                "TEMPLATE_ID_TAKEN",
                f"there is a template {template.template_id!r} already",
            )
        names = {preset.display_name.casefold() for preset in presets()}
        other = self._rows.named(template.display_name)
        if template.display_name.casefold() in names or (
            other is not None and other.key != template.key
        ):
            raise AlreadyExists(
                "template",
                template.display_name,
                "DISPLAY_NAME_TAKEN",
                f"there is a template named {template.display_name!r} already; choose another name",
            )

    def _save(self, connection: sqlite3.Connection, template: Template) -> Template:
        template = replace(template, update_time=now_us(), revision=template.revision + 1)
        self._rows.save(connection, template)
        return template


def _shared(values: Given) -> dict[str, dict[str, Any]]:
    """The values without those that belong to one task alone: where it writes, what it resumes.

    Tasks of one template would write into one folder, and go on from one another's checkpoints.
    """
    return {
        section: {k: v for k, v in fields.items() if f"{section}.{k}" not in _OF_ONE_TASK}
        for section, fields in values.items()
    }


def _check_name(name: str) -> list[Violation]:
    if name:
        return []
    return [Violation("display_name", Text("is required", "必填"), "REQUIRED")]


def _judged(
    values: Given, training_type: TrainingType
) -> tuple[Parameters | None, list[Violation]]:
    """What holds of the fields alone: a template is made for other devices and files too."""
    # Seldom, and a daemon starts sooner without.
    from finetuned_daemon.validation.check import check_fields

    parameters, violations = check_fields(values, training_type)
    return parameters, [v for v in violations if v.severity is Severity.ERROR]


def _check_etag(template: Template, etag: str) -> None:
    if etag and etag != template.etag:
        raise StaleEtag(template.name)
