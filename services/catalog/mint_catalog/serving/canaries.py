"""Canaries: a second revision on trial behind an alias, for a share of the sticky keys.

What SetCanary and SetGate make of an alias, and how a canary that breaks the alias's gate is taken back: by the
transaction that writes the evaluation, so that neither can be lost without the other.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from mint_catalog.model.checks import check_text
from mint_catalog.model.records import (
    Alias,
    AliasHistoryEntry,
    AliasTarget,
    Attribution,
    Canary,
    Evaluation,
    Policy,
    Resolution,
    now,
)
from mint_catalog.model.tables import Tables
from mint_catalog.serving.gates import Evidence, Shortfall, read_evidence, shortfalls, told
from mint_catalog.storage.draft import Draft
from mint_catalog.storage.duty import CATALOG_PRINCIPAL
from mint_catalog.storage.paging import list_all
from mint_catalog.storage.store import Store
from mint_core.errors import InvalidArgument

__all__ = [
    "MAX_HISTORY",
    "canary_shortfalls",
    "check_canary",
    "judge_canaries",
    "taken_back",
    "with_canary",
    "without_canary",
]

MAX_HISTORY: Final = 32


def check_canary(canary: Canary, *, field: str = "canary") -> None:
    """A revision number, a weight in (0, 1] and a salt of one line. Raises ``InvalidArgument``."""
    number = canary.target.revision_number if canary.target else 0
    if number < 1:
        raise InvalidArgument(
            f"{field}.target.revision_number is {number}: revisions are numbered from 1; leave {field} out to clear it",
            field=f"{field}.target.revision_number",
        )
    if not math.isfinite(canary.weight) or not 0 < canary.weight <= 1:
        raise InvalidArgument(
            f"{field}.weight is {canary.weight}: it must be above 0 and at most 1; leave {field} out to clear it",
            field=f"{field}.weight",
        )
    check_text(canary.salt, field=f"{field}.salt", max_chars=128)


def with_canary(alias: Alias, canary: Canary, resolution: Resolution) -> Alias:
    """The alias with a canary whose target resolves to ``resolution``; without a salt it is the alias's own name."""
    named = replace(canary, salt=canary.salt or str(alias.name))
    return replace(alias, canary=named, canary_resolution=resolution, update_time=now())


def without_canary(alias: Alias) -> Alias:
    """The alias with its trial ended."""
    return replace(alias, canary=None, canary_resolution=None, update_time=now())


def taken_back(alias: Alias, found: list[Shortfall]) -> Alias:
    """The alias with its canary taken back, and an entry of its history that says why."""
    target = alias.canary.target if alias.canary else None
    attribution = Attribution(CATALOG_PRINCIPAL, now(), _broken(found))
    entry = AliasHistoryEntry(target, attribution, rolled_back_canary=True)
    return without_canary(replace(alias, history=(entry, *alias.history)[:MAX_HISTORY]))


def _broken(found: list[Shortfall]) -> str:
    return f"the canary broke the gate: {told(found)}"


def canary_shortfalls(alias: Alias, evidence: Evidence) -> list[Shortfall]:
    """The conditions of its gate that the alias's canary breaks; what was not measured breaks nothing."""
    if alias.gate is None or alias.canary is None or alias.canary.target is None:
        return []
    revision = _revision(alias, alias.canary.target)
    active = _revision(alias, alias.active) if alias.active else ""
    return [each for each in shortfalls(alias.gate, evidence, revision, active) if not each.is_missing]


def _revision(alias: Alias, target: AliasTarget) -> str:
    return f"{alias.name.parent}/revisions/{target.revision_number}"


async def judge_canaries(draft: Draft, store: Store, tables: Tables, head: Policy, written: Evaluation) -> None:
    """Take back the canaries that break their gate with an evaluation that the draft writes.

    The head must have been fetched for comparing: every write to an alias bumps it.
    """
    aliases, _ = await list_all(store, tables.keys.aliases(head.name), tables.codecs.alias)
    if any(alias.gate is not None or alias.canary is not None for alias in aliases):
        # Who sets a canary or judges a gate at the same time must see this evaluation.
        draft.touch(tables.policy(head.name))
    for alias in aliases:
        if alias.gate is None or alias.canary is None or alias.canary.target is None:
            continue
        revisions = [_revision(alias, each) for each in (alias.canary.target, alias.active) if each is not None]
        if written.revision not in revisions:
            continue
        evidence = await read_evidence(store, tables, head, revisions)
        evidence.add(written, is_newest=True)
        found = canary_shortfalls(alias, evidence)
        if found:
            ref = tables.alias(alias.name)
            await draft.fetch(ref)
            draft.reason = _broken(found)
            draft.put(ref, taken_back(alias, found))
