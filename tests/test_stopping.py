"""Stop strings: however the text is cut, the result is that of searching the whole text."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memjax.generate.stopping import StopStrings


def run(strings, pieces):
    """What came out of each feed, what came out of the flush, and the matcher."""
    matcher = StopStrings(tuple(strings)).matcher()
    fed = [matcher.feed(piece) for piece in pieces]
    return fed, matcher.flush(), matcher


def earliest(text, strings):
    """Where the first stop string begins, or None."""
    return min((text.find(s) for s in strings if s in text), default=None)


def unfinished(text, strings):
    """Where the longest suffix begins that more text could make a stop string; the length of the text if none."""
    return next(i for i in range(len(text) + 1) if i == len(text) or any(s[:-1].startswith(text[i:]) for s in strings))


# Two letters, so that matches, overlaps and near misses are common.
stop_strings = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)
pieces_of_text = st.lists(st.text("abc", max_size=6), max_size=12)


@settings(max_examples=600, deadline=None)
@given(stop_strings, pieces_of_text)
@example(["abcb", "bc"], ["ab", "c"])
@example(["aab"], ["aa", "ab"])
def test_any_cut_gives_what_a_search_of_the_whole_text_gives(strings, pieces):
    fed, rest, matcher = run(strings, pieces)
    text = "".join(pieces)
    at = earliest(text, strings)
    assert "".join(out for out, _ in fed) + rest == text[:at]
    assert matcher.stopped == (at is not None)


@settings(max_examples=600, deadline=None)
@given(stop_strings, pieces_of_text)
def test_text_comes_out_and_the_stop_is_told_as_early_as_is_right(strings, pieces):
    fed, _, _ = run(strings, pieces)
    text, shown, was_stopped = "", "", False
    for piece, (out, stopped) in zip(pieces, fed, strict=True):
        text, shown = text + piece, shown + out
        at, safe = earliest(text, strings), unfinished(text, strings)
        decided = was_stopped or (at is not None and at <= safe)
        assert stopped == decided
        assert shown == (text[:at] if decided else text[:safe])
        was_stopped = stopped


@settings(max_examples=100, deadline=None)
@given(stop_strings, st.text("abc", max_size=30))
def test_one_character_at_a_time_equals_all_at_once(strings, text):
    outcomes = []
    for pieces in (list(text), [text]):
        fed, rest, matcher = run(strings, pieces)
        outcomes.append(("".join(out for out, _ in fed) + rest, matcher.stopped))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("strings", "pieces", "fed", "rest", "stopped"),
    [
        pytest.param(["</s>"], ["a<", "/", "s", "> b"], [("a", 0), ("", 0), ("", 0), ("", 1)], "", True, id="spans"),
        pytest.param(["</s>"], ["a<", "/", "t"], [("a", 0), ("", 0), ("</t", 0)], "", False, id="near-miss"),
        pytest.param(["aab"], ["a", "a", "a", "b"], [("", 0), ("", 0), ("a", 0), ("", 1)], "", True, id="shifted"),
        pytest.param(["bc", "abcd"], ["xabc", "d"], [("x", 0), ("", 1)], "", True, id="earlier-and-longer"),
        pytest.param(["bc", "abcd"], ["xabc", "e"], [("x", 0), ("a", 1)], "", True, id="shorter-inside"),
        pytest.param(["bc", "abcd"], ["xabc"], [("x", 0)], "a", True, id="shorter-inside-at-the-end"),
        pytest.param(["ab", "abc"], ["xab", "c"], [("x", 1), ("", 1)], "", True, id="tie"),
        pytest.param(["\n\n"], ["a\n", "b\n", "\nc"], [("a", 0), ("\nb", 0), ("", 1)], "", True, id="newlines"),
        pytest.param(["é終"], ["né", "終"], [("n", 0), ("", 1)], "", True, id="unicode"),
        pytest.param(["END"], ["the EN"], [("the ", 0)], "EN", False, id="held-at-the-end"),
        pytest.param(["END"], ["", "END", "more"], [("", 0), ("", 1), ("", 1)], "", True, id="nothing-after"),
        pytest.param([], ["ab", ""], [("ab", 0), ("", 0)], "", False, id="no-strings"),
        pytest.param(["a"], [], [], "", False, id="no-text"),
    ],
)
def test_cases(strings, pieces, fed, rest, stopped):
    got, got_rest, matcher = run(strings, pieces)
    assert got == [(text, bool(flag)) for text, flag in fed]
    assert (got_rest, matcher.stopped) == (rest, stopped)


def test_matchers_do_not_share_state():
    stops = StopStrings(("END",))
    first, second = stops.matcher(), stops.matcher()
    assert first.feed("EN") == ("", False)
    assert second.feed("D") == ("D", False)
    assert first.feed("D") == ("", True)
    assert second.stopped is False


def test_stop_strings_are_values():
    assert StopStrings(["a", "b"]) == StopStrings(("a", "b"))
    assert hash(StopStrings(["a"])) == hash(StopStrings(("a",)))


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        (("",), "non-empty string, got ''"),
        (("ok", ""), "non-empty string, got ''"),
        (("ok", 3), "non-empty string, got 3"),
        ((b"END",), "non-empty string, got b'END'"),
        ("END", "wrap it in a tuple"),
        (b"END", "wrap it in a tuple"),
        (None, "sequence of strings, got None"),
        (7, "sequence of strings, got 7"),
    ],
)
def test_bad_stop_strings(strings, message):
    with pytest.raises(ValueError, match=message):
        StopStrings(strings)
