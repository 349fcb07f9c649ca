"""What a name means now: from the cache while the watch vouches for it, else from the catalog, else the last known."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from mint_core import calls, clock, log
from mint_core.errors import DeadlineExceeded, MintError, NotFound, RevisionCompacted, Unavailable, WrongState
from mint_core.names import AliasName, RevisionName
from mint_inference.alias_cache import AliasCache
from mint_inference.model import AliasWord, Catalog, Consistency, Resolution

__all__ = ["Resolver", "ResolverLimits"]

_log = log.get_logger(__name__)
_MAX_FILLS = 3
_MAX_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class ResolverLimits:
    """Bounds, in seconds where nothing else is said."""

    staleness_s: float = 5.0
    """Age of the watch's last word from which the catalog is asked instead."""
    serve_stale_for_s: float = 600.0
    """How long the last known answer serves while the catalog is away."""
    timeout_s: float = 3.0
    """One question to the catalog."""
    away_pause_s: float = 1.0
    """After a failed question, how long those who have a last known answer do not ask again."""
    revision_recheck_s: float = 60.0
    """How long a revision name is answered without asking. Its bytes never change; only that it was deleted can."""
    max_entries: int = 100_000
    """Names that are kept, aliases and revisions each."""


@dataclass(frozen=True, slots=True)
class _Revision:
    resolution: Resolution
    read_at_s: float


