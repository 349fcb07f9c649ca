"""A trivial grpc.aio server: answers Resolve with one constant message. ``python -m bench.support.echo ADDRESS``

It has the options of MinT's own servers, the same messages as the catalog's Resolve, and nothing else: no interceptor,
no cache, no look at the request.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc

from mint_api.v1 import alias_service_pb2 as pb
from mint_api.v1 import common_pb2

_ANSWER = pb.ResolveResponse(
    resolution=pb.Resolution(
        revision="tenants/bench/policies/policy-0000000/revisions/1",
        blob=common_pb2.BlobRef(digest="sha256:" + "a" * 64, size_bytes=8192),
        object_key="tenants/bench/blobs/" + "a" * 64 + "/0123456789abcdef0123456789abcdef",
        base_model="baseModels/bench",
        base_digest="sha256:" + "b" * 64,
        catalog_revision=1_000_000,
    )
)


async def _resolve(_request: pb.ResolveRequest, _context: Any) -> pb.ResolveResponse:
    return _ANSWER


async def serve(address: str) -> None:
    """Serve until killed."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", 8 * 1024 * 1024),
            ("grpc.max_send_message_length", 8 * 1024 * 1024),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.so_reuseport", 0),
        ]
    )
    handler = grpc.unary_unary_rpc_method_handler(
        _resolve, pb.ResolveRequest.FromString, pb.ResolveResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("mint.v1.AliasService", {"Resolve": handler}),)
    )
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
