"""What an alias answers with: its active revision, or its canary for a share of the sticky keys."""

from __future__ import annotations

from dataclasses import replace

from mint_catalog.model.checks import not_found
from mint_catalog.model.records import Alias, AliasSplit, Policy, Resolution, Revision, SplitSide
from mint_core.split import sees_canary

__all__ = ["chosen", "resolution_of"]


def resolution_of(head: Policy, revision: Revision) -> Resolution:
    """What an alias that points at ``revision`` embeds, so that resolving it is one read."""
    return Resolution(
        revision=str(revision.name),
        blob=revision.blob,
        object_key=revision.object_key,
        base_model=head.base_model,
        base_digest=revision.base_digest,
        signature=revision.signature,
    )


def chosen(alias: Alias, sticky_key: str) -> Resolution:
    """What a request with this sticky key is answered with; without a key never the canary. Raises ``NotFound``.

    With a canary the answer tells what other sticky keys are answered with, so that a caller that keeps it need not
    ask for each of them.
    """
    active = alias.resolution
    if active is None:
        raise not_found(alias.name)
    canary, resolution = alias.canary, alias.canary_resolution
    if canary is None or resolution is None:
        return active
    split = AliasSplit(canary.weight, canary.salt, _side(active), _side(resolution))
    if sees_canary(canary.weight, canary.salt, sticky_key):
        return replace(resolution, canary=True, split=split)
    return replace(active, split=split)


def _side(resolution: Resolution) -> SplitSide:
    return SplitSide(
        resolution.revision,
        resolution.blob,
        resolution.object_key,
        resolution.base_model,
        resolution.base_digest,
        resolution.signature,
    )
