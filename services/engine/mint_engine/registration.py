"""Keeps this replica registered in the catalog, for as long as it lives and no longer.

A registration is a lease. It is renewed at a third of its life and at once when the replica's state changes; when the
catalog says it ended, or had forgotten it, the replica registers anew. While the catalog is away the engine goes on
serving.

The answer to a renewal names the adapters whose residency somebody waits for; which of them the engine holds is told
with the next renewal, which comes at once when that changes. Those that this node should load are passed on to its
loader, which asks for them with the residency.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

import grpc
from google.protobuf import duration_pb2

from mint_api.runtime.v1 import registry_service_pb2 as pb
from mint_api.runtime.v1 import registry_service_pb2_grpc as pb_grpc
from mint_core import channel, log
from mint_core.errors import LeaseLost, MintError, NotFound
from mint_engine.replica import Replica

__all__ = ["Registration"]

_POLL_S = 0.25
_RETRY_S = 0.5
_MAX_CALL_TIMEOUT_S = 5.0

_log = log.get_logger(__name__)


class Registration:
    """One replica's registration; :meth:`run` is its whole life."""

    def __init__(self, catalog: grpc.aio.Channel, replica: Replica, *, ttl_s: float) -> None:
        self._stub = pb_grpc.RegistryServiceStub(catalog)
        self._replica = replica
        self._ttl_s = ttl_s
        self._call_timeout_s = min(_MAX_CALL_TIMEOUT_S, ttl_s / 2)
        # Of this process: a restarted one must wait out the lease of its predecessor, which may still be serving.
        self._holder = secrets.token_hex(16)
        self._token: int | None = None
        self._wanted: frozenset[str] = frozenset()
        self._told: frozenset[str] = frozenset()
        """Of what is wanted, what the catalog was told that the engine holds."""

    @property
    def is_registered(self) -> bool:
        """Whether the catalog's last answer was that it knows this replica."""
        return self._token is not None

    async def run(self) -> None:
        """Register once reachable, renew until cancelled, then deregister."""
        try:
            await self._wait_until_reachable()
            while True:
                await self._keep()
        finally:
            await self._deregister()

    async def _keep(self) -> None:
        """One registration, from its begin to its loss; trouble with the catalog is waited out, not raised."""
        try:
            await self._register()
            while True:
                await self._pause()
                await self._renew()
        except (LeaseLost, NotFound) as error:
            _log.warning("registration lost; registering anew", extra={"fields": {"why": error.message}})
            self._token = None
        except MintError as error:
            # The catalog is away or refuses for now; what it holds of us ends by itself with the lease.
            _log.warning("the catalog did not take the registration", extra={"fields": {"why": error.message}})
        await asyncio.sleep(_RETRY_S)

    async def _register(self) -> None:
        ttl = duration_pb2.Duration()
        ttl.FromNanoseconds(int(self._ttl_s * 1e9))
        request = pb.RegisterEngineReplicaRequest(engine_replica=self._replica.describe(), holder=self._holder, ttl=ttl)
        response = await channel.call(self._stub.RegisterEngineReplica, request, timeout_s=self._call_timeout_s)
        self._token = response.registration_token
        self._wanted = self._told = frozenset()
        self._replica.to_load.clear()
        _log.info("registered", extra={"fields": {"name": self._replica.name, "address": self._replica.address}})

    async def _renew(self) -> None:
        held = self._held()
        request = pb.RenewEngineReplicaRequest(
            name=self._replica.name,
            registration_token=self._token or 0,
            state=self._replica.state,
            held_digests=sorted(held),
        )
        response = await channel.call(self._stub.RenewEngineReplica, request, timeout_s=self._call_timeout_s)
        self._wanted, self._told = frozenset(response.wanted_digests), held
        self._replica.to_load[:] = response.adapters_to_load

    def _held(self) -> frozenset[str]:
        """Of what is wanted, what the engine holds now."""
        if not self._wanted:
            return frozenset()
        return self._wanted.intersection(resident.digest for resident in self._replica.host.residents())

    async def _pause(self) -> None:
        """Wait for the next renewal: a third of the lease, less when there is something new to tell."""
        state = self._replica.state
        left_s = self._ttl_s / 3
        while left_s > 0 and self._replica.state == state and self._held() == self._told & self._wanted:
            await asyncio.sleep(min(_POLL_S, left_s))
            left_s -= _POLL_S

    async def _wait_until_reachable(self) -> None:
        """Nobody is sent to an address that does not answer yet."""
        async with channel.connect(self._replica.address) as own:
            await own.channel_ready()

    async def _deregister(self) -> None:
        if self._token is None:
            return
        request = pb.DeregisterEngineReplicaRequest(name=self._replica.name, registration_token=self._token)
        # Best effort: the lease ends by itself.
        with contextlib.suppress(MintError):
            await channel.call(self._stub.DeregisterEngineReplica, request, timeout_s=self._call_timeout_s)
        self._token = None
