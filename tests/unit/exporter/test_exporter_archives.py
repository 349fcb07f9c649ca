from __future__ import annotations

import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_core.errors import InvalidArgument, MintError, ResourceExhausted
from mint_exporter import archives
from mint_exporter.archives import CONFIG_NAME, WEIGHTS_NAME, extract_adapter, is_archive

WEIGHTS, CONFIG = bytes(range(256)) * 5, b'{"peft_type": "LORA"}'
GOOD = {WEIGHTS_NAME: WEIGHTS, CONFIG_NAME: CONFIG}
MIB = 1 << 20
GIB = 1 << 30


def tar(files: dict[str, bytes], layout: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pax(files: dict[str, bytes]) -> bytes:
    return tar(files, tarfile.PAX_FORMAT)


def tgz(files: dict[str, bytes]) -> bytes:
    return gzip.compress(tar(files))


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def extract(folder: Path, data: bytes, *, max_weights_bytes: int = MIB) -> dict[str, bytes]:
    archive, target = folder / "archive", folder / "out"
    archive.write_bytes(data)
    target.mkdir()
    extract_adapter(archive, target, max_weights_bytes=max_weights_bytes)
    assert sorted(each.name for each in target.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    return {each.name: each.read_bytes() for each in target.iterdir()}


@pytest.mark.parametrize("pack", [tar, pax, tgz, zipped], ids=lambda pack: pack.__name__)
@pytest.mark.parametrize("prefix", ["", "./", "my adapter/", "a/" * 90, "ä/" * 60], ids=len)
def test_an_adapter_comes_out_as_it_went_in(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes], prefix: str
) -> None:
    others = {prefix + "README.md": b"read me", prefix + "optimizer.pt": b"\x80\x04.", "__MACOSX/._x": b""}
    data = pack({prefix + name: content for name, content in GOOD.items()} | others)
    assert extract(tmp_path, data) == GOOD
    assert is_archive(tmp_path / "archive")


def test_what_tar_itself_packs_is_taken(tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    for name, data in GOOD.items():
        (source / name).write_bytes(data)
    for number, mode in enumerate(["w", "w:gz"]):
        with tarfile.open(tmp_path / "packed", mode) as archive:  # type: ignore[call-overload]
            archive.add(source, "adapter")
        (folder := tmp_path / str(number)).mkdir()
        assert extract(folder, (tmp_path / "packed").read_bytes()) == GOOD


def special(kind: bytes, name: str = "x", linkname: str = "/etc/passwd") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, linkname
        archive.addfile(info)
        for each, data in GOOD.items():
            info = tarfile.TarInfo(each)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_with(**changes: object) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("extra")
        for field, value in changes.items():
            setattr(info, field, value)
        archive.writestr(info, b"target")
        for name, data in GOOD.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def encrypted() -> bytes:
    data = bytearray(zipped(GOOD))
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    return bytes(data)


def damaged_zip() -> bytes:
    data = bytearray(zipped(GOOD, zipfile.ZIP_STORED))
    data[data.index(WEIGHTS[:32]) + 5] ^= 1
    return bytes(data)


def resized_tar(size: bytes) -> bytes:
    """The first file claims to be as long as ``size`` says."""
    data = bytearray(tar(GOOD))
    data[124:136] = size.ljust(12, b" ")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def header(kind: bytes, size: int, name: bytes = b"x") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = b"%011o\0" % size if size < 8 << 30 else b"\x80" + size.to_bytes(11, "big")
    block[156:157] = kind
    block[257:265] = b"ustar\00000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(kind: bytes, content: bytes) -> bytes:
    return header(kind, len(content)) + content.ljust(-(-len(content) // 512) * 512, b"\0")


REFUSED: dict[str, tuple[bytes, str]] = {
    "symbolic link": (special(tarfile.SYMTYPE), "symbolic link"),
    "hard link": (special(tarfile.LNKTYPE), "hard link"),
    "device": (special(tarfile.CHRTYPE), "character device"),
    "block device": (special(tarfile.BLKTYPE), "block device"),
    "pipe": (special(tarfile.FIFOTYPE), "named pipe"),
    "sparse": (special(tarfile.GNUTYPE_SPARSE), "sparse"),
    "long link": (special(tarfile.SYMTYPE, linkname="l" * 300), "long target"),
    "unknown kind": (special(b"Q"), "of the kind"),
    "absolute": (tar({"/etc/" + WEIGHTS_NAME: WEIGHTS} | GOOD), "leads out"),
    "parent": (tar({"a/../../x": b""} | GOOD), "leads out"),
    "absolute zip": (zipped({"/x": b""} | GOOD), "leads out"),
    "parent zip": (zipped({"../x": b""} | GOOD), "leads out"),
    "backslash": (zipped({"a\\..\\x": b""} | GOOD), "leads out"),
    "drive": (zipped({"C:/x": b""} | GOOD), "leads out"),
    "line end in a name": (tar({"a\nb": b""} | GOOD), "unprintable"),
    "long name": (tar({"n" * 1025: b""} | GOOD), "longer than"),
    "very long name": (tar({"n" * 5000: b""} | GOOD), "extension header"),
    "link zip": (zip_with(external_attr=0o120777 << 16), "link"),
    "pipe zip": (zip_with(external_attr=0o010666 << 16), "pipe"),
    "bzip2 zip": (zipped(GOOD, zipfile.ZIP_BZIP2), "method 12"),
    "lzma zip": (zipped(GOOD, zipfile.ZIP_LZMA), "method 14"),
    "encrypted": (encrypted(), "encrypted"),
    "damaged zip": (damaged_zip(), "damaged"),
    "cut zip": (zipped(GOOD)[:-30], "no sound zip"),
    "cut tar": (tar(GOOD)[:1500], "cut off"),
    "cut tar header": (tar(GOOD)[:2100], "cut off"),
    "cut gzip": (tgz(GOOD)[:-200], "cut off"),
    "damaged gzip": (tgz(GOOD)[:40] + b"\xff" * 40 + tgz(GOOD)[80:], "gzip stream is damaged|cut off"),
    "two adapters": (tar({"a/" + WEIGHTS_NAME: WEIGHTS} | GOOD), "one adapter"),
    "two configurations": (zipped({"a/" + CONFIG_NAME: CONFIG} | GOOD), "one adapter"),
    "two folders": (zipped({"a/" + WEIGHTS_NAME: WEIGHTS, "b/" + CONFIG_NAME: CONFIG}), "two folders"),
    "no weights": (tar({CONFIG_NAME: CONFIG}), WEIGHTS_NAME),
    "no configuration": (tar({WEIGHTS_NAME: WEIGHTS}), CONFIG_NAME),
    "pickled": (tar({CONFIG_NAME: CONFIG, "adapter_model.bin": b"\x80\x04."}), "pickle, which MinT never opens"),
    "torch.save": (zipped({"archive/data.pkl": b"\x80\x02.", "archive/data/0": b""}), "pickle"),
    "nothing": (tar({}), "known kind"),
    "xz": (b"\xfd7zXZ\x00" + bytes(600), "xz: expected"),
    "bzip2": (b"BZh9" + bytes(600), "bzip2: expected"),
    "text": (b"hello", "no known kind"),
    "negative size": (resized_tar(b"\xff" * 12), "no size"),
    "size that is no number": (resized_tar(b"12x"), "size"),
    "tar that claims too little": (resized_tar(b"10"), "header is wrong"),
    "pax size that is no number": (extended(b"x", b"11 size=-5\n") + tar(GOOD), "size '-5'"),
    "pax that is damaged": (extended(b"x", b"99 size=5\n") + tar(GOOD), "damaged"),
    "pax for all files": (extended(b"g", b"20 path=/etc/passwd\n") + tar(GOOD), "global header"),
    "pax path that leads out": (extended(b"x", b"20 path=/etc/passwd\n") + tar(GOOD), "leads out"),
    "pax sparse": (extended(b"x", b"22 GNU.sparse.major=1\n") + tar(GOOD), "sparse"),
    "headers without end": (extended(b"x", b"") * 9 + tar(GOOD), "in a row"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_safe_is_refused_and_nothing_leaves_the_folder(tmp_path: Path, case: str) -> None:
    data, says = REFUSED[case]
    (inside := tmp_path / "inside").mkdir()
    with pytest.raises(InvalidArgument, match=says):
        extract(inside, data)
    assert [each.name for each in tmp_path.iterdir()] == ["inside"]
    assert {each.name for each in inside.iterdir()} == {"archive", "out"}
    assert {each.name for each in (inside / "out").iterdir()} <= set(GOOD)


def bomb(size: int) -> bytes:
    """A tar.gz of one file of zeros."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as packed:
        packed.write(header(b"0", size, WEIGHTS_NAME.encode()))
        for _ in range(size // MIB):
            packed.write(bytes(MIB))
    return buffer.getvalue()


def wide_zip(num_entries: int) -> bytes:
    """A zip whose directory alone is large."""
    entry = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * num_entries
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, num_entries & 0xFFFF, num_entries & 0xFFFF, len(directory), 4, 0)
    return b"PK\x03\x04" + directory + end


TOO_LARGE: dict[str, Callable[[], bytes]] = {
    "weights": lambda: tar({CONFIG_NAME: CONFIG, WEIGHTS_NAME: bytes(MIB + 1)}),
    "weights in a zip": lambda: zipped({CONFIG_NAME: CONFIG, WEIGHTS_NAME: bytes(MIB + 1)}),
    "configuration": lambda: tgz({CONFIG_NAME: b" " * (MIB + 1), WEIGHTS_NAME: WEIGHTS}),
    "what is skipped": lambda: tgz({"optimizer.pt": bytes(3 * MIB), "more": bytes(MIB)} | GOOD),
    "what is skipped in a zip": lambda: zipped({"optimizer.pt": bytes(3 * MIB), "more": bytes(MIB)} | GOOD),
    "many entries": lambda: gzip.compress(header(b"0", 0) * 301),
    "many entries in a zip": lambda: wide_zip(301),
    "a gzip bomb": lambda: bomb(32 * MIB),
    "a claim of 8 EiB": lambda: header(b"0", (1 << 63) - 1, WEIGHTS_NAME.encode()) + bytes(1024),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_more_than_allowed_is_refused_in_little_memory(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_MAX_ENTRIES", 300)
    data = TOO_LARGE[case]()
    tracemalloc.start()
    try:
        with pytest.raises(ResourceExhausted):
            extract(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 12 * MIB
    finally:
        tracemalloc.stop()
    assert sum(each.stat().st_size for each in (tmp_path / "out").iterdir()) <= 2 * MIB


@pytest.mark.parametrize(
    "data",
    [
        header(b"L", 4 * GIB) + bytes(4096),
        header(b"x", 4 * GIB) + bytes(4096),
        header(b"g", 4 * GIB) + bytes(4096),
        wide_zip(300_000),
    ],
    ids=["long name", "pax", "global pax", "zip directory"],
)
def test_no_memory_is_taken_because_a_header_says_so(tmp_path: Path, data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((InvalidArgument, ResourceExhausted)):
            extract(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


ARCHIVES = [tar(GOOD), pax({"ä" * 120 + "/" + name: data for name, data in GOOD.items()}), tgz(GOOD), zipped(GOOD)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is changed: an adapter comes out whole, or one of our own errors."""
    archive = bytearray(data.draw(st.sampled_from(ARCHIVES)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(archive) - 1))
        archive[at] = data.draw(st.integers(0, 255))
    archive = archive[: data.draw(st.integers(1, len(archive)))] if data.draw(st.booleans()) else archive
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        found = extract(folder, bytes(archive))
    except MintError:
        assert {each.name for each in folder.iterdir()} == {"archive", "out"}
    else:
        assert len(found) == 2
