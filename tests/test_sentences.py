"""Texts as sentences: nothing is lost, markup is not touched, and line breaks stay where they are."""

import random

import pytest

from fewstep.models.sentences import Sentence, plain_word, sentence_ends, split_sentences, straight_quotes

DOCUMENT = """---
title: A title. Another.
---
# A heading. It stays.

Some text that is
wrapped. It goes on, as Mr. Smith says, e.g. here.  The end!

A title
=======

- An item of a list
  that goes on. And more.
1. A first one
> Quoted text
> goes on. Fine.

    code here. More = 1

```py
x = 1. Foo
```
| a cell. | Another. |
.. note:: A directive. It stays.
<p>HTML. It stays.</p>
>>> doctest. No
[link]: https://example.org/A.B
Last line without an end"""


def sentences(text: str) -> list[Sentence]:
    return [piece for piece in split_sentences(text) if isinstance(piece, Sentence)]


def test_prose_is_found_and_markup_is_left() -> None:
    assert [(one.line, one.text) for one in sentences(DOCUMENT)] == [
        (6, "Some text that is wrapped."),
        (7, "It goes on, as Mr. Smith says, e.g. here."),
        (7, "The end!"),
        (12, "An item of a list that goes on."),
        (13, "And more."),
        (14, "A first one"),
        (15, "Quoted text goes on."),
        (16, "Fine."),
        (28, "Last line without an end"),
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_the_pieces_of_a_document_are_the_document(ending: str) -> None:
    text = DOCUMENT.replace("\n", ending)
    assert "".join(map(str, split_sentences(text))) == text


def test_the_pieces_of_any_text_are_the_text_and_the_same_words_change_nothing() -> None:
    rng = random.Random(0)
    parts = 'a B . ! - > # | ``` ~~~ --- 1. \n \r\n \t \x0c \u2028 \ufeff é e.g. . .. ( " == <b> >>> 漢。'.split(" ")
    for _ in range(3_000):
        text = "".join(rng.choice([*parts, " ", "\n", "\n\n"]) for _ in range(rng.randint(0, 25)))
        pieces = split_sentences(text)
        assert "".join(map(str, pieces)) == text
        for piece in pieces:
            if isinstance(piece, Sentence):
                assert str(piece.with_words(piece.words)) == str(piece)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("It works. So it does.", 2),
        ('He said "No." Then he left.', 2),
        ("It cost 3.5 dollars. Fine.", 2),
        ("See Fig. 3 and Dr. Who.", 1),
        ("J. Smith wrote it, i.e. he did.", 1),
        ("So do I. He does too.", 2),
        ("What?! (Nothing.) *Really?* Yes", 4),
        ("no capital. so no end", 1),
        ("", 0),
    ],
)
def test_where_sentences_end(text: str, count: int) -> None:
    assert len(sentence_ends(text.split())) == count


@pytest.mark.parametrize(
    ("text", "words", "result"),
    [
        ("the\nthe cat\nsat on on\nthe mat.\n", "The cat sat on the mat.", "The\ncat\nsat on\nthe mat.\n"),
        ("> a big\n> dog ran\n", "A big dog ran", "> A big\n> dog ran\n"),
        ("one  two\nthree four", "one two new three four", "one  two\nnew three four"),
        ("in the\nhouse now", "inthe house now", "inthe\nhouse now"),
        ("one two\nthree", "zero one two three", "zero one two\nthree"),
        ("one two", "", ""),
    ],
)
def test_other_words_keep_the_line_breaks(text: str, words: str, result: str) -> None:
    pieces = split_sentences(text)
    changed = [piece.with_words(words.split()) if isinstance(piece, Sentence) else piece for piece in pieces]
    assert "".join(map(str, changed)) == result


def test_plain_words() -> None:
    for piece in ("cat", "(cats,", "isn't", "well-known!", '"Größe"'):
        assert plain_word(piece)
    for piece in ("42", "x86_64", "os.path", "a@b.org", "--", "`code`", "foo()x", ""):
        assert not plain_word(piece)
    assert straight_quotes("“don’t”") == '"don\'t"'
