"""What clients of a catalog did and were told, and everything that must hold of it.

A history is checked as a whole, after the last call: every alias and every policy record must be linearizable
(:mod:`support.linearizability`), catalog revisions must follow real time, reads that allow an older answer must get one
that was true at the revision they name, revision numbers keep their digest, and no write may succeed under a fence that
was superseded.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from support.catalog_models import (
    AliasModel,
    AliasSeen,
    MoveAlias,
    NumberSeen,
    PolicyModel,
    PolicySeen,
    Publish,
    Published,
    Read,
    UpdateLabel,
)
from support.linearizability import Operation, Outcome, check

__all__ = ["ANY", "STRONG", "Acquire", "Freshness", "Granted", "History", "ListRevisions", "Listed", "Record"]


@dataclass(frozen=True, slots=True)
class Freshness:
    """What a read asked for."""

    strong: bool = False
    at_least: int = 0


STRONG = Freshness(strong=True)
ANY = Freshness()


@dataclass(frozen=True, slots=True)
class Acquire:
    """Acquire the training lease of a policy."""

    holder: str


@dataclass(frozen=True, slots=True)
class Granted:
    """The fence of a lease."""

    fence: int


@dataclass(frozen=True, slots=True)
class ListRevisions:
    """List all revisions of a policy."""


@dataclass(frozen=True, slots=True)
class Listed:
    """All revisions of a policy: number, tag and version of each."""

    revisions: tuple[tuple[int, str, int], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One call, and what about it concerns more than its own object."""

    target: str
    """The alias or policy."""
    operation: Operation
    freshness: Freshness = STRONG
    catalog_revision: int = 0
    """The catalog revision that the answer names; 0 for none."""
    fence: int = 0
    """The fence that a write carried."""
    digests: tuple[tuple[int, str], ...] = ()
    """Revision numbers and their digests, as the answer has them."""

    @property
    def policy(self) -> str:
        return self.target.partition("/aliases/")[0]


@dataclass
class History:
    """Recorded calls; ``check`` looks at all of them."""

    staleness_s: float = 5.0
    """How old the answer of a read may be that asks for nothing."""
    records: list[Record] = field(default_factory=list)

    def counts(self) -> Counter[Outcome]:
        """How many operations had which outcome."""
        return Counter(record.operation.outcome for record in self.records)

    def check(self) -> list[str]:
        """Every violation, in words. Raises ``Undecided``."""
        return [
            *self._bugs(),
            *self._objects(),
            *self._revision_order(),
            *self._older_reads(),
            *self._revisions(),
            *self._fences(),
        ]

    def _bugs(self) -> Iterable[str]:
        for record in self.records:
            if record.operation.outcome is Outcome.FAILED and record.operation.answer == "INTERNAL":
                yield f"{record.target}: INTERNAL was answered to {record.operation.asked}"

    # -- each object on its own

    def _objects(self) -> Iterable[str]:
        listed = self._listed()
        by_target: defaultdict[str, list[Operation]] = defaultdict(list)
        tags = self._tags_seen()
        for record in self.records:
            operation = record.operation
            if not record.freshness.strong or not isinstance(operation.asked, MoveAlias | Read | UpdateLabel | Publish):
                continue
            if operation.outcome is Outcome.UNKNOWN:
                # Each of these writes leaves its tag, which every later answer shows until another write is
                # acknowledged: one that nobody has ever seen can as well be taken as one that never happened.
                if (record.target, operation.asked.tag) not in tags:
                    continue
                known = listed.get((record.target, operation.asked.tag))
                operation = replace(operation, answer=known) if known is not None else operation
            by_target[record.target].append(operation)
        for target, operations in sorted(by_target.items()):
            model: Any = AliasModel() if "/aliases/" in target else PolicyModel()
            verdict: Any = check(operations, model)
            if not verdict.linearizable:
                yield f"{target} is {verdict.explain()}"

    def _listed(self) -> dict[tuple[str, str], Published]:
        return {
            (record.target, tag): Published(number, version)
            for record in self.records
            if isinstance(record.operation.answer, Listed)
            for number, tag, version in record.operation.answer.revisions
        }

    def _tags_seen(self) -> set[tuple[str, str]]:
        tags = set(self._listed())
        for record in self.records:
            match record.operation.answer:
                case AliasSeen(_, history):
                    tags.update((record.target, entry.tag) for entry in history)
                case PolicySeen(label, _, _):
                    tags.add((record.target, label))
        return tags

    # -- revisions of the catalog

    def _revision_order(self) -> Iterable[str]:
        """The catalog's revision only grows: no answer is of an older one than an answer known before its call."""
        answered = [each for each in self.records if each.catalog_revision and each.freshness.strong]
        by_end = sorted(answered, key=lambda each: each.operation.returned_s)
        newest, index = 0, 0
        for record in sorted(answered, key=lambda each: each.operation.invoked_s):
            while by_end[index].operation.returned_s < record.operation.invoked_s:
                newest = max(newest, by_end[index].catalog_revision)
                index += 1
            if record.catalog_revision < newest:
                told = f"{record.target}: {record.operation.asked} was answered at revision {record.catalog_revision}"
                yield f"{told}, after revision {newest} had been answered"

    def _older_reads(self) -> Iterable[str]:
        """A read that allows an older answer gets one that was true at the revision it names, and no older one."""
        timelines = self._timelines()
        for record in self.records:
            answer = record.operation.answer
            if record.freshness.strong or not isinstance(answer, NumberSeen):
                continue
            told = f"{record.target}: {record.operation.asked} at least at revision {record.freshness.at_least}"
            if answer.catalog_revision < record.freshness.at_least:
                yield f"{told} was answered at revision {answer.catalog_revision}"
            problem = timelines[record.target].problem(record, self.staleness_s)
            if problem:
                yield f"{told} was answered {answer.number} of revision {answer.catalog_revision}: {problem}"

    def _timelines(self) -> defaultdict[str, _Timeline]:
        timelines: defaultdict[str, _Timeline] = defaultdict(_Timeline)
        for record in self.records:
            operation = record.operation
            if isinstance(operation.answer, AliasSeen) and operation.answer.history:
                wrote = operation.answer.history[0].tag == getattr(operation.asked, "tag", "")
                timelines[record.target].saw(operation.answer, operation.returned_s if wrote else None)
            elif isinstance(operation.asked, MoveAlias) and operation.outcome is Outcome.UNKNOWN:
                timelines[record.target].unknown.append(operation)
        return timelines

    # -- revisions of policies

    def _revisions(self) -> Iterable[str]:
        """A number has one digest for ever, an acknowledged revision stays, a publication applies once."""
        digests: dict[tuple[str, int], str] = {}
        acknowledged: dict[tuple[str, int], str] = {}
        for record in self.records:
            for number, digest in record.digests:
                known = digests.setdefault((record.policy, number), digest)
                if known != digest:
                    yield f"{record.policy}: revision {number} has digest {known} and digest {digest}"
            operation = record.operation
            if isinstance(operation.asked, Publish) and isinstance(operation.answer, Published):
                number, tag = operation.answer.number, operation.asked.tag
                known = acknowledged.setdefault((record.target, number), tag)
                if known != tag:
                    yield f"{record.target}: number {number} was given to {known} and to {tag}"
        asked = {
            (record.target, record.operation.asked.tag)
            for record in self.records
            if isinstance(record.operation.asked, Publish) and record.operation.outcome is not Outcome.FAILED
        }
        for record in self.records:
            if isinstance(record.operation.answer, Listed):
                yield from _check_listing(record.target, record.operation.answer, acknowledged, asked)

    # -- fences

    def _fences(self) -> Iterable[str]:
        """No write succeeds under a fence when a later one has been granted."""
        granted: defaultdict[str, dict[int, str]] = defaultdict(dict)
        for record in self.records:
            asked, answer = record.operation.asked, record.operation.answer
            if isinstance(asked, Acquire) and isinstance(answer, Granted):
                holder = granted[record.target].setdefault(answer.fence, asked.holder)
                if holder != asked.holder:
                    yield f"{record.target}: fence {answer.fence} was given to {holder} and to {asked.holder}"
        for record in self.records:
            answer = record.operation.answer
            if not record.fence or not isinstance(answer, Published):
                continue
            later = [fence for fence in granted[record.target] if record.fence < fence < answer.version]
            if later:
                wrote = f"a write under fence {record.fence} succeeded at revision {answer.version}"
                yield f"{record.target}: {wrote}, after fence {min(later)} had been granted"


