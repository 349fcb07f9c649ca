"""Curves of a run, as text and as a picture."""

from __future__ import annotations

import math
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mint_api.v1 import run_service_pb2
from mint_cli.curves import Curve, curves_of
from mint_cli.plot_png import write_png
from mint_cli.plot_terminal import drawing
from mint_core.errors import FailedPrecondition, InvalidArgument

BRAILLE = range(0x2800, 0x2900)


def steps_of(losses: Sequence[float], **metrics: Sequence[float]) -> list[run_service_pb2.RunStep]:
    return [
        run_service_pb2.RunStep(step=i + 1, loss=loss, metrics={name: values[i] for name, values in metrics.items()})
        for i, loss in enumerate(losses)
    ]


def frame(text: str) -> list[str]:
    """The rows of dots."""
    return [re.split("[┤│]", line)[1] for line in text.splitlines() if re.search("[┤│]", line)]


# Curves


def test_loss_and_reward_are_drawn_unless_others_are_named() -> None:
    both = steps_of([2.0, 1.0], reward_mean=[0.1, 0.2], step_ms=[5.0, 6.0])
    assert [curve.metric for curve in curves_of("a/r", both)] == ["loss", "reward_mean"]
    assert [curve.metric for curve in curves_of("a/r", steps_of([2.0, 1.0]))] == ["loss"]
    assert curves_of("a/r", both, ["step_ms", "step_ms"]) == [Curve("step_ms", (1, 2), (5.0, 6.0))]
    with pytest.raises(
        InvalidArgument,
        match="metric is 'x': no step of run a/r has a number for it; there are loss, reward_mean, step_ms",
    ):
        curves_of("a/r", both, ["x"])
    with pytest.raises(FailedPrecondition, match="run a/r has no figures of steps yet"):
        curves_of("a/r", [])


def test_what_is_no_number_is_left_out() -> None:
    (curve,) = curves_of("a/r", steps_of([1.0, math.nan, 3.0, math.inf]))
    assert (curve.steps, curve.values) == ((1, 3), (1.0, 3.0))
    some = steps_of([1.0, 2.0, 3.0])
    some[1].metrics["load_ms"] = 7.0
    assert curves_of("a/r", some, ["load_ms"]) == [Curve("load_ms", (2,), (7.0,))]


def test_labels_say_the_unit() -> None:
    labels = {name: Curve(name, (1,), (0.0,)).label for name in ("entropy", "first_token_ms", "grad_norm", "loss")}
    assert labels == {
        "entropy": "entropy (nats per token)",
        "first_token_ms": "first token (ms)",
        "grad_norm": "grad norm",
        "loss": "loss per token",
    }


def test_many_points_have_a_running_mean_and_few_have_none() -> None:
    few = Curve("loss", tuple(range(20)), tuple(map(float, range(20))))
    assert (few.window, few.running_mean) == (0, ())
    many = Curve("loss", tuple(range(100)), tuple(map(float, range(100))))
    assert many.window == 10
    # Of the numbers up to n the last ten have the mean n - 4.5; before that all there are have the mean n / 2.
    assert many.running_mean == tuple(n / 2 if n < 10 else n - 4.5 for n in range(100))


# Terminal


def test_a_rising_line_goes_from_corner_to_corner() -> None:
    text = drawing(Curve("reward_mean", (1, 2, 3), (0.0, 0.5, 1.0)), num_columns=52, colors=False)
    rows = frame(text)
    assert len(rows) == 10
    assert {len(row) for row in rows} == {40}
    assert all(ord(dot) in BRAILLE for row in rows for dot in row)
    first = [next(i for i, dot in enumerate(row) if dot != "⠀") for row in rows]
    assert first == sorted(first, reverse=True)
    assert rows[-1][0] != "⠀"
    assert rows[0][-1] != "⠀"
    lines = text.splitlines()
    assert lines[0] == "mean reward"
    assert [line.split()[0] for line in lines if "┤" in line] == ["1.0", "0.5", "0.0"]
    assert lines[-1].split() == ["step", "1", "2", "3"]


def test_many_steps_are_dots_under_their_mean() -> None:
    curve = Curve("loss", tuple(range(1, 201)), tuple(float(i % 2) for i in range(200)))
    lines = drawing(curve, num_columns=72, colors=False).splitlines()
    assert re.fullmatch(r"loss per token +dots: every step, line: mean of the last 20", lines[0])
    assert len(lines[0]) == 72
    # Right of where the window has filled: dots at 0 and at 1, between them the mean at one half, and nothing else.
    drawn = [i for i, row in enumerate(frame("\n".join(lines))) if row[10:].strip("⠀")]
    assert drawn in ([0, 4, 9], [0, 5, 9])
    assert lines[-1].split() == ["step", "50", "100", "150", "200"]


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-9, 5e12])
def test_a_single_value_is_drawn_in_the_middle(value: float) -> None:
    rows = frame(drawing(Curve("loss", (4,), (value,)), num_columns=60, colors=False))
    drawn = [i for i, row in enumerate(rows) if row.strip("⠀")]
    assert drawn in ([4], [5])


@pytest.mark.parametrize("num_columns", [1, 33, 60, 100])
@pytest.mark.parametrize("high", [1e-7, 0.003, 0.99, 1.0, 7.0, 123456.0, 3e9])
def test_every_value_fits_and_labels_are_apart(num_columns: int, high: float) -> None:
    curve = Curve("loss", (1, 7, 8), (-high, high / 3, high))
    lines = drawing(curve, num_columns=num_columns, colors=False).splitlines()
    rows = frame("\n".join(lines))
    assert rows[0].strip("⠀")
    assert rows[-1].strip("⠀")
    assert max(map(len, lines)) <= max(num_columns, 32) + len("8")
    labels = [line.split()[0] for line in lines if "┤" in line]
    assert 2 <= len(labels) == len(set(labels))
    assert [float(label) for label in labels] == sorted(map(float, labels), reverse=True)


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    curve = Curve("loss", (1, 2), (1.0, 2.0))
    assert "\x1b[" in drawing(curve, num_columns=60, colors=True)
    assert "\x1b[" not in drawing(curve, num_columns=60, colors=False)


# PNG


def test_a_picture_has_a_panel_for_each_curve(tmp_path: Path) -> None:
    curves = curves_of("a/r", steps_of([1.0 / n for n in range(1, 41)], reward_mean=[n / 40 for n in range(40)]))
    sizes = {}
    for num_curves in (1, 2):
        path = tmp_path / f"{num_curves}.png"
        write_png(curves[:num_curves], path, title="acme/tone, grpo run acme/r")
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert data[-8:-4] == b"IEND"
        assert len(data) > 10_000
        sizes[num_curves] = struct.unpack(">II", data[16:24])
    assert sizes == {1: (1200, 480), 2: (1200, 870)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png"]


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    curves = curves_of("a/r", steps_of([1.0, 2.0]))
    with pytest.raises(InvalidArgument, match=r"r\.png': cannot be written: No such file or directory"):
        write_png(curves, tmp_path / "absent" / "r.png", title="")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "mint_cli.plot_png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'mint-lora\[plot\]'"):
        import mint_cli.plot_png  # noqa: F401
