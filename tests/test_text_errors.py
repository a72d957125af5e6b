"""Typing errors: where they may be, how many there are, and that nothing but the text and the seed decides."""

from collections import Counter

import pytest

from fewstep.errors import FewstepError
from fewstep.tasks.text_errors import KINDS, TextErrors

TEXT = (
    "When the first snow falls in the mountains, its weight isn't much of a danger to the houses. "
    "There are well-known reasons for that: roofs (even old ones) were built by people who knew the weather!"
)
ALWAYS = TextErrors(untouched=0, rate=0.5)


def only(kind: str) -> TextErrors:
    return TextErrors(untouched=0, rate=0.5, weights=tuple((other, float(other == kind)) for other in KINDS))


def texts_of(kind: str, text: str, count: int = 200) -> set[str]:
    return {only(kind).mistype(text, seed).text for seed in range(count)}


def test_a_rate_of_zero_and_an_untouched_text_are_the_identity() -> None:
    for errors in (TextErrors(rate=0, untouched=0), TextErrors(untouched=1)):
        for seed in range(20):
            mistyped = errors.mistype(TEXT, seed)
            assert (mistyped.text, mistyped.edits) == (TEXT, ())


def test_the_same_seed_gives_the_same_text_and_another_seed_another_one() -> None:
    assert ALWAYS.mistype(TEXT, 5) == ALWAYS.mistype(TEXT, 5)
    assert len({ALWAYS.mistype(TEXT, seed).text for seed in range(20)}) > 15


def test_a_text_is_mistyped_in_the_same_way_on_every_machine() -> None:
    mistyped = TextErrors(untouched=0).mistype("The quick brown fox jumps over the lazy dog.", 3)
    assert mistyped.text == "The quick brown fox jumps over the laz dob."


def test_every_kind_occurs_and_its_edits_lead_back_to_the_clean_text() -> None:
    found: Counter[str] = Counter()
    for seed in range(300):
        mistyped = ALWAYS.mistype(TEXT, seed)
        found.update(edit.kind for edit in mistyped.edits)
        text, shift = mistyped.text, 0
        for edit in mistyped.edits:
            at = edit.start + shift
            assert edit.before != edit.after
            assert TEXT[edit.start : edit.start + len(edit.before)] == edit.before
            assert text[at : at + len(edit.after)] == edit.after
            shift += len(edit.after) - len(edit.before)
        for edit in reversed(mistyped.edits):
            shift -= len(edit.after) - len(edit.before)
            at = edit.start + shift
            text = text[:at] + edit.before + text[at + len(edit.after) :]
        assert text == TEXT
    assert set(found) == set(KINDS)


def test_a_text_of_n_words_has_as_many_errors_as_promised() -> None:
    errors = TextErrors(untouched=0.2, rate=0.1, weights=(("swapped_words", 0.0),))
    counts = [len(errors.mistype(TEXT, seed).edits) for seed in range(2_000)]
    expected = 0.8 * 0.1 * len(TEXT.split())
    assert sum(counts) / len(counts) == pytest.approx(expected, rel=0.08)
    assert 0.2 < counts.count(0) / len(counts) < 0.4  # those drawn as untouched, and those with a small rate


def test_what_each_kind_does() -> None:
    assert texts_of("neighbouring_key", "At") == {"Qt", "Wt", "St", "Zt", "Ar", "Ay", "Af", "Ag", "At"}
    assert texts_of("transposed_letters", "The") == {"The", "Hte", "Teh"}
    assert texts_of("lost_letter", "cats,") == {"cats,", "ats,", "cts,", "cas,", "cat,"}
    assert texts_of("lost_letter", "at") == {"at"}
    assert texts_of("doubled_letter", "Cat") == {"Cat", "CCat", "Caat", "Catt"}
    assert texts_of("lost_word", "the snow of May") == {"the snow of May", "snow of May", "the snow May", "snow May"}
    assert texts_of("doubled_word", "so it") == {"so it", "so so it", "so it it", "so so it it"}
    assert texts_of("swapped_words", "one two, three") == {"one two, three"}
    assert texts_of("swapped_words", "one two") == {"one two", "two one"}
    assert texts_of("joined_words", "one two") == {"one two", "onetwo"}
    assert texts_of("split_word", "(ends)") == {"(ends)", "(e nds)", "(en ds)", "(end s)"}
    assert texts_of("wrong_case", "It") == {"It", "it"}
    assert texts_of("lost_punctuation", "don't.") == {"don't.", "dont.", "don't"}
    assert texts_of("wrong_punctuation", "so") == {"so"}
    assert texts_of("wrong_punctuation", "it so") == {"it so", "it, so"}
    assert texts_of("wrong_punctuation", "so,") == {"so" + mark for mark in ",.;:!?"}
    assert texts_of("confused_word", "There") == {"There", "Their", "They're"}


def test_words_that_nobody_could_guess_and_white_space_stay() -> None:
    text = "  x86_64\tos.path  v1.2 -> a@b.org,\n\n=== 42 "
    assert all(ALWAYS.mistype(text, seed).text == text for seed in range(50))
    for seed in range(50):
        assert ALWAYS.mistype("a\n\nb", seed).text.count("\n\n") == 1


def test_texts_of_any_script_and_none_are_taken() -> None:
    for text in ("", " ", "\n", "漢字 是 字", "Größe ist alles", "🙂 !", "ﬁ ß"):
        for seed in range(30):
            ALWAYS.mistype(text, seed)


def test_settings_out_of_range_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(FewstepError, match="'lost_leter' is no kind of error; did you mean 'lost_letter'"):
        TextErrors(weights=(("lost_leter", 1.0),))
    with pytest.raises(FewstepError, match="rate must"):
        TextErrors(rate=0.7)
    with pytest.raises(FewstepError, match="that of lost_word must lie"):
        TextErrors(weights=(("lost_word", -1.0),))
