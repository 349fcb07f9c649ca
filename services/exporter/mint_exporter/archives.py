"""Archives of PEFT folders, opened with suspicion: two files are taken out of them, nothing else is written.

tar, tar.gz and zip; told apart by their bytes. Every name is looked at before anything of it is believed: links,
devices, absolute paths and ``..`` make the whole archive refused. What is unpacked is counted, also what is skipped,
and memory does not grow with what a header claims.
"""

from __future__ import annotations

import functools
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Final, NoReturn

from mint_core.errors import InvalidArgument, ResourceExhausted
from mint_exporter.tar_stream import is_tar, read_tar

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "extract_adapter", "is_archive"]

WEIGHTS_NAME: Final = "adapter_model.safetensors"
CONFIG_NAME: Final = "adapter_config.json"

_MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_ENTRIES: Final = 10_000
_MAX_NAME_CHARS: Final = 1024
_SKIPPED_FACTOR: Final = 3
"""A training checkpoint has the optimizer's moments beside the adapter: so many times its size may be skipped."""
_CHUNK_BYTES: Final = 256 << 10
_MAX_READ_BYTES: Final = 1 << 20
_PICKLES: Final = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_ZIP: Final = (b"PK\x03\x04", b"PK\x05\x06")
_GZIP: Final = b"\x1f\x8b"
_OTHERS: Final = (
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"Rar!", "RAR"),
)
_ZIP_DEFECTS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OverflowError,
    RuntimeError,
    ValueError,
)
"""What the standard library raises for zip files that are damaged, or made to be."""


def is_archive(path: Path) -> bool:
    """Whether the file's first bytes are those of an archive, of a kind that is taken or not."""
    with path.open("rb") as file:
        start = file.read(512)
    return start.startswith((*_ZIP, _GZIP, *(magic for magic, _ in _OTHERS))) or is_tar(start)


def extract_adapter(archive: Path, folder: Path, *, max_weights_bytes: int) -> None:
    """Write the adapter's two files into ``folder``, which exists and is empty; blocks while it reads and writes.

    Raises :class:`InvalidArgument` if the archive is not safe, not of a known kind, damaged, or does not hold one
    adapter as safetensors; :class:`ResourceExhausted` if it has more entries or bytes than allowed, or the disk is
    full.
    """
    with archive.open("rb") as file:
        start = file.read(512)
        file.seek(0)
        target = _Target(folder, max_weights_bytes)
        if start.startswith(_ZIP):
            target.take(_zip_entries(file))
        elif start.startswith(_GZIP):
            target.take(_tar_entries(_Gunzip(file)))
        elif is_tar(start):
            target.take(_tar_entries(file))
        else:
            other = next((kind for magic, kind in _OTHERS if start.startswith(magic)), "of no known kind")
            raise InvalidArgument(f"the archive is {other}: expected tar, tar.gz or zip", field="archive")
    target.check_complete()


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    size_bytes: int
    is_folder: bool
    chunks: Callable[[], Iterator[bytes]]


@dataclass
class _Target:
    """The folder that is filled, and what was seen on the way."""

    folder: Path
    max_weights_bytes: int
    found: dict[str, PurePosixPath] = field(default_factory=dict)
    """Where in the archive the taken files stood."""
    pickle: str = ""
    num_bytes: int = 0

    def take(self, entries: Iterable[_Entry]) -> None:
        for number, entry in enumerate(entries, 1):
            if number > _MAX_ENTRIES:
                raise ResourceExhausted(f"the archive has more than {_MAX_ENTRIES} entries: pack the adapter alone")
            path = _safe(entry.name)
            self._count(entry)
            if entry.is_folder:
                continue
            if path.name in (WEIGHTS_NAME, CONFIG_NAME):
                self._write(path, entry)
            elif path.suffix in _PICKLES:
                self.pickle = str(path)

    def check_complete(self) -> None:
        missing = sorted({WEIGHTS_NAME, CONFIG_NAME} - set(self.found))
        if missing:
            hint = f"; {self.pickle[:120]!r} is a pickle, which MinT never opens" if self.pickle else ""
            raise InvalidArgument(
                f"the archive has no {' and no '.join(missing)}: pack a PEFT folder saved as safetensors{hint}",
                field="archive",
            )
        if self.found[WEIGHTS_NAME].parent != self.found[CONFIG_NAME].parent:
            raise InvalidArgument(
                f"{str(self.found[WEIGHTS_NAME])[:120]!r} and {str(self.found[CONFIG_NAME])[:120]!r} stand in two "
                "folders of the archive: pack one adapter",
                field="archive",
            )

    def _count(self, entry: _Entry) -> None:
        most = (1 + _SKIPPED_FACTOR) * self.max_weights_bytes
        self.num_bytes += entry.size_bytes
        if self.num_bytes > most:
            raise ResourceExhausted(f"the archive unpacks to more than {most} bytes: pack the adapter alone")

    def _write(self, path: PurePosixPath, entry: _Entry) -> None:
        name = path.name
        if name in self.found:
            raise InvalidArgument(
                f"the archive has {str(self.found[name])[:120]!r} and {str(path)[:120]!r}: pack one adapter",
                field="archive",
            )
        most = self.max_weights_bytes if name == WEIGHTS_NAME else _MAX_CONFIG_BYTES
        if entry.size_bytes > most:
            raise ResourceExhausted(f"{str(path)[:120]!r} has {entry.size_bytes} bytes, allowed are {most}")
        self.found[name] = path
        try:
            with (self.folder / name).open("xb") as file:
                for chunk in entry.chunks():
                    file.write(chunk)
        except OSError as error:
            raise ResourceExhausted(f"the exporter's disk takes no more: {error.strerror}; retry later") from error
        if (self.folder / name).stat().st_size != entry.size_bytes:
            _refuse(f"{str(path)[:120]!r} is not as long as the archive says")