class _Timeline:
    """What an alias was at which version, as far as anybody saw it."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._acknowledged_s: dict[int, float] = {}
        self.unknown: list[Operation] = []

    def saw(self, seen: AliasSeen, acknowledged_s: float | None) -> None:
        self._numbers[seen.version] = seen.history[0].number
        if acknowledged_s is not None:
            self._acknowledged_s[seen.version] = acknowledged_s

    def problem(self, record: Record, staleness_s: float) -> str:
        """Why the answer of a read cannot be; empty where it can."""
        answer, invoked_s = record.operation.answer, record.operation.invoked_s
        versions = sorted(version for version in self._numbers if version <= answer.catalog_revision)
        present = versions[-1] if versions else 0
        if self._numbers.get(present, 0) != answer.number:
            late = record.operation.returned_s
            # A move without an answer has a version that nobody may ever have seen.
            if any(each.invoked_s < late and each.asked.number in (0, answer.number) for each in self.unknown):
                return ""
            return f"the alias was at {self._numbers.get(present, 0)} since revision {present}"
        overdue = [
            version
            for version, acknowledged_s in self._acknowledged_s.items()
            if version > answer.catalog_revision and acknowledged_s < invoked_s - staleness_s
        ]
        if overdue:
            return f"revision {min(overdue)} had been acknowledged more than {staleness_s:g} s before the call"
        return ""


def _check_listing(
    policy: str, listed: Listed, acknowledged: dict[tuple[str, int], str], asked: set[tuple[str, str]]
) -> Iterable[str]:
    tags = {number: tag for number, tag, _ in listed.revisions}
    if [number for number, _, _ in listed.revisions] != list(range(1, len(tags) + 1)):
        yield f"{policy}: the numbers of its revisions are {sorted(tags)}"
    for tag, num_times in Counter(tags.values()).items():
        if num_times > 1:
            yield f"{policy}: {tag} was published {num_times} times"
        if (policy, tag) not in asked:
            yield f"{policy}: {tag} is published, but its publication was refused or never asked for"
    for (target, number), tag in acknowledged.items():
        if target == policy and tags.get(number) != tag:
            yield f"{policy}: revision {number} of {tag} was acknowledged, and is {tags.get(number, 'gone')} now"
