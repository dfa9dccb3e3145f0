"""What probes have measured, as rows."""

from __future__ import annotations

import sqlite3

from finetuned_daemon.measurements import Measurement
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import ProbeReport, TrainingType
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.records import insert

_MOST = 100
"""Rows of a model on a device that are kept and looked at."""


class MeasurementRows:
    """Reads and writes measurements."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, connection: sqlite3.Connection, measurement: Measurement) -> None:
        """Writes one; the oldest of its kind goes where there are many."""
        kind = (measurement.model, measurement.device, measurement.training_type.value)
        columns: dict[str, object] = {
            "time": measurement.time,
            "model": measurement.model,
            "device": measurement.device,
            "training_type": measurement.training_type.value,
            "parameters": measurement.parameters.model_dump_json(),
            "report": measurement.report.model_dump_json(),
        }
        connection.execute(insert("measurements", columns), columns)
        connection.execute(
            "DELETE FROM measurements WHERE model = ? AND device = ? AND training_type = ? "
            "AND key NOT IN (SELECT key FROM measurements WHERE model = ? AND device = ? "
            "AND training_type = ? ORDER BY key DESC LIMIT ?)",
            (*kind, *kind, _MOST),
        )

    def of(self, model: str, device: str, training_type: TrainingType) -> list[Measurement]:
        """Those of a model on a device, newest first."""
        rows = self._database.query(
            "SELECT * FROM measurements WHERE model = ? AND device = ? AND training_type = ? "
            "ORDER BY key DESC LIMIT ?",
            model,
            device,
            training_type.value,
            _MOST,
        )
        return [
            Measurement(
                time=row["time"],
                model=row["model"],
                device=row["device"],
                training_type=TrainingType(row["training_type"]),
                parameters=Parameters.model_validate_json(row["parameters"]),
                report=ProbeReport.model_validate_json(row["report"]),
            )
            for row in rows
        ]
