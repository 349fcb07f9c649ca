"""A reader of tar streams that takes plain files and folders and refuses everything else.

The standard library's reader allocates what a header asks for (a PAX record of gigabytes, an endless sparse map, a
million members kept in a list), follows chains of headers by recursion, and knows links. Archives come from anybody,
so this one knows ustar, GNU's long names and the PAX keys ``path`` and ``size``, and holds one header at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol

from mint_core.errors import InvalidArgument

__all__ = ["TarEntry", "is_tar", "read_tar"]

_BLOCK: Final = 512
_MAX_NAME_BYTES: Final = 4096
_MAX_PAX_BYTES: Final = 64 << 10
_MAX_EXTENSIONS: Final = 8
_CHUNK_BYTES: Final = 256 << 10
_KINDS: Final = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"K": "a link with a long target",
    b"S": "a sparse file",
}


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class TarEntry:
    """A file or folder in the archive."""

    name: str
    size_bytes: int
    is_folder: bool
    chunks: Callable[[], Iterator[bytes]]
    """The content, once and before the next entry is asked for; what is not taken is skipped."""


def is_tar(start: bytes) -> bool:
    """Whether a file that begins with these 512 bytes is a tar."""
    return len(start) >= _BLOCK and _checksum_holds(start[:_BLOCK])


def read_tar(stream: _Stream) -> Iterator[TarEntry]:
    """The entries in order. Raises :class:`InvalidArgument` for whatever is no plain file or folder."""
    name: str | None = None
    size: int | None = None
    num_extensions = 0
    while True:
        block = _read(stream, _BLOCK)
        if not block or block == bytes(_BLOCK):
            return
        if len(block) < _BLOCK or not _checksum_holds(block):
            _refuse("it is cut off or damaged: a header is wrong")
        kind, stated = block[156:157], _number(block[124:136])
        if kind in b"LxgX":
            num_extensions += 1
            if num_extensions > _MAX_EXTENSIONS:
                _refuse(f"more than {_MAX_EXTENSIONS} extension headers stand in a row")
            if kind == b"L":
                name = _text(_content(stream, stated, _MAX_NAME_BYTES).rstrip(b"\0"))
                continue
            known = _pax(_content(stream, stated, _MAX_PAX_BYTES))
            if kind == b"g":
                if "path" in known or "size" in known:
                    _refuse("a global header names or measures every file")
                continue
            name, size = known.get("path", name), _decimal(known["size"]) if "size" in known else size
            continue
        if kind not in (b"0", b"\0", b"7", b"5"):
            _refuse(f"{_own_name(block)[:120]!r} is {_KINDS.get(kind, f'of the kind {kind!r}')}")
        entry_name = _own_name(block) if name is None else name
        is_folder = kind == b"5" or (kind == b"\0" and entry_name.endswith("/"))
        num_bytes = 0 if is_folder else stated if size is None else size
        name, size, num_extensions = None, None, 0
        rest = _Content(stream, num_bytes)
        yield TarEntry(entry_name, num_bytes, is_folder, rest.chunks)
        rest.skip()


class _Content:
    """What is left of one file."""

    def __init__(self, stream: _Stream, size_bytes: int) -> None:
        self._stream = stream
        self._left = size_bytes
        self._padding = -size_bytes % _BLOCK

    def chunks(self) -> Iterator[bytes]:
        while self._left:
            data = _read(self._stream, min(self._left, _CHUNK_BYTES))
            if not data:
                _refuse("it is cut off in mid-file")
            self._left -= len(data)
            yield data

    def skip(self) -> None:
        for _ in self.chunks():
            pass
        _read(self._stream, self._padding)


def _refuse(defect: str) -> NoReturn:
    raise InvalidArgument(
        f"the tar archive is refused: {defect}; pack the adapter's folder with plain files only", field="archive"
    )


def _read(stream: _Stream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return bytes(data)


def _content(stream: _Stream, size: int, most: int) -> bytes:
    if size > most:
        _refuse(f"an extension header has {size} bytes, allowed are {most}")
    data = _read(stream, size)
    if len(data) < size:
        _refuse("it is cut off in an extension header")
    _read(stream, -size % _BLOCK)
    return data


def _checksum_holds(block: bytes) -> bool:
    try:
        stated = int(block[148:156].rstrip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return stated == sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's base 256, negative if the next bit is set
        number = int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
        if field[0] & 0x40 or number >= 1 << 63:
            _refuse("a file has a size that is no size")
        return number
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        _refuse(f"a file has the size {field!r}")


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        _refuse(f"a file has the size {text[:40]!r}")
    return int(text)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        _refuse(f"the name {data[:80]!r} is not UTF-8")


def _own_name(block: bytes) -> str:
    name, prefix = (block[begin:end].partition(b"\0")[0] for begin, end in ((0, 100), (345, 500)))
    # GNU's format keeps times where ustar keeps the prefix.
    is_ustar = block[257:263] == b"ustar\0"
    return _text(prefix + b"/" + name if prefix and is_ustar else name)


def _pax(data: bytes) -> dict[str, str]:
    known: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at : at + 1] != b"\0":
        length, blank, _ = data[at : at + 20].partition(b" ")
        if not blank or not length.isdigit():
            _refuse("an extension header is damaged")
        end = at + int(length)
        record = data[at + len(length) + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end > len(data) or not equals or record[-1:] != b"\n":
            _refuse("an extension header is damaged")
        if key.startswith(b"GNU.sparse"):
            _refuse("it holds a sparse file")
        if key in (b"path", b"size"):
            known[key.decode()] = _text(value)
        at = end
    return known
