"""The gRPC server: addresses, services, and the way from start to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from finetuned.v1 import (
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    parameter_service_pb2,
    parameter_service_pb2_grpc,
    system_service_pb2,
    system_service_pb2_grpc,
    task_service_pb2,
    task_service_pb2_grpc,
    template_service_pb2,
    template_service_pb2_grpc,
)
from finetuned_daemon import logs
from finetuned_daemon.app import App
from finetuned_daemon.config import Config
from finetuned_daemon.instance import Instance
from finetuned_daemon.limits import Limits
from finetuned_daemon.service.handed import Handed
from finetuned_daemon.service.relay import Relay
from finetuned_daemon.services import reflection
from finetuned_daemon.services.access import Access
from finetuned_daemon.services.dataset_service import DatasetService
from finetuned_daemon.services.edge import Edge
from finetuned_daemon.services.parameter_service import ParameterService
from finetuned_daemon.services.system_service import SystemService
from finetuned_daemon.services.task_service import TaskService
from finetuned_daemon.services.template_service import TemplateService
from finetuned_daemon.services.transport import bind
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.opening import open_for_serving
from finetuned_daemon.tls import Certificates
from finetuned_daemon.tokens import Tokens

if TYPE_CHECKING:
    from finetuned_daemon.scrape import ScrapeServer

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 2.0
_FLUSH_SECONDS = 0.1
_SETTLE_SECONDS = 1.0
"""After the start, when whoever waited for it has been answered."""


def _options(limits: Limits) -> tuple[tuple[str, int], ...]:
    """Options of gRPC's server."""
    return (
        ("grpc.so_reuseport", 0),  # two daemons on one port would share its clients
        # What is a little too large comes through, and is answered with a reason of ours.
        ("grpc.max_receive_message_length", 2 * limits["message_bytes"]),
        ("grpc.max_send_message_length", limits["answer_bytes"]),
        ("grpc.max_metadata_size", limits["metadata_bytes"]),
        ("grpc.absolute_max_metadata_size", limits["metadata_bytes"]),
        ("grpc.max_concurrent_streams", limits["streams_per_connection"]),
        ("grpc.max_connection_idle_ms", 1000 * limits["connection_idle_seconds"]),
        # Clients may ping to keep a watch alive, but no more than this.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            1000 * limits["ping_interval_seconds"],
        ),
    )


async def serve(config: Config, instance: Instance, handed: Handed) -> None:
    """Serves until SIGTERM, SIGINT or Shutdown; then closes streams and leaves runs alone."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if config.tls is not None:
        Certificates(config.tls)  # refused before anything is opened
    access = Access(Tokens(config.paths) if config.listen else None)
    database = open_for_serving(config.database, config.runs_dir, may_be_new=config.may_be_new)
    app = App(config, database)
    edge = Edge(access, app.limits)
    server = aio.server(interceptors=[edge], options=_options(app.limits))
    # Of its own, so that it is known of a call how it came before anything of it is read.
    tcp = aio.server(interceptors=[edge.for_tcp()], options=_options(app.limits))
    addresses = [f"unix:{config.paths.socket}"]
    # gRPC takes the path for part of a URI: a percent sign or a blank in it must be encoded.
    server.add_insecure_port(f"unix:{quote(str(instance.socket))}")
    instance.socket.chmod(0o600)
    addresses += bind(tcp, config.listen, config.tls)
    scrapes = await _bind_metrics(config, app, database, edge)
    servers = (server, tcp) if config.listen else (server,)
    statuses = health.aio.HealthServicer()
    await _add_services(servers, config, app, database, addresses, stopping, statuses)
    # Runs first, clients second: nobody is told of a run that is only about to be adopted.
    app.manager.recover()
    app.retention.start()
    for each in servers:
        await each.start()
    if scrapes is not None:
        await scrapes.start()
    app.notifier.start()
    app.backups.start()
    app.power.start()
    relay = Relay(handed.listening, instance.socket) if handed.listening is not None else None
    instance.announce(addresses)
    _log.info("serving on %s", ", ".join(addresses))
    handed.tell("READY=1", f"STATUS=serving on {', '.join(addresses)}")
    logs.leave_stderr(config.paths.log)
    loop.call_later(_SETTLE_SECONDS, _settle)
    async with access.watched():
        await stopping.wait()
    _log.info("stopping; runs go on")
    handed.tell("STOPPING=1", "STATUS=stopping; runs go on")
    if relay is not None:
        await relay.stop_accepting()
    await statuses.enter_graceful_shutdown()
    app.manager.events.wake_all()
    app.manager.changes.wake_all()
    # gRPC itself would wait for idle connections too, and an idle client may never look at its
    # connection.
    await edge.wait_until_idle(_GRACE_SECONDS)
    await asyncio.gather(*(each.stop(_FLUSH_SECONDS) for each in servers))
    if relay is not None:
        await relay.close()
    if scrapes is not None:
        await scrapes.close()
    await app.close()
    database.close()


def _settle() -> None:
    """Has the collector look for garbage again, and pass over what the start has made."""
    gc.collect()
    gc.freeze()
    gc.enable()


async def _bind_metrics(
    config: Config, app: App, database: Database, edge: Edge
) -> ScrapeServer | None:
    """Takes the address for Prometheus, where one is given.

    Raises:
        BadAddress: It can't be had.
    """
    if config.prometheus is None:
        return None
    # An extra, and 40 ms.
    from finetuned_daemon.prometheus import Metrics
    from finetuned_daemon.scrape import PATH, ScrapeServer

    metrics = Metrics(app, database, edge.calls.answered, edge.calls.seconds)
    server = ScrapeServer(metrics.render)
    address = await server.bind(config.prometheus)
    _log.info("metrics on http://%s%s", address, PATH)
    return server


async def _add_services(
    servers: Sequence[aio.Server],
    config: Config,
    app: App,
    database: Database,
    addresses: list[str],
    stopping: asyncio.Event,
    statuses: health.aio.HealthServicer,
) -> None:
    tasks = TaskService(app.manager, heartbeat_seconds=config.heartbeat_seconds, stopping=stopping)
    templates = TemplateService(app.templates, app.manager)
    parameters = ParameterService(app.judge, app.planner, app.manager, app.templates)
    datasets = DatasetService(app.worker, stopping=stopping)
    system = SystemService(
        config,
        app.manager,
        app.quota,
        app.environment,
        app.limits,
        app.backups,
        app.looks,
        app.notifier,
        addresses=addresses,
        schema_version=database.schema_version,
        stopping=stopping,
    )
    names = [
        file.services_by_name[name].full_name
        for file in (
            task_service_pb2.DESCRIPTOR,
            template_service_pb2.DESCRIPTOR,
            parameter_service_pb2.DESCRIPTOR,
            dataset_service_pb2.DESCRIPTOR,
            system_service_pb2.DESCRIPTOR,
        )
        for name in file.services_by_name
    ]
    for name in ["", *names]:
        await statuses.set(name, health_pb2.HealthCheckResponse.SERVING)
    shown = [*names, health.SERVICE_NAME, reflection.NAME]
    for server in servers:
        task_service_pb2_grpc.add_TaskServiceServicer_to_server(tasks, server)
        template_service_pb2_grpc.add_TemplateServiceServicer_to_server(templates, server)
        parameter_service_pb2_grpc.add_ParameterServiceServicer_to_server(parameters, server)
        dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server(datasets, server)
        system_service_pb2_grpc.add_SystemServiceServicer_to_server(system, server)
        health_pb2_grpc.add_HealthServicer_to_server(statuses, server)
        reflection.add_reflection(shown, server)
