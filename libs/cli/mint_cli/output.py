"""What commands print: one JSON document for programs, tables for people."""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf import timestamp_pb2
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["console", "flatten", "print_json", "print_pairs", "print_table", "progress_console", "to_plain"]

_PIPE_WIDTH = 1000


def console() -> Console:
    """For results; as wide as they are when they go into a file or a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def progress_console() -> Console:
    """For what is going on, so that standard output holds results only."""
    return Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    """Print one document. Figures that are not finite become null: JSON has no others."""
    print(json.dumps(_finite(value), ensure_ascii=False, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(_shown(cell) for cell in row))
    console().print(table)


def print_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """One name and value a line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in pairs:
        table.add_row(name, _shown(value))
    console().print(table)


def to_plain(message: Message) -> dict[str, Any]:
    """A message as plain values: every field under its own name, enums by their short names, times as ISO 8601.

    Unset messages are left out; unset scalars have their default.
    """
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            plain[field.name] = {key: _plain_value(field, value[key]) for key in sorted(value)}
        elif field.is_repeated:
            plain[field.name] = [_plain_value(field, item) for item in value]
        else:
            plain[field.name] = _plain_value(field, value)
    return plain


def flatten(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """The leaves of nested tables, each under its path: ``{"a": {"b": 1}}`` is ``[("a.b", 1)]``."""
    pairs: list[tuple[str, object]] = []
    for key, value in table.items():
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs


def _plain_value(field: Any, value: Any) -> Any:
    if isinstance(value, timestamp_pb2.Timestamp):
        return value.ToDatetime(datetime.UTC).isoformat(timespec="milliseconds")
    if isinstance(value, Message):
        return to_plain(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return _short_name(field.enum_type.values_by_number[0].name, known.name) if known else value
    return value.hex() if isinstance(value, bytes) else value


def _short_name(zero: str, name: str) -> str:
    """``RUN_STATE_QUEUED`` is ``QUEUED``: the prefix is what the type's zero value has before UNSPECIFIED."""
    return name.removeprefix(zero.removesuffix("UNSPECIFIED"))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(cell: object) -> Text:
    if isinstance(cell, float):
        return Text(f"{cell:.4g}")
    return Text("" if cell is None else str(cell))
