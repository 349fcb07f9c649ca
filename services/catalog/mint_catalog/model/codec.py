"""One converter between a frozen dataclass and a protobuf message whose fields have the same names.

A plan is made once for each dataclass from its type hints; nested dataclasses, timestamps, enums, maps and repeated
messages follow. A codec adds what is particular to records: the name and the etag, which the key tells, so that a
stored value goes without them. It may fold its stored values (:mod:`mint_catalog.model.folding`): their name says so.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from functools import cache
from typing import Any, Final, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from google.protobuf.message import Message

from mint_catalog.model.records import etag_of
from mint_catalog.storage.store import KeyValue
from mint_core.errors import InvalidArgument

__all__ = ["FOLDED", "Codec", "check_enums", "enum_of", "from_message", "to_message"]

R = TypeVar("R")
E = TypeVar("E", bound=IntEnum)
_Reader = Callable[..., Any]
_Filler = Callable[[Any, Any], None]
_KEY_FIELDS = frozenset({"name", "mod_revision"})
FOLDED: Final = "."
"""Stands in the ``name`` of a folded value; nothing stands there in a plain one."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def enum_of(number: int, enum_type: type[E]) -> E:
    """The enum's member; one that only a newer program knows becomes the first, UNSPECIFIED."""
    member: Any = enum_type._value2member_map_.get(number)
    return enum_type(0) if member is None else member


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


def _time_of(timestamp: Any, name: str) -> datetime:
    seconds, nanos = timestamp.seconds, timestamp.nanos
    try:
        time = _EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)
    except OverflowError:
        time = None
    if time is None or not 0 <= nanos < 10**9:
        raise InvalidArgument(
            f"{name} is {seconds} s and {nanos} ns since 1970: a time lies in the years 1 to 9999 "
            "and has 0 to 999999999 ns",
            field=name,
        )
    return time


def _put_time(timestamp: Any, time: datetime) -> None:
    since = time - _EPOCH
    timestamp.seconds = since.days * 86_400 + since.seconds
    timestamp.nanos = since.microseconds * 1000
    timestamp.SetInParent()


def _inner(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


@dataclass(frozen=True, slots=True)
class _Conversion:
    """The two ways of one field, as Python source: ``m`` is the message, ``r`` the record."""

    reading: str
    """Expression over ``m``."""
    writing: str
    """Statement over ``m`` and ``value``, the record's value."""
    present: str = "value"
    """Condition on ``value`` under which it is written."""


def _conversion(name: str, optional_hint: Any, scope: dict[str, Any]) -> _Conversion:
    """How to convert a field; what the source calls is put into ``scope``."""
    hint: Any = _inner(optional_hint)
    field = f"m.{name}"
    if hint is datetime:
        return _Conversion(
            f"time_of({field}, {name!r}) if m.HasField({name!r}) else None",
            f"put_time({field}, value)",
            "value is not None",
        )
    if is_dataclass(hint):
        read, fill = f"read_{name}", f"fill_{name}"
        scope[read], scope[fill] = _plan(hint)
        return _Conversion(
            f"{read}({field}) if m.HasField({name!r}) else None", f"{fill}(value, {field})", "value is not None"
        )
    if get_origin(hint) is tuple:
        (item, _) = get_args(hint)
        if is_dataclass(item):
            read, fill = f"read_{name}", f"fill_{name}"
            scope[read], scope[fill] = _plan(item)
            return _Conversion(f"tuple(map({read}, {field}))", f"for each in value: {fill}(each, {field}.add())")
        return _Conversion(f"tuple({field})", f"{field}.extend(value)")
    if get_origin(hint) is Mapping:
        return _Conversion(f"dict({field})", f"{field}.update(value)")
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        # A value that a newer catalog wrote must not make the record unreadable.
        scope[f"enum_{name}"] = hint
        return _Conversion(f"enum_of({field}, enum_{name})", f"{field} = int(value)")
    if hint is not optional_hint:  # an ``optional`` scalar: absent is something else than zero
        return _Conversion(f"{field} if m.HasField({name!r}) else None", f"{field} = value", "value is not None")
    return _Conversion(field, f"{field} = value")


def _make_plan(record_class: Any) -> tuple[_Reader, _Filler]:
    """How to read a message into a record of this class, and how to fill a message from one.

    Both are generated as source, as dataclasses generate theirs: a loop over the fields takes twice as long, and each
    record that the catalog reads or writes goes through here.
    """
    hints = get_type_hints(record_class)
    scope: dict[str, Any] = {
        "record_class": record_class,
        "time_of": _time_of,
        "put_time": _put_time,
        "enum_of": enum_of,
    }
    reading = ["def read(m, name=None, mod_revision=0):", "    return record_class("]
    filling = ["def fill(r, m):", "    m.SetInParent()"]
    for name in (each.name for each in fields(record_class)):
        if name in _KEY_FIELDS:
            reading.append(f"        {name},")
            continue
        conversion = _conversion(name, hints[name], scope)
        reading.append(f"        {conversion.reading},")
        filling += [f"    value = r.{name}", f"    if {conversion.present}:", f"        {conversion.writing}"]
    source = "\n".join([*reading, "    )", *filling])
    exec(source, scope)  # noqa: S102 - made of the names of our own fields, of nothing that anybody sends
    return scope["read"], scope["fill"]


_plan: Any = cache(_make_plan)


def to_message(record: Any, message_type: type[Any]) -> Any:
    """A new message with the record's fields; ``name`` and ``mod_revision`` are left to the caller."""
    message = message_type()
    _plan(type(record))[1](record, message)
    return message


def from_message(message: Any, record_type: type[R], **extra: Any) -> R:
    """A record with the message's fields; ``extra`` is its ``name`` and ``mod_revision``, where it has them."""
    read: Any = _plan(record_type)[0]
    record: R = read(message, **extra)
    return record


class Codec(Generic[R]):
    """Converts records of one kind to and from their message and their stored bytes."""

    def __init__(
        self,
        record_type: type[R],
        message_type: type[Any],
        name_of: Callable[[bytes], Any] | None = None,
        fold: Callable[[Any, Any], None] | None = None,
    ) -> None:
        """``name_of`` takes a key of the record's table to the record's name.

        ``fold`` makes a message, of this name, smaller in place, and a folded one whole again.
        """
        self._record_type = record_type
        self._message_type = message_type
        self._name_of = name_of
        self._fold = fold
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

    def encode(self, record: Any) -> bytes:
        """What is stored."""
        message = to_message(record, self._message_type)
        if self._fold is not None:
            self._fold(message, record.name)
            message.name = FOLDED
        value: bytes = message.SerializeToString(deterministic=True)
        return value

    def decode(self, kv: KeyValue) -> R:
        """What was stored."""
        message = self._message_type.FromString(kv.value)
        extra: dict[str, Any] = {"mod_revision": kv.mod_revision}
        if self._name_of is not None:
            extra["name"] = name = self._name_of(kv.key)
            if self._fold is not None and message.name == FOLDED:
                self._fold(message, name)
        return from_message(message, self._record_type, **extra)
