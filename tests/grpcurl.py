"""As much of grpcurl as the documents use, over the same reflection: it knows no stubs of ours.

grpcurl is a Go program that the machines of tests do not have. Options and answers are as there;
a unix socket needs `-unix` and its bare path.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("-plaintext", "-unix"):
        parser.add_argument(flag, action="store_true")
    for option in ("-d", "-authority", "-max-time", "-cacert"):
        parser.add_argument(option)
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("address")
    parser.add_argument("what", nargs="+")
    asked = parser.parse_args()
    if asked.address.startswith("unix:"):
        sys.exit("Failed to dial target host: unknown port")  # as grpcurl has it
    target = f"unix:{asked.address}" if asked.unix else asked.address
    options = [("grpc.default_authority", asked.authority or "localhost")]
    assert asked.plaintext or asked.cacert
    if asked.plaintext:
        channel = grpc.insecure_channel(target, options)
    else:
        with open(asked.cacert, "rb") as ca:
            credentials = grpc.ssl_channel_credentials(ca.read())
        channel = grpc.secure_channel(target, credentials, options)
    with channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        match asked.what:
            case ["list"]:
                print("\n".join(sorted(database.get_services())))
            case ["list", service]:
                found: Any = pool.FindServiceByName(service)
                print("\n".join(sorted(f"{service}.{m.name}" for m in found.methods)))
            case ["describe", name]:
                print(database.FindFileContainingSymbol(name).name)
            case [name]:
                metadata = [tuple(h.split(": ", 1)) for h in asked.H]
                _call(channel, pool, name, asked.d or "{}", metadata)
            case _:
                parser.error("list, describe NAME, or SERVICE/METHOD")
    return 0


def _call(channel: Any, pool: Any, name: str, data: str, metadata: list[Any]) -> None:
    service, _, method_name = name.partition("/")
    method = pool.FindServiceByName(service).methods_by_name[method_name]
    make = message_factory.GetMessageClass
    request = json_format.ParseDict(json.loads(data), make(method.input_type)())
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = kind(
        f"/{name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=make(method.output_type).FromString,
    )
    answer = call(request, metadata=metadata, timeout=20)
    for message in answer if method.server_streaming else [answer]:
        print(json_format.MessageToJson(message), flush=True)


if __name__ == "__main__":
    sys.exit(main())
