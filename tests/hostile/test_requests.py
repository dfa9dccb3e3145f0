"""Every rpc, with messages and bytes that nobody sends in good faith.

The same for an hour, with other examples each time: `make soak`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from grpc_reflection.v1alpha import reflection_pb2

from hostile.fuzz import Fuzzer, sweep, table
from hostile.surfaces import rpcs
from hostile.victim import Victim

_EXAMPLES = 1000
_MOST_GROWTH = 300 << 20


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(tmp_path_factory.mktemp("hostile"))
    yield victim
    victim.close()


def test_no_request_is_answered_by_a_crash_hangs_or_writes_where_it_is_refused(
    victim: Victim,
) -> None:
    """No INTERNAL, UNKNOWN or UNIMPLEMENTED; typed details; nothing written; others are served."""
    before = victim.memory()
    rows = list(sweep(Fuzzer(victim), _EXAMPLES, None))
    first = "\n\n".join(f"{row.surface}: {row.first}" for row in rows if row.first)
    assert not first, f"{first}\n\n{table(rows)}"
    assert victim.complaints() == []
    assert victim.memory() - before < _MOST_GROWTH


def test_the_sweep_knows_every_service_that_the_daemon_serves(victim: Victim) -> None:
    """A service that is added is swept, or this fails."""
    request = reflection_pb2.ServerReflectionRequest(list_services="*")
    call = victim.daemon.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    answer = next(iter(call(iter([request]), timeout=30)))
    served = {service.name for service in answer.list_services_response.service}
    assert served == {rpc.descriptor.containing_service.full_name for rpc in rpcs()}
