"""Custom templates as rows."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.kept import Kept
from finetuned_daemon.store.records import insert, update
from finetuned_daemon.templates import Template


class TemplateRows:
    """Reads and writes of whole templates. Writes take the connection of a transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._template = Kept(_template, 128)

    def template(self, template_id: str) -> Template | None:
        """The template of an id."""
        row = self._database.query_one("SELECT * FROM templates WHERE template_id = ?", template_id)
        return None if row is None else self._template(row)

    def named(self, display_name: str) -> Template | None:
        """The template of a display name."""
        row = self._database.query_one(
            "SELECT * FROM templates WHERE display_name = ?", display_name
        )
        return None if row is None else self._template(row)

    def page(
        self, training_type: TrainingType | None, display_name: str, skipped: int, limit: int
    ) -> list[Template]:
        """Up to `limit` custom templates by display name, behind the first so many.

        Args:
            training_type: Only of this type; None: of each.
            display_name: Only the one of this name; empty: all.
            skipped: Not read from the disk but for the index of names.
            limit: At most.
        """
        where, values = ["1"], list[object]()
        if training_type is not None:
            where.append("training_type = ?")
            values.append(training_type.value)
        if display_name:
            where.append("display_name = ?")
            values.append(display_name)
        rows = self._database.query(
            f"SELECT * FROM templates WHERE {' AND '.join(where)} "  # noqa: S608 - no value in it
            "ORDER BY display_name, key LIMIT ? OFFSET ?",
            *values,
            limit,
            skipped,
        )
        return [self._template(row) for row in rows]

    def insert(self, connection: sqlite3.Connection, template: Template) -> Template:
        """Writes a new template; returns it with its key."""
        columns = _columns(template)
        cursor = connection.execute(insert("templates", columns), columns)
        return replace(template, key=int(cursor.lastrowid or 0))

    def save(self, connection: sqlite3.Connection, template: Template) -> None:
        """Writes all of a template."""
        columns = _columns(template)
        connection.execute(update("templates", columns), {**columns, "key": template.key})

    def delete(self, connection: sqlite3.Connection, template: Template) -> None:
        """Deletes a template."""
        connection.execute("DELETE FROM templates WHERE key = ?", (template.key,))


def _columns(template: Template) -> dict[str, object]:
    return {
        "template_id": template.template_id,
        "display_name": template.display_name,
        "training_type": template.training_type.value,
        "parameters": template.parameters.model_dump_json(),
        "create_time": template.create_time,
        "update_time": template.update_time,
        "revision": template.revision,
    }


def _template(row: sqlite3.Row) -> Template:
    return Template(
        key=row["key"],
        template_id=row["template_id"],
        display_name=row["display_name"],
        training_type=TrainingType(row["training_type"]),
        parameters=Parameters.model_validate_json(row["parameters"]),
        create_time=row["create_time"],
        update_time=row["update_time"],
        revision=row["revision"],
    )
