"""Text as sentences with what stands between them, so that each can be replaced and nothing else is touched.

What is no prose stays as it is: code, tables, headings, rulers, directives, HTML, link targets and blank lines of
Markdown, reStructuredText and plain text, and the marks at the beginning of quoted lines and list items.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

_ABBREVIATIONS = frozenset(
    "e.g i.e cf vs mr mrs ms dr prof st mt no nos vol pp p fig figs eq sec ch approx dept inc ltd co corp jr sr al "
    "ca resp esp incl viz gen col capt lt rev hon messrs".split()
)
"""Words whose full stop ends no sentence, without it."""

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]*_`]*$|[。！？]$")
_INITIAL = re.compile(r"[\"'(\[“‘]*(?!I\.)[A-Z]\.$")
_OPENING = "\"'“‘([*_`"

_PLAIN_WORD = re.compile(r"(?P<before>[\"'(\[“‘]*)(?P<core>[^\W\d_]+(?:['’-][^\W\d_]+)*)(?P<after>[\"')\].,;:!?”’]*)")
_CURLY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})

_FENCE = re.compile(r"[ \t]*(```+|~~~+)")
_MARKUP = re.compile(
    r"[ \t]*(?:\||\.\.(?:[ \t]|$)|</?[A-Za-z!?]|\[[^\]]+\]:|#{1,6}[ \t]|#!|>>>|\$[ \t]|\\[A-Za-z@]|:[\w-]+:|---$|@\w+)"
)
"""Beginnings of lines that are no prose: tables, directives, HTML, link targets, headings, prompts, LaTeX, fields."""
_PREFIX = re.compile(
    r"[ \t\ufeff]*(?:>[ \t]?)*[ \t]*(?P<item>(?:[-*+•][ \t]+|\(?\d{1,3}[.)][ \t]+)(?:\[[ xX]\][ \t]+)?)?"
)
_WORD = re.compile(r"\S+")
_UNDERLINE = re.compile(r"[ \t]*([=\-~^\"'#*+])\1{2,}[ \t]*$")


@dataclass(frozen=True)
class Sentence:
    """The words of one sentence; `gaps[i]` stands behind `words[i]`: white space, and the marks of a new line.

    `line`: that of its first word, from 1. `is_fragment`: it stands alone and has no full stop or other end, as titles
    and items of lists do.
    """

    words: tuple[str, ...]
    gaps: tuple[str, ...]
    line: int = 1
    is_fragment: bool = False

    @property
    def text(self) -> str:
        """With one space between words, and nothing behind the last."""
        return " ".join(self.words)

    def __str__(self) -> str:
        return "".join(word + gap for word, gap in zip(self.words, self.gaps, strict=True))

    def with_words(self, words: Sequence[str]) -> "Sentence":
        """Other words, between which stands what stood there in this sentence; new words have a space between.

        A line break stays where it was, or moves to the next place that is left if the words around it are gone. No
        words: what stood behind the last stays.
        """
        if not words:
            return replace(self, words=(), gaps=())
        places = _places(self.words, words)
        gaps = []
        for here, there in pairwise(places):
            between = self.gaps[here:there]
            gaps.append(next((gap for gap in between if gap != " "), " "))
        return replace(self, words=tuple(words), gaps=(*gaps, self.gaps[-1]))


def _places(before: Sequence[str], after: Sequence[str]) -> list[int]:
    """For each word after a change the word before it that stood in its place, in rising order."""
    places: list[int] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for _, first, last, start, end in matcher.get_opcodes():
        places += [first + min(i, max(last - first - 1, 0)) for i in range(end - start)]
    return places


def plain_word(piece: str) -> re.Match[str] | None:
    """A word of letters, with apostrophes and hyphens inside it: its parts `before`, `core` and `after`, of which the
    first and the last are punctuation. None for any other piece of text, such as a number, a path or a name in code.
    """
    return _PLAIN_WORD.fullmatch(piece)


def straight_quotes(text: str) -> str:
    """With straight quotes in place of curly ones; every character keeps its place."""
    return text.translate(_CURLY)


Piece = str | Sentence
"""A sentence, or what stands between sentences."""


def split_sentences(text: str) -> list[Piece]:
    """The sentences of a text and what stands between them, in order: `"".join(map(str, pieces)) == text`."""
    pieces: list[Piece] = []
    for block in _blocks(text):
        if isinstance(block, str):
            pieces.append(block)
        else:
            pieces += _sentences(*block)
    return pieces


def sentence_ends(words: Sequence[str]) -> list[int]:
    """How many words there are up to the end of each sentence; the last is their number."""
    ends = [i + 1 for i, (word, following) in enumerate(pairwise(words)) if _ends(word, following)]
    return [*ends, len(words)] if words else []


def _ends(word: str, following: str) -> bool:
    if not _SENTENCE_END.search(word) or _INITIAL.fullmatch(word):
        return False
    if word.rstrip(".").lstrip("\"'([“‘").lower() in _ABBREVIATIONS and word.endswith("."):
        return False
    return not following.lstrip(_OPENING)[:1].islower()


_Lines = list[tuple[str, str, str]]
"""Of a paragraph: marks at the beginning, text, white space at the end with the line break."""


def _sentences(lines: _Lines, number: int) -> Iterator[Piece]:
    yield lines[0][0]
    words: list[str] = []
    gaps: list[str] = []
    numbers: list[int] = []
    for i, (_, body, ending) in enumerate(lines):
        found = list(_WORD.finditer(body))
        words += [word[0] for word in found]
        numbers += [number + i] * len(found)
        gaps += [body[word.end() : following.start()] for word, following in pairwise(found)]
        gaps.append(ending + (lines[i + 1][0] if i + 1 < len(lines) else ""))
    ends = sentence_ends(words)
    is_fragment = len(ends) == 1 and not _SENTENCE_END.search(words[-1])
    for start, end in pairwise([0, *ends]):
        yield Sentence(tuple(words[start:end]), tuple(gaps[start:end]), numbers[start], is_fragment)


def _blocks(text: str) -> Iterator[str | tuple[_Lines, int]]:
    """Paragraphs as lines with the number of the first, and the text between them as it is."""
    paragraph: _Lines = []
    first = 1
    fence: str | None = None
    in_list, after_blank = False, True
    lines = text.splitlines(keepends=True)
    front_matter = _front_matter(lines)
    for number, line in enumerate(lines, start=1):
        kept = line.rstrip()
        following = lines[number].rstrip() if number < len(lines) else ""
        opens = _FENCE.match(line)
        verbatim = True
        if number <= front_matter:
            pass
        elif fence is not None:
            if opens and opens[1].startswith(fence) and not kept[opens.end() :]:
                fence = None
        elif opens:
            fence = opens[1]
        else:
            is_code = _is_indented(line) and not in_list and not paragraph and after_blank
            verbatim = is_code or _is_markup(kept, following, alone=not paragraph)
        if verbatim:
            if paragraph:
                yield paragraph, first
                paragraph = []
            yield line
            # Indented lines behind code are code too, also without a blank line between.
            after_blank = not kept or _is_indented(line)
            continue
        prefix = _PREFIX.match(line)
        assert prefix is not None
        if paragraph and (prefix["item"] or prefix[0].count(">") != paragraph[-1][0].count(">")):
            yield paragraph, first
            paragraph = []
        if not paragraph:
            first = number
        in_list = bool(prefix["item"]) or (in_list and line[:1] in " \t") or (in_list and bool(paragraph))
        paragraph.append((prefix[0], kept[prefix.end() :], line[len(kept) :]))
        after_blank = False
    if paragraph:
        yield paragraph, first


def _front_matter(lines: Sequence[str]) -> int:
    """How many lines at the beginning are YAML between two rulers."""
    if not lines or lines[0].rstrip() != "---":
        return 0
    return next((i + 1 for i, line in enumerate(lines[1:], start=1) if line.rstrip() in ("---", "...")), 0)


def _is_indented(line: str) -> bool:
    return line.startswith(("    ", "\t")) and bool(line.strip())


def _is_markup(line: str, following: str, *, alone: bool) -> bool:
    """Whether a line, without its end, is no prose: without a letter, marked up, or a title with an underline."""
    prefix = _PREFIX.match(line)
    assert prefix is not None
    if not any(character.isalpha() for character in line[prefix.end() :]) or _MARKUP.match(line):
        return True
    return alone and _UNDERLINE.fullmatch(following) is not None
