"""Sentences of English prose, gathered from documents and split by document, to train and measure models on.

A document belongs to one part as a whole, and a sentence that is in two parts stays in the one that measures: so no
sentence to measure on is among those to train on, nor is one from the same page.
"""

import gzip
import hashlib
import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.models.sentences import plain_word, sentence_ends, straight_quotes

PARTS = ("unseen", "test", "dev", "train")
"""Those that measure come first: a sentence that is in one of them is in none of the later ones."""

LEAST_WORDS, MOST_WORDS, MOST_CHARACTERS = 5, 45, 300
LEAST_PLAIN = 0.8
"""Share of a sentence's words that are plain, see `plain_word`."""

_BLOCK = r"p|div|h[1-6]|ul|ol|li|table|tr|td|th|pre|dl|dd|dt|blockquote|section|article|nav|body|header|footer|form|hr"
_PARAGRAPH = re.compile(rf"<(?:p|li|dd)\b[^>]*>(.*?)(?=</?(?:{_BLOCK})\b)", re.DOTALL | re.IGNORECASE)
_NO_PROSE = re.compile(r"<(script|style|pre|nav)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
_LINE_BREAK = re.compile(r"<br\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")
_WHOLE = re.compile(r"[A-Z\"'(].*[.!?][\"')]*")
_UNREAD = str.maketrans({"\u00ad": "", "¶": ""})
"""Soft hyphens, and the marks of links to headings."""
_ENGLISH = frozenset("the of to and in is a that for it as be this by with or on are an not if you was at from".split())


@dataclass(frozen=True)
class Document:
    """A page of documentation or a chapter. `name` begins with that of its source and a slash."""

    name: str
    paragraphs: list[str]

    def sentences(self) -> Iterator[str]:
        """The clean ones: whole English sentences of few names and marks."""
        for paragraph in self.paragraphs:
            words, start = straight_quotes(paragraph.translate(_UNREAD)).split(), 0
            for end in sentence_ends(words):
                if is_clean(words[start:end]):
                    yield " ".join(words[start:end])
                start = end


def is_clean(words: list[str]) -> bool:
    """Whether this is a whole sentence of English prose, neither very short nor very long."""
    text = " ".join(words)
    return (
        LEAST_WORDS <= len(words) <= MOST_WORDS
        and len(text) <= MOST_CHARACTERS
        and _WHOLE.fullmatch(text) is not None
        and all(character < "\u0250" or character in "–—…" for character in text)
        and sum(plain_word(word) is not None for word in words) >= LEAST_PLAIN * len(words)
        and any(word.lower() in _ENGLISH for word in words)
    )


def html_paragraphs(page: str) -> list[str]:
    """The paragraphs, items of lists and descriptions of a page, without markup; code and navigation are left out."""
    found = _PARAGRAPH.finditer(_NO_PROSE.sub(" ", page))
    return [html.unescape(_TAG.sub("", _LINE_BREAK.sub(" ", match[1]))) for match in found]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Into which part a document goes, by its name alone, so that it never changes.

    `unseen`: beginnings of the names of documents that are kept for the part of that name. `shares`: of all others, for
    the parts that measure; the rest is for training.
    """

    unseen: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=lambda: {"test": 0.03, "dev": 0.01})

    def part(self, name: str) -> str:
        """One of PARTS."""
        if self.unseen and name.startswith(self.unseen):
            return "unseen"
        place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / (1 << 32)
        for part, share in self.shares.items():
            if place < share:
                return part
            place -= share
        return "train"


@dataclass(frozen=True)
class SentenceFolder:
    """Gathered sentences with their documents: one compressed JSONL file for each part."""

    folder: Path

    def path(self, part: str) -> Path:
        return self.folder / f"{part}.jsonl.gz"

    def write(self, documents: Iterable[tuple[str, Sequence[str]]], split: Split) -> dict[str, Counter[str]]:
        """Write names and sentences of documents, each sentence once, also if it comes again with other numbers.

        Returns for each source how many of its sentences are in each part, and their `bytes`.
        """
        rows: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
        for name, texts in documents:
            rows[split.part(name)] += [(name, text) for text in texts]
        known: set[str] = set()
        figures: dict[str, Counter[str]] = defaultdict(Counter)
        for part, of_part in rows.items():
            with write_whole(self.path(part)) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as out:
                for name, text in of_part:
                    key = re.sub(r"\d+", "0", text.lower())
                    if key not in known:
                        known.add(key)
                        out.write(json.dumps({"document": name, "text": text}, ensure_ascii=False) + "\n")
                        figures[name.split("/")[0]].update({part: 1, "bytes": len(text.encode())})
        return figures

    def read(self, part: str, *, documents: str = "") -> list[str]:
        """The sentences of a part, or of those of its documents whose names begin so. FewstepError if it is not there
        or damaged.
        """
        path = self.path(part)
        if not path.exists():
            raise FewstepError(f"{path} is not there; gather the sentences first")
        try:
            with gzip.open(path, "rt", encoding="utf-8") as stream:
                rows = [json.loads(line) for line in stream]
            return [row["text"] for row in rows if row["document"].startswith(documents)]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise FewstepError(f"{path} is damaged ({error}); remove it, and gather the sentences again") from None
