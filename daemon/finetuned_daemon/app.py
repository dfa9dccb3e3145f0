"""The parts of the daemon, put together: who is made from what. Knows no gRPC."""

from __future__ import annotations

from finetuned_daemon.config import Config
from finetuned_daemon.dataset.worker import Worker
from finetuned_daemon.environment.environment import Environment
from finetuned_daemon.manager import Manager
from finetuned_daemon.planner import Planner
from finetuned_daemon.requests import Repeats
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.ledger import Ledger
from finetuned_daemon.store.measurement_rows import MeasurementRows
from finetuned_daemon.store.records import Records
from finetuned_daemon.template_manager import TemplateManager
from finetuned_daemon.validation.judge import Judge


class App:
    """Everything that services call."""

    def __init__(self, config: Config, database: Database) -> None:
        records = Records(database)
        repeats = Repeats(database)
        self.environment = Environment(config)
        self.worker = Worker(config)
        self.quota = Quota(config.training_quota, Ledger(database), records)
        self.judge = Judge(records, self.environment)
        self.planner = Planner(
            self.worker, self.environment, records, self.quota, MeasurementRows(database)
        )
        self.templates = TemplateManager(database, repeats)
        self.manager = Manager(
            config,
            database,
            records=records,
            repeats=repeats,
            templates=self.templates,
            judge=self.judge,
            planner=self.planner,
            environment=self.environment,
            quota=self.quota,
        )

    async def close(self) -> None:
        """Ends the processes that answer questions, and leaves runs alone."""
        await self.worker.close()
        await self.environment.close()
        await self.manager.close()
