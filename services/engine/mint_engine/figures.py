"""What an engine tells Prometheus: its places and who has them."""

from __future__ import annotations

from mint_core.metrics import Figure, gauge
from mint_engine.host import EngineHost, HostState

__all__ = ["host_figures"]


async def host_figures(host: EngineHost) -> list[Figure]:
    """The host as it is now."""
    limits, residents = host.engine.limits, host.residents()
    return [
        gauge("mint_engine_adapters", "Adapters in the host pool.", len(residents)),
        gauge("mint_engine_max_adapters", "Adapters it may hold.", limits.max_loaded_adapters),
        gauge(
            "mint_engine_pinned_adapters", "Adapters that are never evicted.", sum(each.pinned for each in residents)
        ),
        gauge(
            "mint_engine_used_adapters",
            "Adapters that requests under way refer to.",
            sum(each.num_references > 0 for each in residents),
        ),
        gauge("mint_engine_slots", "Slots for adapters in one batch.", limits.num_slots),
        gauge("mint_engine_requests", "Requests under way.", host.num_running),
        *(
            gauge("mint_engine_state", "1 for the state it is in.", host.state is state, state=state.name.lower())
            for state in HostState
        ),
    ]
