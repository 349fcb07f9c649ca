"""One converter between a frozen dataclass and a protobuf message whose fields have the same names.

A plan is made once for each dataclass from its type hints; nested dataclasses, timestamps, enums, maps and repeated
messages follow. A codec adds what is particular to records: the name and the etag, which the key tells, so that a
stored value goes without them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import IntEnum
from functools import cache
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from google.protobuf.message import Message

from mint_catalog.records import etag_of
from mint_catalog.store import KeyValue
from mint_core.errors import InvalidArgument
from mint_core.names import ResourceName

__all__ = ["Codec", "check_enums", "enum_of", "from_message", "to_message"]

R = TypeVar("R")
E = TypeVar("E", bound=IntEnum)
_Reader = Callable[[Message], Any]
_Writer = Callable[[Message, Any], None]
_KEY_FIELDS = frozenset({"name", "mod_revision"})


def enum_of(number: int, enum_type: type[E]) -> E:
    """The enum's member; one that only a newer program knows becomes the first, UNSPECIFIED."""
    try:
        return enum_type(number)
    except ValueError:
        return enum_type(0)


def check_enums(message: Message, *, field: str) -> None:
    """Refuse a request's message with an enum value that only a newer program knows: reading would drop it.

    Raises ``InvalidArgument``; ``field`` is the message's path in the request.
    """
    for each, value in message.ListFields():
        if each.enum_type is not None and value not in each.enum_type.values_by_number:
            known = ", ".join(known.name for known in each.enum_type.values)
            raise InvalidArgument(
                f"{field}.{each.name} is {value}: this catalog knows {known}", field=f"{field}.{each.name}"
            )


def _time_of(message: Message, name: str) -> datetime | None:
    if not message.HasField(name):
        return None
    timestamp: Any = getattr(message, name)
    try:
        time: datetime = timestamp.ToDatetime(tzinfo=UTC)
    except ValueError as error:
        raise InvalidArgument(
            f"{name} is {timestamp.seconds} s and {timestamp.nanos} ns since 1970: a time lies in the years 1 to 9999 "
            "and has 0 to 999999999 ns",
            field=name,
        ) from error
    return time


def _inner(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _field(name: str, optional_hint: Any) -> tuple[_Reader, _Writer]:
    hint: Any = _inner(optional_hint)
    if hint is datetime:
        return (
            lambda message: _time_of(message, name),
            lambda message, value: getattr(message, name).FromDatetime(value),
        )
    if is_dataclass(hint):
        read = _plan(hint)[0]
        return (
            lambda message: read(getattr(message, name)) if message.HasField(name) else None,
            lambda message, value: _fill(value, getattr(message, name)),
        )
    if get_origin(hint) is tuple:
        (item, _) = get_args(hint)
        if is_dataclass(item):
            read = _plan(item)[0]
            return lambda message: tuple(map(read, getattr(message, name))), _add(name)
        return lambda message: tuple(getattr(message, name)), _extend(name)
    if get_origin(hint) is Mapping:
        return lambda message: dict(getattr(message, name)), _update(name)
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        # A value that a newer catalog wrote must not make the record unreadable.
        return (
            lambda message: enum_of(getattr(message, name), hint),
            lambda message, value: setattr(message, name, int(value)),
        )
    return lambda message: getattr(message, name), lambda message, value: setattr(message, name, value)


def _add(name: str) -> _Writer:
    def write(message: Message, value: Any) -> None:
        for each in value:
            _fill(each, getattr(message, name).add())

    return write


def _extend(name: str) -> _Writer:
    return lambda message, value: getattr(message, name).extend(value)


def _update(name: str) -> _Writer:
    return lambda message, value: getattr(message, name).update(value)


def _make_plan(record_class: Any) -> tuple[_Reader, Sequence[tuple[str, _Writer]]]:
    """How to read a message into ``record_type``, and how to write each field back."""
    hints = get_type_hints(record_class)
    plans = {
        each.name: _field(each.name, hints[each.name]) for each in fields(record_class) if each.name not in _KEY_FIELDS
    }
    readers = [(name, reader) for name, (reader, _) in plans.items()]

    def read(message: Message, **extra: Any) -> Any:
        return record_class(**extra, **{name: reader(message) for name, reader in readers})

    return read, [(name, writer) for name, (_, writer) in plans.items()]


_plan: Any = cache(_make_plan)


def _fill(record: Any, message: Message) -> None:
    message.SetInParent()
    for name, write in _plan(type(record))[1]:
        value = getattr(record, name)
        if value is not None and value != "" and value != 0 and value != ():
            write(message, value)


def to_message(record: Any, message_type: type[Any]) -> Any:
    """A new message with the record's fields; ``name`` and ``mod_revision`` are left to the caller."""
    message = message_type()
    _fill(record, message)
    return message


def from_message(message: Any, record_type: type[R], **extra: Any) -> R:
    """A record with the message's fields, plus ``extra`` ones."""
    read: Any = _plan(record_type)[0]
    record: R = read(message, **extra)
    return record


class Codec(Generic[R]):
    """Converts records of one kind to and from their message and their stored bytes."""

    def __init__(
        self, record_type: type[R], message_type: type[Any], name_of: Callable[[bytes], ResourceName] | None = None
    ) -> None:
        """``name_of`` takes a key of the record's table to the record's name."""
        self._record_type = record_type
        self._message_type = message_type
        self._name_of = name_of
        self._has_etag = "etag" in message_type.DESCRIPTOR.fields_by_name

    def to_message(self, record: Any) -> Any:
        """The public message, with name and etag."""
        message = to_message(record, self._message_type)
        message.name = str(record.name)
        if self._has_etag:
            message.etag = etag_of(record.mod_revision)
        return message

    def from_message(self, message: Any, **extra: Any) -> R:
        """A record out of a request; ``extra`` gives the parsed name."""
        return from_message(message, self._record_type, **extra)

    def encode(self, record: R) -> bytes:
        """What is stored."""
        value: bytes = to_message(record, self._message_type).SerializeToString(deterministic=True)
        return value

    def decode(self, kv: KeyValue) -> R:
        """What was stored."""
        message = self._message_type.FromString(kv.value)
        extra: dict[str, Any] = {"mod_revision": kv.mod_revision}
        if self._name_of is not None:
            extra["name"] = self._name_of(kv.key)
        return from_message(message, self._record_type, **extra)
