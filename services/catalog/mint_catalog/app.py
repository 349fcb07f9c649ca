"""Puts the catalog together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from mint_api.runtime.v1 import (
    maintenance_service_pb2,
    maintenance_service_pb2_grpc,
    publish_service_pb2,
    publish_service_pb2_grpc,
    registry_service_pb2,
    registry_service_pb2_grpc,
    usage_report_service_pb2,
    usage_report_service_pb2_grpc,
    work_service_pb2,
    work_service_pb2_grpc,
)
from mint_api.v1 import (
    alias_service_pb2,
    alias_service_pb2_grpc,
    audit_service_pb2,
    audit_service_pb2_grpc,
    base_model_service_pb2,
    base_model_service_pb2_grpc,
    engine_replica_service_pb2,
    engine_replica_service_pb2_grpc,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
    revision_service_pb2,
    revision_service_pb2_grpc,
    rollout_service_pb2,
    rollout_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
    tenant_service_pb2,
    tenant_service_pb2_grpc,
    usage_service_pb2,
    usage_service_pb2_grpc,
)
from mint_blobs import ObjectStore
from mint_catalog.fleet.erasure import ERASURE_DUTY, Erasures
from mint_catalog.fleet.operations import Fleet
from mint_catalog.fleet.work import FLEET_DUTY, FleetWork
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.keys import Keys
from mint_catalog.model.tables import Tables
from mint_catalog.policies.base_models import BaseModels
from mint_catalog.policies.blobs import Blobs
from mint_catalog.policies.bulk import BulkCreation
from mint_catalog.policies.evaluations import Evaluations
from mint_catalog.policies.heads import Policies
from mint_catalog.policies.revisions import Revisions
from mint_catalog.policies.rollouts import Rollouts
from mint_catalog.servicers.aliases import AliasServicer
from mint_catalog.servicers.audit import AuditServicer
from mint_catalog.servicers.base_models import BaseModelServicer
from mint_catalog.servicers.engines import EngineReplicaServicer, RegistryServicer
from mint_catalog.servicers.evaluations import EvaluationServicer
from mint_catalog.servicers.fleet import FleetServicer
from mint_catalog.servicers.maintenance import MaintenanceServicer
from mint_catalog.servicers.policies import PolicyServicer
from mint_catalog.servicers.publish import PublishServicer
from mint_catalog.servicers.revisions import RevisionServicer
from mint_catalog.servicers.rollouts import RolloutServicer
from mint_catalog.servicers.runs import RunServicer
from mint_catalog.servicers.tenants import TenantServicer
from mint_catalog.servicers.usage import UsageReportServicer, UsageServicer
from mint_catalog.servicers.work import WorkServicer
from mint_catalog.serving.aliases import Aliases
from mint_catalog.serving.cache import AliasCache
from mint_catalog.serving.registry import Registry
from mint_catalog.serving.residency import Residency
from mint_catalog.serving.resolve import Resolver
from mint_catalog.settings import CatalogSettings
from mint_catalog.storage.changes import Changes
from mint_catalog.storage.duty import CATALOG_PRINCIPAL, Duties, keep_doing
from mint_catalog.storage.etcd import EtcdStore
from mint_catalog.storage.members import Members
from mint_catalog.storage.nearby import NearbyReads
from mint_catalog.storage.recent import FAMILIES, Recent
from mint_catalog.storage.signals import Signal
from mint_catalog.storage.watch import Hub
from mint_catalog.trail.audit_trail import AuditTrail
from mint_catalog.trail.usage import Usages
from mint_catalog.upkeep.backup import Backup, held_revision
from mint_catalog.upkeep.garbage import DUTY as GARBAGE_DUTY
from mint_catalog.upkeep.garbage import GarbageCollector, Grace
from mint_catalog.upkeep.loops import compact_history, follow, keep_reaping, keep_ticking
from mint_catalog.upkeep.restore import Restore
from mint_catalog.upkeep.space import defragment_roomy, watch_space
from mint_catalog.work.leases import Leases
from mint_catalog.work.queue import RunQueue
from mint_catalog.work.runs import Runs
from mint_core import calls
from mint_core.log import get_logger
from mint_core.server import Binding, Services

__all__ = ["catalog"]

_logger = get_logger(__name__)
_RESTART_S = 1.0
_JOB_INTERVAL_S = 1.0


@contextlib.asynccontextmanager
async def catalog(settings: CatalogSettings) -> AsyncIterator[Services]:
    """The catalog's services over the etcd that the settings name.

    Raises ``Unavailable`` or ``FailedPrecondition`` with one clear sentence if etcd is away or unfit.
    """
    async with EtcdStore(settings.etcd) as store, _object_store(settings) as objects:
        version = await store.check_version()
        _logger.info("connected to etcd", extra={"fields": {"version": version, "endpoints": settings.etcd.endpoints}})
        keys = Keys(settings.etcd.prefix)
        codecs = MessageCodecs.over(keys)
        tables = Tables(keys, codecs.for_store())
        hub = Hub(store, keys, queue_events=settings.watch_queue_events)
        signal = Signal()
        queue = RunQueue(
            store,
            tables,
            signal,
            max_attempts=settings.max_run_attempts,
            backoff_s=settings.run_retry_backoff_s,
            backoff_max_s=settings.run_retry_backoff_max_s,
        )
        duties = Duties(store, keys)
        members = Members(settings.etcd)
        garbage = GarbageCollector(store, tables, objects, duties, _grace(settings))
        residency = Residency(store, tables)
        cache = AliasCache(keys, hub, max_entries=settings.cache_entries, staleness_s=settings.cache_staleness_s)
        hub.listen("aliases", cache)
        store.on_write(cache.wrote)
        recent = Recent(max_records=settings.recent_records)
        for family in FAMILIES:
            hub.listen(family, recent)
        aliases = Aliases(store, tables, residency, recent)
        policies = Policies(store, tables, undelete_grace_s=settings.undelete_grace_s)
        fleet = FleetWork(store, tables, aliases, policies)
        erasures = Erasures(store, tables, objects, settle_s=settings.erasure_settle_s)
        loops: dict[str, Callable[[], Awaitable[None]]] = {
            "watch": hub.run,
            "look": lambda: hub.keep_looking(settings.tick_interval_s),
            "tick": lambda: keep_ticking(store, keys, hub, settings.tick_interval_s),
            "follow": lambda: follow(hub, keys, ("leases", "queue"), signal.notify),
            "residency": lambda: follow(hub, keys, ("holdings",), residency.look),
            "reap": lambda: keep_reaping(queue, signal, settings.reap_interval_s),
            "garbage": lambda: keep_doing(duties, GARBAGE_DUTY, garbage.run, settings.gc_interval_s, remembered=True),
            "defragment": lambda: keep_doing(
                duties,
                "defragment",
                lambda duty: defragment_roomy(members, duty, settings.defragment_min_free_bytes),
                settings.defragment_interval_s,
                remembered=True,
            ),
            "space": lambda: watch_space(members),
            "compact": lambda: compact_history(
                store, hub, settings.keep_history_s, held=lambda: held_revision(store, keys)
            ),
            "fleet": lambda: keep_doing(duties, FLEET_DUTY, fleet.work, _JOB_INTERVAL_S, pending=fleet.pending),
        }
        maintenance = MaintenanceServicer(garbage, Backup(store, keys), Restore(store, tables, duties, objects))
        if objects is not None:
            loops["erasure"] = lambda: keep_doing(
                duties, ERASURE_DUTY, erasures.work, _JOB_INTERVAL_S, pending=erasures.pending
            )
        async with _running(loops):
            nearby = NearbyReads(store, hub, staleness_s=settings.cache_staleness_s)
            resolver = Resolver(store, tables, cache, nearby)
            yield _services(
                store, tables, codecs, hub, queue, policies, aliases, residency, resolver, maintenance, erasures
            )


def _services(
    store: EtcdStore,
    tables: Tables,
    codecs: MessageCodecs,
    hub: Hub,
    queue: RunQueue,
    policies: Policies,
    aliases: Aliases,
    residency: Residency,
    resolver: Resolver,
    maintenance: MaintenanceServicer,
    erasures: Erasures,
) -> Services:
    revisions, runs = Revisions(store, tables), Runs(store, tables)
    changes, registry = Changes(store, tables, hub, runs), Registry(store, tables)
    public = [
        Binding(
            base_model_service_pb2_grpc.add_BaseModelServiceServicer_to_server,
            BaseModelServicer(BaseModels(store, tables), codecs),
            base_model_service_pb2.DESCRIPTOR.services_by_name["BaseModelService"].full_name,
        ),
        Binding(
            policy_service_pb2_grpc.add_PolicyServiceServicer_to_server,
            PolicyServicer(policies, BulkCreation(store, tables, policies), changes, codecs),
            policy_service_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name,
        ),
        Binding(
            revision_service_pb2_grpc.add_RevisionServiceServicer_to_server,
            RevisionServicer(revisions, changes, codecs),
            revision_service_pb2.DESCRIPTOR.services_by_name["RevisionService"].full_name,
        ),
        Binding(
            alias_service_pb2_grpc.add_AliasServiceServicer_to_server,
            AliasServicer(aliases, resolver, changes, codecs),
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
    usages = Usages(store, tables)
    public += [
        Binding(
            audit_service_pb2_grpc.add_AuditServiceServicer_to_server,
            AuditServicer(AuditTrail(store, tables.keys), tables.keys, codecs),
            audit_service_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name,
        ),
        Binding(
            usage_service_pb2_grpc.add_UsageServiceServicer_to_server,
            UsageServicer(usages),
            usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"].full_name,
        ),
    ]
    public += [
        Binding(
            fleet_service_pb2_grpc.add_FleetServiceServicer_to_server,
            FleetServicer(Fleet(store, tables), codecs),
            fleet_service_pb2.DESCRIPTOR.services_by_name["FleetService"].full_name,
        ),
        Binding(
            tenant_service_pb2_grpc.add_TenantServiceServicer_to_server,
            TenantServicer(erasures, codecs),
            tenant_service_pb2.DESCRIPTOR.services_by_name["TenantService"].full_name,
        ),
    ]
    runtime = [
        Binding(
            usage_report_service_pb2_grpc.add_UsageReportServiceServicer_to_server,
            UsageReportServicer(usages),
            usage_report_service_pb2.DESCRIPTOR.services_by_name["UsageReportService"].full_name,
        ),
        Binding(
            publish_service_pb2_grpc.add_PublishServiceServicer_to_server,
            PublishServicer(Blobs(store, tables), revisions, codecs),
            publish_service_pb2.DESCRIPTOR.services_by_name["PublishService"].full_name,
        ),
        Binding(
            maintenance_service_pb2_grpc.add_MaintenanceServiceServicer_to_server,
            maintenance,
            maintenance_service_pb2.DESCRIPTOR.services_by_name["MaintenanceService"].full_name,
        ),
        Binding(
            work_service_pb2_grpc.add_WorkServiceServicer_to_server,
            WorkServicer(Leases(store, tables), queue, changes, codecs),
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
        residency.close()

    return Services(public=public, runtime=runtime, on_drain=on_drain)


def _grace(settings: CatalogSettings) -> Grace:
    return Grace(
        unreferenced_s=settings.gc_grace_s,
        condemned_s=settings.gc_condemned_s,
        undelete_s=settings.undelete_grace_s,
        audit_s=settings.audit_keep_s,
        usage_s=settings.usage_keep_s,
    )


@contextlib.asynccontextmanager
async def _object_store(settings: CatalogSettings) -> AsyncIterator[ObjectStore | None]:
    """The store that the settings name, if any; it need not be there yet."""
    if settings.object_store is None:
        yield None
        return
    from mint_blobs.s3 import S3ObjectStore  # costs a catalog without a store tens of megabytes otherwise

    async with S3ObjectStore(settings.object_store) as objects:
        yield objects


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
            with calls.inbound_call(CATALOG_PRINCIPAL, None, f"catalog/{name}"):
                await loop()
        except Exception:  # a bug in one loop must be seen in the log and must not stop the others
            _logger.exception("background loop failed, restarting it", extra={"fields": {"loop": name}})
        await asyncio.sleep(_RESTART_S)
