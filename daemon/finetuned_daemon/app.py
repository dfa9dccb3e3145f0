"""The parts of the daemon, put together: who is made from what. Knows no gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetuned_daemon.backups import DailyBackups
from finetuned_daemon.config import Config
from finetuned_daemon.devices import Looks
from finetuned_daemon.events.retention import Retention
from finetuned_daemon.later import is_made, later
from finetuned_daemon.limits import Limits, open_files
from finetuned_daemon.manager import Manager
from finetuned_daemon.notify.notifier import Notifier
from finetuned_daemon.power import Power
from finetuned_daemon.requests import Repeats
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.ledger import Ledger
from finetuned_daemon.store.measurement_rows import MeasurementRows
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import TaskState
from finetuned_daemon.template_manager import TemplateManager

if TYPE_CHECKING:
    from finetuned_daemon.dataset.worker import Worker
    from finetuned_daemon.environment.environment import Environment
    from finetuned_daemon.planner import Planner
    from finetuned_daemon.validation.judge import Judge


class App:
    """Everything that services call."""

    def __init__(self, config: Config, database: Database) -> None:
        self.limits = Limits(config.limits)
        records = Records(database, self.limits)
        repeats = Repeats(database)
        self.backups = DailyBackups(config, database)
        self.looks = Looks()
        self.environment = later(lambda: _environment(config))
        self.worker = later(lambda: _worker(config))
        self.quota = Quota(config.training_quota, Ledger(database), records)
        self.judge = later(lambda: _judge(config, records, self.environment))
        self.planner = later(lambda: self._make_planner(records, MeasurementRows(database)))
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
        self.retention = Retention(
            database,
            self.manager.digests,
            self.limits["events"],
            self.limits["database_bytes"],
        )
        self.manager.grown = self.retention.compaction.grown
        self.manager.freed = self.retention.compaction.freed
        self.power = Power(self.manager.runs.save_now)
        self.notifier = Notifier(
            config.notify,
            database,
            records,
            config.paths,
            most=self.limits["notifications"],
            umask=config.runner_umask,
        )
        self.manager.events.within = self.notifier.note
        self.manager.events.on_end = self.retention.look
        self.limits.count_by("tasks", records.count)
        self.limits.count_by("database_bytes", database.used_bytes)
        self.limits.count_by("queued_tasks", lambda: records.count(TaskState.QUEUED))
        self.limits.count_by(
            "data_questions", lambda: self.worker.asked if is_made(self.worker) else 0
        )
        self.limits.count_by("open_files", open_files)

    async def close(self) -> None:
        """Ends the processes that answer questions, and leaves runs alone."""
        self.power.close()
        await self.retention.close()
        if is_made(self.worker):
            await self.worker.close()
        if is_made(self.environment):
            await self.environment.close()
        await self.manager.close()
        await self.notifier.close()
        await self.backups.close()

    def _make_planner(self, records: Records, measurements: MeasurementRows) -> Planner:
        from finetuned_daemon.planner import Planner

        return Planner(self.worker, self.environment, records, self.quota, measurements)


def _worker(config: Config) -> Worker:
    from finetuned_daemon.dataset.worker import Worker

    return Worker(config)


def _environment(config: Config) -> Environment:
    from finetuned_daemon.environment.environment import Environment

    return Environment(config)


def _judge(config: Config, records: Records, environment: Environment) -> Judge:
    from finetuned_daemon.validation.judge import Judge

    return Judge(records, environment, config.paths)
