"""Times as people type them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from mint_core.errors import InvalidArgument

__all__ = ["SinceOption", "UntilOption", "parse_time"]

_AGO = re.compile(r"(\d{1,9})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

SinceOption = Annotated[
    str, typer.Option(help="Only from then on: 2026-03-01, 2026-03-01T12:00Z, or 90m, 36h, 7d ago.")
]
UntilOption = Annotated[str, typer.Option(help="Only before then.")]


def parse_time(text: str, *, field: str) -> datetime | None:
    """A point in time: ISO 8601, in UTC unless it says otherwise, or a length of time ago like ``36h``.

    None for an empty text. Raises :class:`InvalidArgument`.
    """
    if not text:
        return None
    try:
        ago = _AGO.fullmatch(text)
        if ago:
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        time = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise InvalidArgument(
            f"{field} is {text!r}: expected a time like 2026-03-01T12:00Z, or a length of time like 36h", field=field
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
