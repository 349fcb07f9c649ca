"""ListPolicies: one tenant's policies or all tenants', filtered, in the store's order or by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mint_catalog.model.records import Policy
from mint_catalog.model.tables import Tables
from mint_catalog.policies import policy_filter
from mint_catalog.storage.ordering import name_stretches
from mint_catalog.storage.paging import Page, Stretch, page_of, stretches_below, tenant_stretches
from mint_catalog.storage.store import Store
from mint_core.errors import InvalidArgument
from mint_core.names import AliasName, TenantName

__all__ = ["ALL_TENANTS", "PolicyQuery", "having", "list_policies"]

ALL_TENANTS: Final = "-"
"""Stands for every tenant in a parent."""

_MAX_KEYS: Final = 128
_FILTERED_READ: Final = 200


@dataclass(frozen=True, slots=True)
class PolicyQuery:
    """Which policies are asked for."""

    tenant: str
    """:data:`ALL_TENANTS` for all."""

    page_size: int = 0
    page_token: str = ""
    filter: str = ""
    order_by: str = ""
    min_revision: int = 0

    @classmethod
    def parse_parent(cls, parent: str) -> str:
        """The tenant of a request's ``parent``. Raises ``InvalidArgument``."""
        return ALL_TENANTS if parent == "tenants/-" else TenantName.parse(parent, field="parent").tenant


async def list_policies(store: Store, tables: Tables, query: PolicyQuery) -> Page[Policy]:
    """One page. Raises ``InvalidArgument``, ``RevisionCompacted``."""
    _check_order(query)
    keep = policy_filter.parse(query.filter)
    narrow = having(store, tables, keep.aliases) if keep.aliases else None
    bound = f"policies\0{query.tenant}\0{query.filter}\0{query.order_by}"
    keys, codec = tables.keys, tables.codecs.policy
    tenant = query.tenant
    if tenant == ALL_TENANTS and keep.tenant:
        tenant = keep.tenant  # nobody else's need be read
    prefix = keys.family("policies") if tenant == ALL_TENANTS else keys.family("policies", tenant)

    def read(position: str, revision: int, limit: int) -> AsyncIterator[Stretch]:
        if tenant == ALL_TENANTS:
            return tenant_stretches(store, keys, "policies", position, revision=revision, limit=limit)
        if query.order_by:
            return name_stretches(store, prefix, position, revision=revision, limit=limit)
        return stretches_below(store, prefix, position, revision=revision, limit=limit, sharded=True)

    def position_of(key: bytes) -> str:
        return key[len(prefix) :].decode() if not query.order_by else keys.policy_name(key).policy

    return await page_of(
        read,
        position_of,
        codec,
        bound=bound,
        page_size=query.page_size,
        page_token=query.page_token,
        keep=keep,
        narrow=narrow,
        size_of=_size_of,
        least_read=_FILTERED_READ if query.filter else 0,
        min_revision=query.min_revision,
    )


def _size_of(policy: Policy) -> int:
    """Bytes of an answer, hardly ever more; a character may take four."""
    return 400 + 4 * (len(policy.description) + sum(map(len, policy.labels)) + sum(map(len, policy.labels.values())))


def _check_order(query: PolicyQuery) -> None:
    if query.order_by not in ("", "name"):
        raise InvalidArgument(
            f'order_by is {query.order_by[:80]!r}: "name" is offered, or nothing for the store\'s own order',
            field="order_by",
        )
    if query.order_by and query.tenant == ALL_TENANTS:
        raise InvalidArgument(
            "order_by is offered for one tenant's policies only: leave it empty with parent tenants/-", field="order_by"
        )


def having(
    store: Store, tables: Tables, aliases: Sequence[str]
) -> Callable[[Sequence[Policy], int], Awaitable[list[Policy]]]:
    """Leaves the policies that have all these aliases at a revision."""

    async def narrow(policies: Sequence[Policy], revision: int) -> list[Policy]:
        left = list(policies)
        for alias in aliases:
            keys = [tables.keys.alias(AliasName(each.name.tenant, each.name.policy, alias)) for each in left]
            found = [
                kv is not None
                for first in range(0, len(keys), _MAX_KEYS)
                for kv in (await store.get(keys[first : first + _MAX_KEYS], revision=revision)).values
            ]
            left = [policy for policy, has in zip(left, found, strict=True) if has]
        return left

    return narrow
