"""Which scorers are installed, and making one of them.

Listing reads the metadata of installed packages and loads none of their code.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from mint_scorers.scorer import Scorer

__all__ = ["ENTRY_POINT_GROUP", "UnknownScorer", "UnusableScorer", "installed_scorers", "make_scorer"]

ENTRY_POINT_GROUP = "mint.scorers"
"""The group of entry points that name scorer factories."""


class UnknownScorer(LookupError):
    """No installed package has a scorer of this name."""


class UnusableScorer(Exception):
    """The scorer is installed, and no fault of its options keeps it from being made."""


def installed_scorers() -> list[str]:
    """Names of the installed scorers, in order; one that two packages claim is among them."""
    return sorted(entry_points(group=ENTRY_POINT_GROUP).names)


def make_scorer(name: str, options: Mapping[str, str]) -> Scorer:
    """Load and make the scorer ``name``.

    Raises :class:`UnknownScorer`, :class:`UnusableScorer`, or :class:`ValueError` for options the scorer does not take.
    """
    entry_point = _find(name)
    origin = _origin(entry_point)
    try:
        factory = entry_point.load()
    except Exception as error:  # importing a package runs its code, which may raise anything
        raise UnusableScorer(
            f"scorer {name!r} is {origin}, which cannot be loaded: {type(error).__name__}: {error}; "
            "install that package again or remove it"
        ) from error
    if not callable(factory):
        raise UnusableScorer(
            f"scorer {name!r} is {origin}, of type {type(factory).__name__}: an entry point of group "
            f"{ENTRY_POINT_GROUP} names a callable that takes options and gives a scorer"
        )
    try:
        scorer = factory(dict(options))
    except ValueError:
        raise
    except Exception as error:  # the factory is an installed package's code and may raise anything
        raise UnusableScorer(
            f"scorer {name!r} is {origin}, which cannot be made: {type(error).__name__}: {error}"
        ) from error
    if not callable(scorer):
        raise UnusableScorer(
            f"scorer {name!r} is {origin}, whose factory gave one of type {type(scorer).__name__}: it must give a "
            "callable that takes a sample"
        )
    made: Scorer = scorer
    return made


def _find(name: str) -> EntryPoint:
    found = sorted(entry_points(group=ENTRY_POINT_GROUP, name=name), key=_origin)
    if not found:
        raise UnknownScorer(
            f"scorer {name!r} is not installed; installed are {', '.join(installed_scorers()) or 'none'}"
        )
    if len(found) > 1:
        raise UnusableScorer(
            f"scorer {name!r} is installed {len(found)} times, as {' and as '.join(map(_origin, found))}: "
            "remove all packages of these but one"
        )
    return found[0]


def _origin(entry_point: EntryPoint) -> str:
    package = entry_point.dist
    return f"{entry_point.value} of {package.name} {package.version}" if package is not None else entry_point.value
