"""Puts the catalog together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from mint_api.runtime.v1 import (
    publish_service_pb2,
    publish_service_pb2_grpc,
    registry_service_pb2,
    registry_service_pb2_grpc,
    work_service_pb2,
    work_service_pb2_grpc,
)
from mint_api.v1 import (
    alias_service_pb2,
    alias_service_pb2_grpc,
    base_model_service_pb2,
    base_model_service_pb2_grpc,
    engine_replica_service_pb2,
    engine_replica_service_pb2_grpc,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
    revision_service_pb2,
    revision_service_pb2_grpc,
    rollout_service_pb2,
    rollout_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
)
from mint_catalog.aliases import Aliases
from mint_catalog.base_models import BaseModels
from mint_catalog.blobs import Blobs
from mint_catalog.changes import Changes
from mint_catalog.codecs import MessageCodecs
from mint_catalog.etcd import EtcdStore
from mint_catalog.evaluations import Evaluations
from mint_catalog.keys import Keys
from mint_catalog.leases import Leases
from mint_catalog.policies import Policies
from mint_catalog.queue import RunQueue
from mint_catalog.registry import Registry
from mint_catalog.resolve import Resolver
from mint_catalog.revisions import Revisions
from mint_catalog.rollouts import Rollouts
from mint_catalog.runs import Runs
from mint_catalog.servicers.aliases import AliasServicer
from mint_catalog.servicers.base_models import BaseModelServicer
from mint_catalog.servicers.engines import EngineReplicaServicer, RegistryServicer
from mint_catalog.servicers.evaluations import EvaluationServicer
from mint_catalog.servicers.policies import PolicyServicer
from mint_catalog.servicers.publish import PublishServicer
from mint_catalog.servicers.revisions import RevisionServicer
from mint_catalog.servicers.rollouts import RolloutServicer
from mint_catalog.servicers.runs import RunServicer
from mint_catalog.servicers.work import WorkServicer
from mint_catalog.settings import CatalogSettings
from mint_catalog.signals import Signal
from mint_catalog.tables import Tables
from mint_catalog.upkeep import compact_history, follow, keep_reaping, keep_ticking
from mint_catalog.watch import Hub
from mint_core.log import get_logger
from mint_core.server import Binding, Services

__all__ = ["catalog"]

_logger = get_logger(__name__)
_RESTART_S = 1.0


@contextlib.asynccontextmanager
async def catalog(settings: CatalogSettings) -> AsyncIterator[Services]:
    """The catalog's services over the etcd that the settings name.

    Raises ``Unavailable`` or ``FailedPrecondition`` with one clear sentence if etcd is away or unfit.
    """
    async with EtcdStore(settings.etcd) as store:
        version = await store.check_version()
        _logger.info("connected to etcd", extra={"fields": {"version": version, "endpoints": settings.etcd.endpoints}})
        keys = Keys(settings.etcd.prefix)
        codecs = MessageCodecs.over(keys)
        tables = Tables(keys, codecs.for_store())
        hub = Hub(store, keys, queue_events=settings.watch_queue_events)
        signal = Signal()
        queue = RunQueue(store, tables, signal, max_attempts=settings.max_run_attempts)
        loops: dict[str, Callable[[], Awaitable[None]]] = {
            "watch": hub.run,
            "tick": lambda: keep_ticking(store, keys, hub, settings.tick_interval_s),
            "follow": lambda: follow(hub, keys, ("leases", "queue"), signal.notify),
            "reap": lambda: keep_reaping(queue, signal, settings.reap_interval_s),
            "compact": lambda: compact_history(store, hub, settings.keep_history_s),
        }
        async with _running(loops):
            yield _services(store, tables, codecs, hub, queue)


def _services(store: EtcdStore, tables: Tables, codecs: MessageCodecs, hub: Hub, queue: RunQueue) -> Services:
    # The stubs' types call a servicer abstract while it leaves an RPC out; gRPC answers UNIMPLEMENTED for those.
    revisions, aliases, runs = Revisions(store, tables), Aliases(store, tables), Runs(store, tables)
    changes, registry = Changes(store, tables, hub, runs), Registry(store, tables)
    public = [
        Binding(
            base_model_service_pb2_grpc.add_BaseModelServiceServicer_to_server,
            BaseModelServicer(BaseModels(store, tables), codecs),
            base_model_service_pb2.DESCRIPTOR.services_by_name["BaseModelService"].full_name,
        ),
        Binding(
            policy_service_pb2_grpc.add_PolicyServiceServicer_to_server,
            PolicyServicer(Policies(store, tables), changes, codecs),  # type: ignore[abstract]
            policy_service_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name,
        ),
        Binding(
            revision_service_pb2_grpc.add_RevisionServiceServicer_to_server,
            RevisionServicer(revisions, changes, codecs),  # type: ignore[abstract]
            revision_service_pb2.DESCRIPTOR.services_by_name["RevisionService"].full_name,
        ),
        Binding(
            alias_service_pb2_grpc.add_AliasServiceServicer_to_server,
            AliasServicer(aliases, Resolver(aliases, revisions), changes, codecs),  # type: ignore[abstract]
            alias_service_pb2.DESCRIPTOR.services_by_name["AliasService"].full_name,
        ),
        Binding(
            run_service_pb2_grpc.add_RunServiceServicer_to_server,
            RunServicer(runs, changes, codecs),
            run_service_pb2.DESCRIPTOR.services_by_name["RunService"].full_name,
        ),
        Binding(
            engine_replica_service_pb2_grpc.add_EngineReplicaServiceServicer_to_server,
            EngineReplicaServicer(registry, codecs),
            engine_replica_service_pb2.DESCRIPTOR.services_by_name["EngineReplicaService"].full_name,
        ),
        Binding(
            evaluation_service_pb2_grpc.add_EvaluationServiceServicer_to_server,
            EvaluationServicer(Evaluations(store, tables), codecs),
            evaluation_service_pb2.DESCRIPTOR.services_by_name["EvaluationService"].full_name,
        ),
        Binding(
            rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server,
            RolloutServicer(Rollouts(store, tables), codecs),
            rollout_service_pb2.DESCRIPTOR.services_by_name["RolloutService"].full_name,
        ),
    ]
    runtime = [
        Binding(
            publish_service_pb2_grpc.add_PublishServiceServicer_to_server,
            PublishServicer(Blobs(store, tables), revisions, codecs),
            publish_service_pb2.DESCRIPTOR.services_by_name["PublishService"].full_name,
        ),
        Binding(
            work_service_pb2_grpc.add_WorkServiceServicer_to_server,
            WorkServicer(Leases(store, tables), queue, codecs),
            work_service_pb2.DESCRIPTOR.services_by_name["WorkService"].full_name,
        ),
        Binding(
            registry_service_pb2_grpc.add_RegistryServiceServicer_to_server,
            RegistryServicer(registry, codecs),
            registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name,
        ),
    ]

    def on_drain() -> None:
        hub.close()
        queue.close()

    return Services(public=public, runtime=runtime, on_drain=on_drain)


@contextlib.asynccontextmanager
async def _running(loops: dict[str, Callable[[], Awaitable[None]]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(_restarting(name, loop), name=name) for name, loop in loops.items()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _restarting(name: str, loop: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await loop()
        except Exception:  # a bug in one loop must be seen in the log and must not stop the others
            _logger.exception("background loop failed, restarting it", extra={"fields": {"loop": name}})
        await asyncio.sleep(_RESTART_S)
