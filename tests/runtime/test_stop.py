"""Stop strings are found wherever the text is cut, and nothing of them is given out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmc.runtime.stop import StopFinder


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    finder = StopFinder(stops)
    written = ""
    for piece in pieces:
        text, stopped = finder.feed(piece)
        written += text
        if stopped:
            return written, True
    return written + finder.flush(), False


def test_a_stop_string_over_three_pieces():
    finder = StopFinder(["<END>"])
    assert finder.feed("one <E") == ("one ", False)
    assert finder.feed("N") == ("", False)
    assert finder.feed("D> two") == ("", True)


def test_what_turned_out_harmless_is_given_out():
    finder = StopFinder(["<END>"])
    assert finder.feed("<EN") == ("", False)
    assert finder.feed("T<") == ("<ENT", False)
    assert finder.flush() == "<"


def test_without_stop_strings_nothing_is_held_back():
    assert StopFinder([]).feed("anything") == ("anything", False)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_any_cut_gives_what_the_whole_text_gives(stops, pieces):
    whole = "".join(pieces)
    # Text cannot be taken back: what counts is the stop string that is complete first.
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    written, stopped = run(stops, pieces)
    assert stopped == bool(ends)
    if ends:
        assert whole.startswith(written)
        assert written in {whole[: whole.find(s)] for s in stops if s in whole}
        assert not any(s in written for s in stops)
    else:
        assert written == whole
    by_character, _ = run(stops, list(whole))
    if ends:
        first_end = min(ends)[0]
        assert by_character == whole[: min(begin for end, begin in ends if end == first_end)]
