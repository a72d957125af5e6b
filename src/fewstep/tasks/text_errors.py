"""Errors that people make when they type, put into clean text: for training and measuring models that correct it.

Words are the pieces between white space. A word is *plain* if it consists of letters, with apostrophes and hyphens
inside it and punctuation around it; only plain words are changed, so that names such as `x86_64` or `os.path`, which
nobody could guess, stay. A word that is left out, or taken for another, is a common one for the same reason.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated

from annotated_types import Ge, Le

from fewstep.errors import FewstepError, suggestion
from fewstep.models.sentences import plain_word
from fewstep.values import Share, check_fields

_PIECES = re.compile(r"\S+")

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")

_SMALL_WORDS = frozenset(
    "a an the of to in on at by for from with as and or but if that which this these it its is are was were be been "
    "has have had do does not no can will would may must should there than then so we you they he she his her their "
    "into about when also only more".split()
)
"""Words of which a reader sees that they are missing, or that another one is meant."""

_CONFUSED = (
    "its it's", "your you're", "their there they're", "then than", "to too", "of off", "were where we're",
    "whose who's", "lose loose", "affect effect", "accept except", "a an", "is are", "was were", "has have",
    "do does", "this these", "quiet quite", "through threw", "weather whether", "by buy",
    "for four", "hear here", "no know", "new knew", "write right", "passed past", "advice advise",
    "principal principle", "complement compliment", "dependent dependant", "separate seperate", "which wich",
    "receive recieve", "occurred occured", "necessary neccessary", "definitely definately", "until untill",
    "beginning begining", "existence existance", "argument arguement", "successful succesful", "the teh",
    "and adn", "because becuase", "different diffrent", "similar similiar", "environment enviroment",
)  # fmt: skip
"""Words that are taken for each other, or are often misspelt."""

PUNCTUATION = ".,;:!?"


@dataclass(frozen=True)
class Edit:
    """`before`, which stands at `start` of the clean text, became `after`."""

    kind: str
    start: int
    before: str
    after: str


@dataclass(frozen=True)
class Mistyped:
    """A text with errors, and what was done to the clean one, in the order of the text; edits never overlap."""

    text: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class _Word:
    """A plain word of a text: `core` with the punctuation before and after it. `next` is the plain word behind it, if
    nothing but a space is between the two.
    """

    start: int
    before: str
    core: str
    after: str
    next: "_Word | None" = None

    @property
    def text(self) -> str:
        return self.before + self.core + self.after

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    def with_core(self, core: str) -> str:
        return self.before + core + self.after


_Change = tuple[int, str, str]
"""Where the clean text is changed, what stands there, and what takes its place."""

_Choices = list[_Change]


# --- the kinds: what each could do to a word -------------------------------------------------------


def _of_core(word: _Word, cores: list[str]) -> _Choices:
    return [(word.start, word.text, word.with_core(core)) for core in cores if core != word.core]


def _neighbouring_key(word: _Word) -> _Choices:
    core = word.core
    return _of_core(
        word,
        [core[:i] + _like(letter, key) + core[i + 1 :] for i, letter in enumerate(core) for key in _neighbours(letter)],
    )


def _transposed_letters(word: _Word) -> _Choices:
    core = word.core
    return _of_core(
        word,
        [
            core[:i] + _like(core[i], core[i + 1]) + _like(core[i + 1], core[i]) + core[i + 2 :]
            for i in range(len(core) - 1)
            if core[i].isalpha() and core[i + 1].isalpha()
        ],
    )


def _lost_letter(word: _Word) -> _Choices:
    core = word.core
    if len(core) < 3:
        return []
    return _of_core(word, [core[:i] + core[i + 1 :] for i, letter in enumerate(core) if letter.isalpha()])


def _doubled_letter(word: _Word) -> _Choices:
    core = word.core
    return _of_core(word, [core[:i] + letter + core[i:] for i, letter in enumerate(core) if letter.isalpha()])


def _lost_word(word: _Word) -> _Choices:
    if word.before or word.after or word.core.lower() not in _SMALL_WORDS or word.next is None:
        return []
    return [(word.start, word.text + " ", "")]


def _doubled_word(word: _Word) -> _Choices:
    return [] if word.before or word.after else [(word.start, word.text, f"{word.text} {word.text}")]


def _swapped_words(word: _Word) -> _Choices:
    other = word.next
    if other is None or word.before or word.after or other.before or other.after or word.core == other.core:
        return []
    return [(word.start, f"{word.core} {other.core}", f"{other.core} {word.core}")]


def _joined_words(word: _Word) -> _Choices:
    if word.next is None or word.after:
        return []
    return [(word.start, word.text + " ", word.text)]


def _split_word(word: _Word) -> _Choices:
    core = word.core
    return _of_core(word, [f"{core[:i]} {core[i:]}" for i in range(1, len(core)) if core.isalpha() and len(core) > 3])


def _wrong_case(word: _Word) -> _Choices:
    core = word.core
    if not (core.islower() or core.istitle()):
        return []
    return _of_core(word, [core[0].swapcase() + core[1:]])


def _lost_punctuation(word: _Word) -> _Choices:
    inside = [word.with_core(word.core.replace(mark, "")) for mark in "'’-" if mark in word.core]
    outside = [word.before + word.core + word.after[:i] + word.after[i + 1 :] for i in range(len(word.after))]
    return [(word.start, word.text, after) for after in [*inside, *outside]]


def _wrong_punctuation(word: _Word) -> _Choices:
    if not word.after:
        return [] if word.next is None else [(word.start, word.text, word.text + ",")]
    return [
        (word.start, word.text, word.before + word.core + word.after[:i] + mark + word.after[i + 1 :])
        for i, old in enumerate(word.after)
        for mark in PUNCTUATION
        if old in PUNCTUATION and mark != old
    ]


def _confused_word(word: _Word) -> _Choices:
    return _of_core(word, [_like(word.core, other) for other in _confusions().get(word.core.lower(), ())])


KINDS: dict[str, Callable[[_Word], _Choices]] = {
    "neighbouring_key": _neighbouring_key,
    "transposed_letters": _transposed_letters,
    "lost_letter": _lost_letter,
    "doubled_letter": _doubled_letter,
    "lost_word": _lost_word,
    "doubled_word": _doubled_word,
    "swapped_words": _swapped_words,
    "joined_words": _joined_words,
    "split_word": _split_word,
    "wrong_case": _wrong_case,
    "lost_punctuation": _lost_punctuation,
    "wrong_punctuation": _wrong_punctuation,
    "confused_word": _confused_word,
}
"""Name -> the changes of this kind that a word allows, none if there is none."""

WEIGHTS = {
    "neighbouring_key": 3.0,
    "transposed_letters": 3.0,
    "lost_letter": 3.0,
    "doubled_letter": 2.0,
    "lost_word": 3.0,
    "doubled_word": 1.0,
    "swapped_words": 1.0,
    "joined_words": 1.0,
    "split_word": 1.0,
    "wrong_case": 2.0,
    "lost_punctuation": 4.0,
    "wrong_punctuation": 1.0,
    "confused_word": 6.0,
}
"""How often a kind is chosen, relative to the others that the word allows too."""


@dataclass(frozen=True, kw_only=True)
class TextErrors:
    """How many errors texts get, and of which kinds.

    A share `untouched` of the texts has none. Of each other text a rate is drawn, evenly from 0 to twice `rate`, and
    each of its plain words has an error with that probability. So a text of n plain words has (1 - untouched) * rate *
    n errors on average, but for a word that was swapped with the one before it, which has no error of its own.
    `weights`: how often each of `KINDS` is chosen; a kind that is not named has that of `WEIGHTS`. FewstepError for an
    unknown kind.
    """

    untouched: Annotated[Share, "Share of the texts without an error."] = 0.15
    rate: Annotated[float, Ge(0), Le(0.5), "Errors for each plain word, on average over the texts that have some."] = (
        0.12
    )
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for kind, weight in self.weights:
            if kind not in KINDS:
                raise FewstepError(f"weights: {kind!r} is no kind of error; {suggestion(kind, KINDS)}")
            if not 0 <= weight <= 1e6:
                raise FewstepError(f"weights: that of {kind} must lie between 0 and 1e6, got {weight}")

    def mistype(self, text: str, seed: int) -> Mistyped:
        """The text with errors: a function of the text and the seed alone.

        A text without a plain word, or whose rate is drawn as 0, comes back as it is.
        """
        # Seeded by text, random hashes it by SHA-512: the same on all machines, and other texts have other errors.
        rng = random.Random(f"{seed} {text}")
        if rng.random() < self.untouched:
            return Mistyped(text, ())
        rate = rng.uniform(0, 2 * self.rate)
        weights = WEIGHTS | dict(self.weights)
        edits: list[Edit] = []
        reached = 0
        for word in _plain_words(text):
            if rng.random() < rate and word.start >= reached and (edit := _drawn_edit(word, weights, rng)) is not None:
                edits.append(edit)
                reached = edit.start + len(edit.before)
        return Mistyped(_with_edits(text, edits), tuple(edits))

    def rows(self, texts: Iterable[str], seed: int) -> list[dict[str, str]]:
        """Rows to train on: each text with errors as the prompt, and as it was as the completion."""
        return [{"prompt": self.mistype(text, seed).text, "completion": text} for text in texts]


def _drawn_edit(word: _Word, weights: dict[str, float], rng: random.Random) -> Edit | None:
    """An edit of a kind that the word allows; None if it allows none that has a weight."""
    allowed = {kind: changes for kind, of_kind in KINDS.items() if weights[kind] and (changes := of_kind(word))}
    if not allowed:
        return None
    kind = rng.choices(list(allowed), [weights[kind] for kind in allowed])[0]
    return Edit(kind, *rng.choice(allowed[kind]))


def _with_edits(text: str, edits: list[Edit]) -> str:
    parts, reached = [], 0
    for edit in edits:
        parts += [text[reached : edit.start], edit.after]
        reached = edit.start + len(edit.before)
    return "".join([*parts, text[reached:]])


def _plain_words(text: str) -> Iterator[_Word]:
    """In order, each with the plain word that follows it behind one space."""
    following: _Word | None = None
    found: list[_Word] = []
    for piece in reversed(list(_PIECES.finditer(text))):
        match = plain_word(piece[0])
        if match is None:
            following = None
            continue
        adjacent = following is not None and text[piece.end() : following.start] == " "
        following = _Word(
            piece.start(), match["before"], match["core"], match["after"], following if adjacent else None
        )
        found.append(following)
    return reversed(found)


@cache
def _neighbours(letter: str) -> str:
    """The letters whose keys are beside that of this one; none for what is not a to z."""
    for row, keys in enumerate(_ROWS):
        column = keys.find(letter.lower())
        if column < 0:
            continue
        # Each row stands half a key further to the right than the one above it.
        places = [(row, column - 1), (row, column + 1), (row - 1, column), (row - 1, column + 1), (row + 1, column - 1),
                  (row + 1, column)]  # fmt: skip
        return "".join(_ROWS[r][c] for r, c in places if 0 <= r < len(_ROWS) and 0 <= c < len(_ROWS[r]))
    return ""


@cache
def _confusions() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for group in map(str.split, _CONFUSED):
        for word in group:
            found[word] = (*found.get(word, ()), *(other for other in group if other != word))
    return found


def _like(letter: str, text: str) -> str:
    """The text with a capital at its beginning if the first letter of the other is one."""
    return text[:1].upper() + text[1:] if letter[:1].isupper() else text[:1].lower() + text[1:]
