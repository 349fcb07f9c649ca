"""Usage: what this process served of each policy, counted in memory and reported to the catalog now and then.

A report is cumulative for its reporter, policy and day, so that sending it again changes nothing. A ledger is the
counts under one reporter's nonce. When it grows large a new one is begun, and the old one is dropped as soon as the
catalog has all of it; so memory is bounded by the policies served since, not by all that were ever served.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from mint_core import calls, log
from mint_core.clock import wall_s
from mint_core.errors import MintError
from mint_core.names import BaseModelName, PolicyName
from mint_inference.model import Model

__all__ = ["UsageCount", "UsageMeter", "UsageReports"]

_MAX_REPORTED: Final = 1000
_DAY_S: Final = 86_400
_PRINCIPAL: Final = "inference"
_log = log.get_logger(__name__)
_Key = tuple[PolicyName, int]


@dataclass(frozen=True, slots=True)
class UsageCount:
    """What was served of one policy on one day so far."""

    policy: PolicyName
    day_s: int
    """Midnight UTC of the day, in seconds since the epoch."""
    num_requests: int
    num_prompt_tokens: int
    num_generated_tokens: int


class UsageReports(Protocol):
    """Where reports go."""

    async def report(self, reporter: str, counts: Sequence[UsageCount]) -> None:
        """Keep at most 1000 counts of one reporter; they replace its older ones."""
        ...


@dataclass(slots=True)
class _Count:
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


@dataclass(slots=True)
class _Ledger:
    reporter: str = field(default_factory=lambda: secrets.token_hex(8))
    counts: dict[_Key, _Count] = field(default_factory=dict)
    due: set[_Key] = field(default_factory=set)
    """Counted since they were reported."""
    unsure: set[_Key] = field(default_factory=set)
    """In a report without an answer, which may still arrive after a newer one: reported once more than needed."""

    def drop_past_days(self, today: int) -> None:
        past = [key for key in self.counts if key[1] < today and key not in self.due and key not in self.unsure]
        for key in past:
            del self.counts[key]


class UsageMeter:
    """Counts requests and tokens, and reports them."""

    def __init__(self, reports: UsageReports | None = None, *, max_policies: int = 20_000) -> None:
        """Without ``reports`` nothing is counted. Twice ``max_policies`` are held at most; what is beyond while the
        catalog is away is not counted."""
        self._reports = reports
        self._max_policies = max_policies
        self._ledger = _Ledger()
        self._retiring: _Ledger | None = None
        self._num_lost = 0
        self._is_away = False

    def began(self, model: Model, num_prompt_tokens: int) -> None:
        """An engine began to answer a request."""
        count = self._count(model)
        if count is not None:
            count.num_requests += 1
            count.num_prompt_tokens += num_prompt_tokens

    def generated(self, model: Model, num_tokens: int) -> None:
        """An engine generated tokens."""
        count = self._count(model)
        if count is not None:
            count.num_generated_tokens += num_tokens

    def _count(self, model: Model) -> _Count | None:
        if self._reports is None or isinstance(model, BaseModelName):
            return None
        key, ledger = (model.parent, int(wall_s()) // _DAY_S), self._ledger
        count = ledger.counts.get(key)
        if count is None:
            if len(ledger.counts) >= self._max_policies:
                self._num_lost += 1
                return None
            count = ledger.counts[key] = _Count()
        ledger.due.add(key)
        return count

    async def run(self, interval_s: float) -> None:
        """Report every ``interval_s``, for ever."""
        while True:
            await asyncio.sleep(interval_s)
            await self.report()

    async def report(self) -> bool:
        """Report what is due; returns whether the catalog has it all. What it did not take is kept for the next try."""
        if self._reports is None:
            return True
        try:
            with calls.inbound_call(_PRINCIPAL, None):
                if self._retiring is not None:
                    await self._send(self._retiring, self._reports)
                    if not self._retiring.due and not self._retiring.unsure:
                        self._retiring = None
                await self._send(self._ledger, self._reports)
        except MintError as error:
            if not self._is_away:
                _log.warning("usage cannot be reported now, it is kept", extra={"fields": {"error": error.message}})
            self._is_away = True
            return False
        self._is_away = False
        if self._num_lost:
            _log.warning(
                "usage was lost while too many policies were counted", extra={"fields": {"num": self._num_lost}}
            )
            self._num_lost = 0
        self._ledger.drop_past_days(int(wall_s()) // _DAY_S)
        if self._retiring is None and len(self._ledger.counts) > self._max_policies // 2:
            self._retiring, self._ledger = self._ledger, _Ledger()
        return True

    async def _send(self, ledger: _Ledger, reports: UsageReports) -> None:
        due = list(ledger.due)
        for start in range(0, len(due), _MAX_REPORTED):
            keys = due[start : start + _MAX_REPORTED]
            counts = [_reported(key, ledger.counts[key]) for key in keys]
            ledger.due.difference_update(keys)
            try:
                await reports.report(ledger.reporter, counts)
            except BaseException:  # failed or cancelled: it may have arrived or not, and is reported again
                ledger.due.update(keys)
                ledger.unsure.update(keys)
                raise
            for key in ledger.unsure.intersection(keys):
                ledger.unsure.discard(key)
                ledger.due.add(key)


def _reported(key: _Key, count: _Count) -> UsageCount:
    policy, day = key
    return UsageCount(policy, day * _DAY_S, count.num_requests, count.num_prompt_tokens, count.num_generated_tokens)
