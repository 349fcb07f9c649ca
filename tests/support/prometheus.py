"""Scrapes a service's endpoint as Prometheus does."""

from __future__ import annotations

import asyncio
import urllib.request
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Samples", "handled", "scraped"]


@dataclass(frozen=True)
class Samples:
    """What one scrape brought."""

    families: tuple[Metric, ...]

    def of(self, name: str, **labels: str) -> float:
        """The one sample with exactly these labels."""
        (value,) = (each.value for family in self.families for each in family.samples if each[:2] == (name, labels))
        return float(value)


async def scraped(address: str) -> Samples:
    """Raises :class:`urllib.error.HTTPError` if the endpoint answers with an error."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as response:
            text: str = response.read().decode()
            return text

    return Samples(tuple(text_string_to_metric_families(await asyncio.to_thread(read))))


def handled(samples: Samples, method: str) -> dict[str, float]:
    """Ended calls of one method, by status."""
    return {
        each.labels["grpc_code"]: each.value
        for family in samples.families
        for each in family.samples
        if each.name == "grpc_server_handled_total" and each.labels["grpc_method"] == method
    }
