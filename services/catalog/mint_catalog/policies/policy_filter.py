"""The ``filter`` of ListPolicies: conditions joined by AND, a small part of https://google.aip.dev/160.

::

    base_model = "baseModels/qwen3" AND labels.team = "search" AND state = ACTIVE AND owner = "ada"
    tenant = "acme" AND alias = "canary"

Without a condition on ``state`` deleted policies are left out. A condition on ``alias`` wants an alias of that id; the
head does not tell, so whoever lists looks it up.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mint_catalog.model.records import Policy, PolicyState
from mint_core.errors import InvalidArgument
from mint_core.names import check_id

__all__ = ["PolicyFilter", "parse"]

_CONDITION: Final = re.compile(
    r'\s*(?P<field>[a-z_]+)(\.(?P<key>[a-z0-9][a-z0-9._-]{0,62}))?\s*=\s*("(?P<quoted>[^"\\]*)"|(?P<word>[\w./-]+))\s*'
)
_AND: Final = re.compile(r"AND\s")
_MAX_CHARS: Final = 2048
_STATES: Final = ("ACTIVE", "PAUSED", "DELETED")

_Predicate = Callable[[Policy], bool]


@dataclass(frozen=True, slots=True)
class PolicyFilter:
    """A filter that was understood; call it to ask whether a policy's head meets it."""

    predicates: tuple[_Predicate, ...]
    aliases: tuple[str, ...]
    """Ids of aliases that the policy must have besides."""

    tenant: str
    """The one tenant that it allows; empty for any."""

    def __call__(self, policy: Policy) -> bool:
        return all(predicate(policy) for predicate in self.predicates)


def _bad(text: str, position: int, expected: str) -> InvalidArgument:
    return InvalidArgument(
        f"filter, at character {position + 1}, {text[position : position + 40]!r}: expected {expected}",
        field="filter",
    )


def _predicate(field: str, key: str | None, value: str, text: str, position: int) -> _Predicate:
    if field == "labels" and key is not None:
        return lambda policy: policy.labels.get(key) == value
    if key is None and field == "base_model":
        return lambda policy: policy.base_model == value
    if key is None and field == "owner":
        return lambda policy: policy.owner == value
    if key is None and field == "tenant":
        check_id(value, field="filter")
        return lambda policy: policy.name.tenant == value
    if key is None and field == "alias":
        check_id(value, field="filter")
        return lambda _: True
    if key is None and field == "state":
        if value not in _STATES:
            raise _bad(text, position, f"a state of {', '.join(_STATES)}")
        return lambda policy: policy.state is PolicyState[value]
    raise _bad(text, position, "tenant, base_model, labels.KEY, owner, state or alias")


def parse(text: str) -> PolicyFilter:
    """Understand a filter. Raises ``InvalidArgument`` naming the place that is not understood."""
    if len(text) > _MAX_CHARS:
        raise InvalidArgument(f"filter has {len(text)} characters: at most {_MAX_CHARS}", field="filter")
    predicates: list[_Predicate] = []
    values: dict[str, list[str]] = {"alias": [], "state": [], "tenant": []}
    position = 0
    while text.strip():
        match = _CONDITION.match(text, position)
        if match is None:
            raise _bad(text, position, 'a condition like labels.team = "search"')
        value = match["quoted"] if match["quoted"] is not None else match["word"]
        predicates.append(_predicate(match["field"], match["key"], value, text, position))
        values.setdefault(match["field"], []).append(value)
        position = match.end()
        if position == len(text):
            break
        joined = _AND.match(text, position)
        if joined is None:
            raise _bad(text, position, "AND")
        position = joined.end()
    if not values["state"]:
        predicates.append(lambda policy: policy.state is not PolicyState.DELETED)
    tenants = set(values["tenant"])
    return PolicyFilter(
        tuple(predicates), tuple(dict.fromkeys(values["alias"])), tenants.pop() if len(tenants) == 1 else ""
    )
