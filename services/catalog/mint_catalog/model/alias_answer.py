"""An alias's stored value as far as resolving it takes: what it answers with, and its canary.

Resolve is the call that all others wait for, so this is written out instead of going by the plan of
:mod:`mint_catalog.model.codec`: moves and gate, most of a value, are not converted.
"""

from __future__ import annotations

from typing import Any

from mint_catalog.model.codec import FOLDED, from_message
from mint_catalog.model.folding import fold_alias, unfolded_resolution
from mint_catalog.model.records import Alias, Canary, Resolution
from mint_core.names import AliasName

__all__ = ["decode_alias_answer"]


def decode_alias_answer(message_type: Any, value: bytes, name: AliasName) -> Alias:
    """The alias without ``active``, ``history``, ``policy_uid``, ``update_time``, ``gate`` and ``mod_revision``.

    ``message_type`` is ``mint.v1.Alias``, whose bytes ``value`` is.
    """
    message = message_type.FromString(value)
    if message.name == FOLDED:
        is_plain = not any(map(message.HasField, ("canary", "canary_resolution")))
        if is_plain and message.HasField("resolution") and not message.resolution.HasField("signature"):
            return Alias(name, resolution=unfolded_resolution(message.resolution, message.active, name))
        fold_alias(message, name)
    return Alias(
        name,
        canary=from_message(message.canary, Canary) if message.HasField("canary") else None,
        canary_resolution=(
            from_message(message.canary_resolution, Resolution) if message.HasField("canary_resolution") else None
        ),
        resolution=from_message(message.resolution, Resolution) if message.HasField("resolution") else None,
    )