def _refuse(defect: str) -> NoReturn:
    raise InvalidArgument(f"the archive is refused: {defect}", field="archive")


def _safe(name: str) -> PurePosixPath:
    """The path that an entry names, if it stays inside of the folder the archive would be unpacked in."""
    parts = name.split("/")
    if not name or len(name) > _MAX_NAME_CHARS or not name.isprintable():
        _refuse(f"the name {name[:120]!r} is empty, unprintable or longer than {_MAX_NAME_CHARS} characters")
    if name.startswith("/") or "\\" in name or parts[0].endswith(":") or ".." in parts:
        _refuse(f"the name {name[:120]!r} leads out of its folder")
    return PurePosixPath(name)


def _tar_entries(stream: BufferedReader | _Gunzip) -> Iterator[_Entry]:
    for each in read_tar(stream):
        yield _Entry(each.name, each.size_bytes, each.is_folder, each.chunks)


class _Gunzip:
    """The content of one gzip member, never more at a time than asked for."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._inflate = zlib.decompressobj(wbits=31)

    def read(self, size: int) -> bytes:
        inflate, data = self._inflate, bytearray()
        while len(data) < size and not inflate.eof:
            packed = inflate.unconsumed_tail or self._file.read(_CHUNK_BYTES)
            if not packed:
                _refuse("its gzip stream is cut off")
            try:
                data += inflate.decompress(packed, size - len(data))
            except zlib.error as error:
                _refuse(f"its gzip stream is damaged: {error}")
        return bytes(data)


class _BoundedReader:
    """A file whose reads are bounded: the zip reader asks for as many bytes as the archive's directory claims."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            at = self._file.tell()
            size_bytes = self._file.seek(0, 2)
            self._file.seek(at)
            if size > _MAX_READ_BYTES or size_bytes - at > _MAX_READ_BYTES:
                raise ResourceExhausted(f"the archive's directory has more than {_MAX_READ_BYTES} bytes")
        return self._file.read(size)


def _zip_entries(file: BufferedReader) -> Iterator[_Entry]:
    try:
        archive = zipfile.ZipFile(_BoundedReader(file))
    except _ZIP_DEFECTS as error:
        _refuse(f"it is no sound zip file: {error}")
    with archive:
        for info in archive.infolist():
            _check_zip_entry(info)
            yield _Entry(info.orig_filename, info.file_size, info.is_dir(), functools.partial(_inflate, archive, info))


def _check_zip_entry(info: zipfile.ZipInfo) -> None:
    name, kind = info.orig_filename[:120], stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        _refuse(f"{name!r} is a link, a device or a pipe")
    if info.flag_bits & 1:
        _refuse(f"{name!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The others are inflated whole by the standard library, whatever their size.
        _refuse(f"{name!r} is compressed by method {info.compress_type}: expected deflate or none")


def _inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(info) as content:
            while data := content.read(_CHUNK_BYTES):
                yield data
    except _ZIP_DEFECTS as error:
        _refuse(f"{info.orig_filename[:120]!r} is damaged: {error}")
