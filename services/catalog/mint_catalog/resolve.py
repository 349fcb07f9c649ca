"""Resolving a name to the adapter it stands for: an alias in one read, a revision in one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from mint_catalog.aliases import Aliases
from mint_catalog.checks import not_found
from mint_catalog.records import Resolution
from mint_catalog.revisions import Revisions
from mint_core.errors import InvalidArgument, MintError
from mint_core.names import AliasName, RevisionName

__all__ = ["Resolver"]

_MAX_BATCH: Final = 1000
_MAX_CONCURRENT: Final = 32


class Resolver:
    """Answers Resolve from the store, always at its head."""

    def __init__(self, aliases: Aliases, revisions: Revisions) -> None:
        self._aliases = aliases
        self._revisions = revisions

    async def resolve(self, name: str, *, min_revision: int = 0) -> Resolution:
        """Resolve an alias name or a revision name.

        Raises ``InvalidArgument``, ``NotFound``, ``Unavailable``.
        """
        parsed = _parse(name)
        if isinstance(parsed, AliasName):
            return await self._alias(parsed, min_revision)
        return await self._revision(parsed, min_revision)

    async def resolve_batch(self, names: Sequence[str], *, min_revision: int = 0) -> list[Resolution | MintError]:
        """Resolve up to 1000 names; an answer or error for each. Raises ``InvalidArgument`` for no or too many."""
        if not 1 <= len(names) <= _MAX_BATCH:
            raise InvalidArgument(f"names has {len(names)} entries: expected 1 to {_MAX_BATCH}", field="names")
        slots = asyncio.Semaphore(_MAX_CONCURRENT)

        async def one(name: str) -> Resolution | MintError:
            async with slots:
                try:
                    return await self.resolve(name, min_revision=min_revision)
                except MintError as error:
                    return error

        return list(await asyncio.gather(*map(one, names)))

    async def _alias(self, name: AliasName, min_revision: int) -> Resolution:
        alias, catalog_revision = await self._aliases.read(name, min_revision=min_revision)
        if alias.resolution is None:
            raise not_found(name)
        return replace(alias.resolution, catalog_revision=catalog_revision)

    async def _revision(self, name: RevisionName, min_revision: int) -> Resolution:
        head, revision, catalog_revision = await self._revisions.read(name, min_revision=min_revision)
        return Resolution(
            revision=str(name),
            blob=revision.blob,
            object_key=revision.object_key,
            base_model=head.base_model,
            base_digest=revision.base_digest,
            catalog_revision=catalog_revision,
        )


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
