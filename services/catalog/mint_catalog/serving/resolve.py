"""Resolving a name to the adapter it stands for: an alias out of the cache or in one read, a revision in one read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mint_catalog.model.checks import live_policy, not_found
from mint_catalog.model.records import Resolution
from mint_catalog.model.tables import Tables
from mint_catalog.policies.revisions import own_revision
from mint_catalog.serving.cache import AliasCache
from mint_catalog.serving.split import chosen, resolution_of
from mint_catalog.storage.gather import GatheredReads
from mint_catalog.storage.nearby import NearbyReads
from mint_catalog.storage.paging import check_revision
from mint_catalog.storage.store import ReadResult, Store
from mint_core.errors import InvalidArgument, MintError
from mint_core.names import AliasName, RevisionName

__all__ = ["Freshness", "Resolver"]

_MAX_BATCH: Final = 1000


@dataclass(frozen=True, slots=True)
class Freshness:
    """How fresh an answer must be; neither field set means within the cache's staleness bound."""

    strong: bool = False
    min_revision: int = 0
    """At least this catalog revision."""


_DEFAULT: Final = Freshness()


class Resolver:
    """Answers Resolve: aliases from the cache where that is as fresh as asked for, all else from the store.

    What need not be of the store's head may come from ``nearby``.
    """

    def __init__(self, store: Store, tables: Tables, cache: AliasCache, nearby: NearbyReads | None = None) -> None:
        self._reads = GatheredReads(store, nearby)
        self._tables = tables
        self._cache = cache

    async def resolve(self, name: str, sticky_key: str = "", freshness: Freshness = _DEFAULT) -> Resolution:
        """Resolve an alias name or a revision name. ``sticky_key`` decides who sees an alias's canary.

        Raises ``InvalidArgument``, ``NotFound``, ``Unavailable``.
        """
        if (known := self._known(name, sticky_key, freshness)) is not None:
            return known
        parsed = _parse(name)
        bounded_from = None if freshness.strong else freshness.min_revision
        read = await self._reads.get(self._keys(parsed), bounded_from=bounded_from)
        return self._answer(parsed, sticky_key, freshness, read)

    async def resolve_batch(
        self, names: Sequence[str], freshness: Freshness = _DEFAULT
    ) -> list[Resolution | MintError]:
        """Resolve up to 1000 names; an answer or error for each. Raises ``InvalidArgument`` for no or too many."""
        if not 1 <= len(names) <= _MAX_BATCH:
            raise InvalidArgument(f"names has {len(names)} entries: expected 1 to {_MAX_BATCH}", field="names")
        answers: dict[str, Resolution | MintError] = {}
        asked: dict[str, AliasName | RevisionName] = {}
        for name in dict.fromkeys(names):
            try:
                known = self._known(name, "", freshness)
                if known is None:
                    asked[name] = _parse(name)
                else:
                    answers[name] = known
            except MintError as error:
                answers[name] = error
        read = await self._reads.get_each([self._keys(parsed) for parsed in asked.values()])
        for (name, parsed), result in zip(asked.items(), read, strict=True):
            try:
                answers[name] = result if isinstance(result, MintError) else self._answer(parsed, "", freshness, result)
            except MintError as error:
                answers[name] = error
        return [answers[name] for name in names]

    def _known(self, name: str, sticky_key: str, freshness: Freshness) -> Resolution | None:
        # Names are written in one way only, so what was not parsed yet can be looked up as it came.
        known = None if freshness.strong else self._cache.get(name, min_revision=freshness.min_revision)
        if known is None:
            return None
        alias, right_at = known
        return chosen(alias, sticky_key).at(right_at)

    def _keys(self, name: AliasName | RevisionName) -> list[bytes]:
        keys = self._tables.keys
        return [keys.alias(name)] if isinstance(name, AliasName) else [keys.policy(name.parent), keys.revision(name)]

    def _answer(
        self, name: AliasName | RevisionName, sticky_key: str, freshness: Freshness, read: ReadResult
    ) -> Resolution:
        check_revision(read.revision, freshness.min_revision)
        codecs = self._tables.codecs
        if isinstance(name, AliasName):
            (kv,) = read.values
            if kv is None:
                raise not_found(name)
            alias = codecs.alias_answer(kv.value, name)
            self._cache.fill(alias, read.revision)
            resolution = chosen(alias, sticky_key)
        else:
            head_kv, kv = read.values
            head = live_policy(codecs.policy.decode(head_kv) if head_kv else None, name.parent)
            resolution = resolution_of(head, own_revision(codecs.revision.decode(kv) if kv else None, head, name))
        return resolution.at(read.revision)


def _parse(name: str) -> AliasName | RevisionName:
    match name.split("/"):
        case [_, _, _, _, "aliases", _]:
            return AliasName.parse(name)
        case [_, _, _, _, "revisions", _]:
            return RevisionName.parse(name)
    raise InvalidArgument(
        f"name is {name[:120]!r}: expected tenants/{{t}}/policies/{{p}}/aliases/{{alias}} or …/revisions/{{number}}",
        field="name",
    )
