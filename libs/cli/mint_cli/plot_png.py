"""Curves as a picture; works without a display."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mint_cli.curves import Curve
from mint_core.errors import FailedPrecondition, InvalidArgument
from mint_core.files import atomic_file

# A window system that the environment names may not be there; a file needs none.
os.environ["MPLBACKEND"] = "agg"
try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise FailedPrecondition(
        f"a PNG needs matplotlib, which cannot be imported ({error}): pip install 'mint-lora[plot]'; without --png the "
        "curves are drawn in the terminal"
    ) from error

__all__ = ["write_png"]

_WIDTH_INCHES = 8.0
_HEIGHT_INCHES = 2.6
"""Of one curve."""
_DOTS_PER_INCH = 150


def write_png(curves: Sequence[Curve], path: Path, *, title: str) -> None:
    """Draw the curves below one another over a shared axis of steps, and write them to ``path``, whole or not at all.

    Raises :class:`InvalidArgument` if the file cannot be written.
    """
    # A figure of its own, drawn by Agg: nothing here asks for a display or leaves state behind in the process.
    figure = Figure(
        figsize=(_WIDTH_INCHES, 0.6 + _HEIGHT_INCHES * len(curves)), dpi=_DOTS_PER_INCH, layout="constrained"
    )
    figure.suptitle(title)
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for curve, axes in zip(curves, panels, strict=True):
        if curve.window:
            axes.plot(curve.steps, curve.values, ".", color="0.6", label="every step")
            axes.plot(curve.steps, curve.running_mean, color="C0", label=f"mean of the last {curve.window}")
            axes.legend(loc="best")
        else:
            axes.plot(curve.steps, curve.values, "o-", color="C0", markersize=4)
        axes.set_ylabel(curve.label)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    try:
        with atomic_file(path) as file:
            figure.savefig(file, format="png")
    except OSError as error:
        raise InvalidArgument(f"png is {str(path)!r}: cannot be written: {error.strerror}", field="png") from error
