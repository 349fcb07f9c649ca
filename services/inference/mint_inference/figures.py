"""What inference tells Prometheus: its streams, and the replicas it may send them to."""

from __future__ import annotations

from collections import Counter

from mint_core.metrics import Figure, gauge
from mint_inference.generation import Generation
from mint_inference.model import ReplicaState
from mint_inference.router import Router

__all__ = ["inference_figures"]


async def inference_figures(generation: Generation, router: Router) -> list[Figure]:
    """Both as they are now."""
    states = Counter(each.state for each in router.replicas)
    return [
        gauge("mint_inference_streams", "Requests under way.", generation.num_streams),
        *(
            gauge(
                "mint_inference_replicas",
                "Engine replicas, by what they say of themselves.",
                states[state],
                state=state.value,
            )
            for state in ReplicaState
        ),
    ]
