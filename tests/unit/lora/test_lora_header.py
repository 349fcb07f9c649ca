"""Malformed files, each with its own clear refusal, before any tensor byte is believed."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mint_core.errors import InvalidArgument
from mint_lora.dtypes import DTYPES
from mint_lora.header import read_header
from mint_lora.tensors import TensorFile, TensorSource, write_safetensors


def _file(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _tensor(begin: int = 0, end: int = 4, shape: object = (1,), dtype: object = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": shape if not isinstance(shape, tuple) else list(shape),
        "data_offsets": [begin, end],
    }


def _refused(path: Path) -> str:
    with pytest.raises(InvalidArgument) as caught:
        read_header(path)
    assert path.name in str(caught.value)
    assert caught.value.field
    return str(caught.value)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 4), np.float16), "c": np.int64(7)}
    path = tmp_path / "f.safetensors"
    safetensors.numpy.save_file({k: np.asarray(v) for k, v in tensors.items()}, path, {"key": "value"})
    header = read_header(path)
    assert header.metadata == {"key": "value"}
    assert header.size_bytes == path.stat().st_size
    assert {n: (t.dtype, t.shape) for n, t in header.tensors.items()} == {
        "a": ("F16", (0, 4)),
        "b": ("F32", (2, 3)),
        "c": ("I64", ()),
    }
    with TensorFile(path) as file:
        for name, value in tensors.items():
            assert np.array_equal(file.array(name), value)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"[]", b"", "first bytes announce"),
        (b"{", b"", "first bytes announce"),
        (b"{]", b"", "not JSON"),
        (b'{"a":NaN}', b"", "not JSON"),
        (b'{"\xff":1}', b"", "not JSON"),
        (b"{" + b'"a":[' * 990 + b"}", b"", "not JSON"),
        (b"{" + b'"a":[' * 5000 + b"}", b"", "brackets and commas for 0 tensors"),
        (b'{"a":[' + b"0," * 5000 + b"0]}", b"", "brackets and commas for 0 tensors"),
        (b'{"\\"":0,' + b'"a":1,' * 5000 + b'"b":"c"}', b"", "brackets and commas for 0 tensors"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "not JSON"),
        (b'{"a":1,"a":2}', b"", "'a' twice"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"__metadata__": []}, b"", "__metadata__"),
        ({"": _tensor()}, b"1234", "tensor name ''"),
        ({"a\n": _tensor()}, b"1234", "unprintable"),
        ({"a" * 513: _tensor()}, b"1234", "longer than"),
        ({"t": []}, b"", "exactly dtype, shape and data_offsets"),
        ({"t": _tensor() | {"more": 1}}, b"1234", "exactly dtype, shape and data_offsets"),
        ({"t": _tensor(dtype="F99")}, b"1234", "known are"),
        ({"t": _tensor(dtype=["F32"])}, b"1234", "known are"),
        ({"t": _tensor(shape="1")}, b"1234", "shape"),
        ({"t": _tensor(shape=[-1])}, b"1234", "shape"),
        ({"t": _tensor(shape=[1.0])}, b"1234", "shape"),
        ({"t": _tensor(shape=[True])}, b"1234", "shape"),
        ({"t": _tensor(shape=[1] * 9)}, b"1234", "shape"),
        ({"t": _tensor(shape=[1 << 63])}, b"1234", "shape"),
        ({"t": _tensor(0, 4, shape=[1 << 40, 1 << 40])}, b"1234", "needs"),
        ({"t": _tensor(0, 8)}, b"12345678", "has 8 bytes, its shape [1] of F32 needs 4"),
        ({"t": _tensor(4, 0)}, b"1234", "has -4 bytes"),
        ({"t": _tensor() | {"data_offsets": [0]}}, b"1234", "data_offsets"),
        ({"t": _tensor() | {"data_offsets": [-4, 0]}}, b"1234", "data_offsets"),
        ({"t": _tensor(4, 8)}, b"12345678", "leaves a gap"),
        ({"t": _tensor(0, 4), "u": _tensor(8, 12)}, b"1" * 12, "'u' leaves a gap"),
        ({"t": _tensor(0, 4), "u": _tensor(0, 4)}, b"1234", "'u' overlaps"),
        ({"t": _tensor(0, 8, shape=(2,)), "u": _tensor(4, 8)}, b"12345678", "'u' overlaps"),
        ({"t": _tensor(0, 4)}, b"123", "cut off"),
        ({"t": _tensor(0, 4)}, b"12345", "after its last tensor"),
        ({}, b"1", "after its last tensor"),
    ],
)
def test_defects(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    assert says in _refused(_file(tmp_path / "adapter.safetensors", header, data))


def test_text_in_metadata_may_have_any_marks(tmp_path: Path) -> None:
    for text in ("[{,}]" * 5000, '\\"[,' * 5000, "\\" * 5001 + "," * 5000):
        header = {"__metadata__": {"text": text}, "t": _tensor()}
        assert read_header(_file(tmp_path / "f", header, b"1234")).metadata == {"text": text}


def test_header_is_checked_once_for_files_that_share_it(tmp_path: Path) -> None:
    one = read_header(_file(tmp_path / "one.safetensors", {"t": _tensor()}, b"1234"))
    assert read_header(_file(tmp_path / "other.safetensors", {"t": _tensor()}, b"5678")) is one
    assert read_header(_file(tmp_path / "more.safetensors", {"t": _tensor(), "__metadata__": {}}, b"1234")) is not one
    # The same header in a file of another length, and with another limit, is another question.
    for length, says in ((3, "cut off"), (5, "after its last tensor"), (3, "cut off")):
        assert says in _refused(_file(tmp_path / "length.safetensors", {"t": _tensor()}, b"1" * length))
    with pytest.raises(InvalidArgument, match="has 1 tensors, allowed are 0"):
        read_header(tmp_path / "one.safetensors", max_tensors=0)


def test_long_headers_are_not_kept(tmp_path: Path) -> None:
    path = _file(tmp_path / "long.safetensors", {"t": _tensor(), "__metadata__": {"a": "b" * (1 << 18)}}, b"1234")
    assert read_header(path) is not read_header(path)


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps({"a": list(range(100))}, protocol=protocol))
        assert "Python pickle" in _refused(path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    path.write_bytes(buffer.getvalue())
    assert "zip archive" in _refused(path)
    for content, says in ((b"GGUF" + bytes(100), "GGUF"), (b"<html></html>", "web page"), (b'{"a": 1}   ', "JSON")):
        path.write_bytes(content)
        assert says in _refused(path)
    path.write_bytes(b"")
    assert "has 0 bytes" in _refused(path)
    path.unlink()
    assert "No such file" in _refused(path)


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    text = json.dumps({"t": _tensor()}).encode()
    path = _file(tmp_path / "f", text + b" " * (0x280 - len(text)), b"1234")
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(read_header(path).tensors) == ["t"]


def test_huge_announcements_allocate_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert "announce" in _refused(path)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 64 << 20) + b"{")
        file.truncate(200 << 20)
    assert "allowed are" in _refused(path)


def test_limits_are_the_callers(tmp_path: Path) -> None:
    path = _file(tmp_path / "f", {"t": _tensor(0, 4), "u": _tensor(4, 8)}, b"12345678")
    with pytest.raises(InvalidArgument, match="2 tensors, allowed are 1"):
        read_header(path, max_tensors=1)
    with pytest.raises(InvalidArgument, match="allowed are 10"):
        read_header(path, max_header_bytes=10)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F99"]) | _JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=4) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 64), max_size=3) | _JSON,
    }
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(header=st.dictionaries(st.text(max_size=6), _ENTRY | _JSON, max_size=4) | _JSON, data=st.binary(max_size=64))
def test_lies_are_refused_or_harmless(tmp_path: Path, header: Any, data: bytes) -> None:
    path = _file(tmp_path / "lie", json.dumps(header).encode(), data)
    _accepted_is_sound(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 9)
)
def test_damaged_files_are_refused_or_harmless(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    path = tmp_path / "damaged"
    write_safetensors(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.uint8)}, {"k": "v"})
    data = bytearray(path.read_bytes())
    for at, value in flips:
        data[at % len(data)] = value
    path.write_bytes(data[: len(data) - cut])
    _accepted_is_sound(path)


def _accepted_is_sound(path: Path) -> None:
    try:
        file = TensorFile(path)
    except InvalidArgument:
        return
    with file:
        begin = min((each.begin for each in file.header.tensors.values()), default=path.stat().st_size)
        total = sum(file.array(name).nbytes for name in file.header.tensors)
        assert begin + total == path.stat().st_size


def test_equal_input_gives_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    tensors = {f"t{n}": np.full((n, 3), n, np.float32) for n in range(5)} | {"z": np.arange(3, dtype=np.uint8)}
    one = write_safetensors(tmp_path / "one", tensors, {"b": "1", "a": "2"})
    other = write_safetensors(tmp_path / "other", dict(reversed(tensors.items())), {"a": "2", "b": "1"})
    assert one == other
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert struct.unpack("<Q", (tmp_path / "one").read_bytes()[:8])[0] % 8 == 0
    loaded = safetensors.numpy.load_file(tmp_path / "one")
    assert all(np.array_equal(loaded[name], value) for name, value in tensors.items())


def test_a_source_that_gives_too_little_leaves_no_file(tmp_path: Path) -> None:
    short = TensorSource("F32", (3,), lambda: (np.zeros(2, np.float32),))
    with pytest.raises(ValueError, match="gave 8 bytes, announced were 12"):
        write_safetensors(tmp_path / "f", {"t": short})
    assert list(tmp_path.iterdir()) == []


def test_views_outlive_the_file_and_cannot_be_written(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "f", {"t": np.arange(4, dtype=np.float32)})
    with TensorFile(tmp_path / "f") as file:
        array = file.array("t")
    assert array.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("bad", range(5))
def test_the_tensor_that_diverged_is_named(tmp_path: Path, bad: int) -> None:
    tensors: dict[str, Any] = {f"t{n}": np.ones((n + 1, 700), np.float32) for n in range(3)}
    tensors |= {"t3": np.ones(5, np.float16), "n": np.arange(9), "t4": np.ones(3, np.float64)}
    write_safetensors(tmp_path / "good", tensors)
    with TensorFile(tmp_path / "good") as file:
        file.check_finite()
    tensors[f"t{bad}"].reshape(-1)[-1] = np.nan
    write_safetensors(tmp_path / "bad", tensors)
    with (
        TensorFile(tmp_path / "bad") as file,
        pytest.raises(InvalidArgument, match=f"'t{bad}' holds an infinity or NaN"),
    ):
        file.check_finite()


def test_a_misaligned_file_is_checked_too(tmp_path: Path) -> None:
    text = json.dumps({"t": _tensor(0, 8, shape=(2,))}).encode()
    text += b" " * (-len(text) % 8 + 3)
    for value, is_good in ((1.0, True), (float("inf"), False)):
        path = _file(tmp_path / "f", text, struct.pack("<2f", 0.5, value))
        with TensorFile(path) as file:
            assert file.array("t").tolist() == [0.5, value]
            if is_good:
                file.check_finite()
            else:
                with pytest.raises(InvalidArgument, match="'t' holds"):
                    file.check_finite()