class Resolver:
    """Resolves alias and revision names. :meth:`follow` must run beside it."""

    def __init__(
        self, catalog: Catalog, limits: ResolverLimits, *, now_s: Callable[[], float] = clock.monotonic_s
    ) -> None:
        self._catalog = catalog
        self._limits = limits
        self._now_s = now_s
        self._aliases = AliasCache(max_entries=limits.max_entries, staleness_s=limits.staleness_s, now_s=now_s)
        self._revisions: OrderedDict[RevisionName, _Revision] = OrderedDict()
        self._fills: dict[AliasName | RevisionName, asyncio.Task[Resolution]] = {}
        self._away_until_s = float("-inf")

    async def resolve(self, name: AliasName | RevisionName, sticky_key: str, consistency: Consistency) -> Resolution:
        """What ``name`` means for a request with this sticky key; the split between an alias's active revision and its
        canary is computed here, from what the catalog told once for all keys.

        Raises :class:`NotFound` and :class:`WrongState` as the catalog does, :class:`Unavailable` if the catalog is
        away and nothing that is fresh enough, or no older than ``serve_stale_for_s``, is known.
        """
        return (await self._meaning(name, consistency)).of(sticky_key)

    async def _meaning(self, name: AliasName | RevisionName, consistency: Consistency) -> Resolution:
        if (known := self._cached(name, consistency)) is not None:
            return known
        is_away = self._now_s() < self._away_until_s
        if consistency.is_default and is_away and (last := self._last_known(name)) is not None:
            return last
        try:
            if consistency.is_default:
                return await self._shared_fill(name)
            return await self._fill(name, consistency)
        except (NotFound, WrongState):
            self._forget(name)
            raise
        except (Unavailable, DeadlineExceeded) as away:
            self._away_until_s = self._now_s() + self._limits.away_pause_s
            if consistency.is_default and (last := self._last_known(name)) is not None:
                return last
            wish = "is not known here" if consistency.is_default else "cannot be told as fresh as was asked for"
            raise Unavailable(
                f"the catalog is away and what {name} means {wish}; retry. The catalog: {away.message}",
                metadata={"resource": str(name)},
            ) from away

    async def follow(self) -> None:
        """Keep the cache right by the alias watch, until cancelled."""
        after = 0
        pause_s = 0.1
        while True:
            spoke = False
            if after:
                self._aliases.resume_watch()
            else:
                self._aliases.begin_watch()
            try:
                words = _impatient(self._catalog.watch_aliases(after=after), 3 * self._limits.staleness_s)
                async with contextlib.aclosing(words):
                    async for word in words:
                        self._aliases.hear(word)
                        # A revision may have moved more aliases than this one: those come again after a cut.
                        is_whole = word.name is None
                        after = max(after, word.catalog_revision if is_whole else word.catalog_revision - 1)
                        spoke, pause_s = True, 0.1
            except RevisionCompacted:
                _log.warning("the alias watch lost its place, starting anew", extra={"fields": {"after": after}})
                after = 0
            except TimeoutError:
                _log.warning("the alias watch is silent, reconnecting", extra={"fields": {"after": after}})
                # Silent from the start: perhaps that place is in the future of a catalog that was restored.
                after = after if spoke else 0
            except MintError as error:
                _log.warning("the alias watch ended, reconnecting", extra={"fields": {"error": error.message}})
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def close(self) -> None:
        """Give up what is being asked."""
        tasks = list(self._fills.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cached(self, name: AliasName | RevisionName, consistency: Consistency) -> Resolution | None:
        if isinstance(name, AliasName):
            return self._aliases.get(name, consistency)
        held = self._revisions.get(name)
        if held is None or consistency.strong or consistency.min_revision > held.resolution.catalog_revision:
            return None
        if self._now_s() - held.read_at_s > self._limits.revision_recheck_s:
            return None
        self._revisions.move_to_end(name)
        return held.resolution

    def _last_known(self, name: AliasName | RevisionName) -> Resolution | None:
        within_s = self._limits.serve_stale_for_s
        if isinstance(name, AliasName):
            last = self._aliases.last_known(name, within_s=within_s)
        else:
            held = self._revisions.get(name)
            last = held.resolution if held is not None and self._now_s() - held.read_at_s <= within_s else None
        return None if last is None else replace(last, stale=True)

    def _forget(self, name: AliasName | RevisionName) -> None:
        if isinstance(name, AliasName):
            self._aliases.forget(name)
        else:
            self._revisions.pop(name, None)

    async def _shared_fill(self, name: AliasName | RevisionName) -> Resolution:
        """Callers of one name share one question, which none of them can cancel."""
        task = self._fills.get(name)
        if task is None:

            async def fill() -> Resolution:
                # The deadline of the caller that happened to be first is not that of those who join.
                with calls.inbound_call(calls.principal(), None):
                    return await self._fill(name, Consistency())

            task = asyncio.get_running_loop().create_task(fill())
            self._fills[name] = task
            task.add_done_callback(lambda _: self._fills.pop(name, None))
        await asyncio.wait([task])
        if task.cancelled():
            raise Unavailable("inference is shutting down; retry at another replica or in a moment")
        if (error := task.exception()) is not None:
            raise error.with_traceback(None)  # one object for all: its traceback must not grow with each of them
        return task.result()

    async def _fill(self, name: AliasName | RevisionName, consistency: Consistency) -> Resolution:
        for _ in range(_MAX_FILLS):
            wanted = consistency
            if not consistency.strong and self._aliases.is_live:
                wanted = Consistency(min_revision=max(consistency.min_revision, self._aliases.latest))
            asked_at_s = self._now_s()
            answer = await self._catalog.resolve(name, wanted, timeout_s=self._limits.timeout_s)
            if answer.catalog_revision < consistency.min_revision:
                raise Unavailable(
                    f"the catalog answered at revision {answer.catalog_revision}, wanted was {consistency.min_revision}"
                )
            if isinstance(name, RevisionName):
                self._keep_revision(name, answer)
                return answer
            if self._aliases.fill(name, answer, asked_at_s=asked_at_s):
                return answer
            # While it was on its way the watch told something newer, perhaps about this alias.
        return answer

    def _keep_revision(self, name: RevisionName, resolution: Resolution) -> None:
        self._revisions[name] = _Revision(resolution, self._now_s())
        self._revisions.move_to_end(name)
        while len(self._revisions) > self._limits.max_entries:
            self._revisions.popitem(last=False)


async def _impatient(words: AsyncGenerator[AliasWord, None], patience_s: float) -> AsyncGenerator[AliasWord, None]:
    """``words``, with :class:`TimeoutError` after a silence."""
    async with contextlib.aclosing(words):
        while True:
            async with asyncio.timeout(patience_s):
                word = await anext(words, None)
            if word is None:
                return
            yield word
