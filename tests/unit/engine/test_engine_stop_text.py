"""Stop texts that arrive in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine.stop_text import StopTextFilter


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], str]:
    stop_filter = StopTextFilter(stops)
    streamed = [stop_filter.feed(piece) for piece in pieces]
    return streamed, "".join(streamed) + stop_filter.close()


@pytest.mark.parametrize(
    ("pieces", "stops", "streamed", "whole"),
    [
        (["a", "b"], [], ["a", "b"], "ab"),
        (["Hello EN", "D and more"], ["END"], ["Hello ", ""], "Hello "),
        (["aa", "ab"], ["ab"], ["a", "a"], "aa"),
        (["x E", "N", "T"], ["END"], ["x ", "", "ENT"], "x ENT"),
        (["x E", "N"], ["END"], ["x ", ""], "x EN"),
        (["one two"], ["two", "one"], [""], ""),
        (["abc", "d"], ["", "cd"], ["ab", ""], "ab"),
        (["stop", "stop"], ["stop"], ["", ""], ""),
    ],
)
def test_examples(pieces: list[str], stops: list[str], streamed: list[str], whole: str) -> None:
    assert run(pieces, stops) == (streamed, whole)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_result_is_the_text_before_the_first_stop_and_pieces_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    streamed, whole = run(pieces, stops)
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not ends:
        assert whole == text
    else:
        # Piecewise, the stop that is complete first wins; a longer one that begins earlier may still be incomplete.
        assert text.startswith(whole)
        assert not any(stop in whole for stop in stops)
        assert len(whole) >= min(ends)
    assert whole.startswith("".join(streamed))
