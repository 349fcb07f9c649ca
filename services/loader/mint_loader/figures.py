"""What a loader tells Prometheus: the same as ``GetLoaderStatus``, from the same reading."""

from __future__ import annotations

from collections.abc import Iterator

from mint_core.metrics import Figure, counter, gauge
from mint_loader.model import Tier
from mint_loader.node import Node, NodeStatus, TenantStatus, TierStatus

__all__ = ["node_figures"]


async def node_figures(node: Node) -> list[Figure]:
    """Tiers, queues and tenants as they are now."""
    status = await node.status()
    figures = list(_of_node(status))
    for tier in status.tiers:
        figures += _of_tier(tier)
    for tenant in status.tenants:
        figures += _of_tenant(tenant)
    return figures


def _of_node(status: NodeStatus) -> Iterator[Figure]:
    cache = status.cache
    yield gauge("mint_loader_pins", "Pins, scheduled ones included.", status.num_pins)
    yield gauge("mint_loader_queued_tickets", "Load tickets that wait for their turn.", status.num_queued_tickets)
    yield gauge("mint_loader_loads", "Adapters being brought somewhere.", status.loading.num_loading)
    yield counter("mint_loader_fetched_bytes", "Bytes read from the object store.", status.loading.bytes_fetched)
    yield counter("mint_loader_evictions", "Adapters that left the disk to make room.", cache.num_evictions)
    yield counter("mint_loader_quarantined", "Adapters whose bytes had gone bad on the disk.", cache.num_quarantined)
    yield counter("mint_loader_disk_full", "Fetches that met a full disk.", cache.num_full)
    yield counter(
        "mint_loader_prefetches", "Publications and alias moves followed with a prefetch.", status.num_prefetched
    )


def _of_tier(status: TierStatus) -> Iterator[Figure]:
    tier = status.tier.name.lower()
    yield gauge("mint_loader_tier_adapters", "Adapters at the tier.", status.num_adapters, tier=tier)
    yield gauge("mint_loader_tier_pinned_adapters", "Of them, those never evicted.", status.num_pinned, tier=tier)
    if status.tier is Tier.DISK:  # of the engine's memory the engine alone knows
        yield gauge("mint_loader_tier_bytes", "Bytes at the tier.", status.size_bytes, tier=tier)
        yield gauge("mint_loader_tier_max_bytes", "Bytes it may hold.", status.max_bytes, tier=tier)
    yield counter("mint_loader_tier_hits", "Adapters asked for and found there.", status.num_hits, tier=tier)
    yield counter("mint_loader_tier_misses", "Adapters that had to be brought there.", status.num_misses, tier=tier)
    yield gauge("mint_loader_tier_running", "Adapters on their way there.", status.num_running, tier=tier)
    yield gauge("mint_loader_tier_places", "How many may be on their way at a time.", status.num_places, tier=tier)
    yield gauge("mint_loader_tier_queued", "Adapters that wait for their turn.", status.num_queued, tier=tier)
    yield gauge("mint_loader_tier_mean_seconds", "How long one takes lately, smoothed.", status.mean_s, tier=tier)


def _of_tenant(status: TenantStatus) -> Iterator[Figure]:
    waits, tenant = status.waits, status.waits.tenant
    yield gauge("mint_loader_tenant_queued", "Adapters that wait.", status.num_queued, tenant=tenant)
    yield gauge("mint_loader_tenant_running", "Adapters being fetched or loaded.", status.num_running, tenant=tenant)
    yield gauge("mint_loader_tenant_open_tickets", "Unfinished load tickets.", status.num_open_tickets, tenant=tenant)
    yield counter("mint_loader_tenant_done", "Cold adapters that reached their tier.", waits.num_done, tenant=tenant)
    yield counter("mint_loader_tenant_failed", "Requests that failed.", waits.num_failed, tenant=tenant)
    yield counter("mint_loader_tenant_refused", "Requests that were not admitted.", waits.num_refused, tenant=tenant)
    for quantile, seconds in (("0.5", waits.wait_p50_s), ("0.99", waits.wait_p99_s)):
        yield gauge(
            "mint_loader_tenant_wait_seconds",
            "Its latest waits for a cold adapter, from request to tier.",
            seconds,
            tenant=tenant,
            quantile=quantile,
        )
