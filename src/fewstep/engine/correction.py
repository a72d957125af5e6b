"""Correction of a text, sentence by sentence, by a model that was trained to write a sentence without its errors.

The model is given each sentence with one space between its words, and its answer is the corrected one. Whatever is no
sentence stays as it is (`models.sentences`), and so does every word that is no plain one, such as a number or a path.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.decode.requests import Output
from fewstep.engine.correction_settings import CorrectionSettings
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.sentences import Piece, Sentence, plain_word, split_sentences, straight_quotes

LEAST_WORDS = 3
"""Of a sentence that is corrected: fewer say too little about what was meant."""

LEAST_LIKE = 0.5
"""How alike, from 0 to 1, an answer and its sentence must be in their letters: one that is not is no correction."""

_CANVAS_STEP = 16
"""Canvases are whole multiples, so that sentences of about the same length share a batch."""


@dataclass(frozen=True)
class Change:
    """A sentence that was changed, as it stands in the text; `line` is that of its first word, from 1."""

    line: int
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """A text with its sentences corrected.

    `num_sentences`: those that were asked about; `num_too_long`: those that were not, as too long; `num_refused`:
    answers that were no correction, as they had no end, other text or characters that are none.
    `num_forwards`: passes of the network for all of them.
    """

    text: str
    changes: tuple[Change, ...]
    num_sentences: int
    num_too_long: int
    num_refused: int
    num_forwards: int


def correct_text(
    lm: LanguageModel,
    text: str,
    settings: CorrectionSettings | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    **decoding: Any,
) -> Corrected:
    """The text with its sentences corrected, and what was changed.

    A sentence that occurs several times is asked about once. `progress` is called with a number of sentences after
    each answer. `decoding`: settings of `LanguageModel.generate`, without `max_new_tokens`, which follows from the
    sentences. FewstepError for one that is unknown.
    """
    settings = settings or CorrectionSettings()
    if "max_new_tokens" in decoding:
        raise FewstepError("correction takes no max_new_tokens: the room for an answer follows from the sentence")
    pieces = split_sentences(text)
    counts = Counter(straight_quotes(sentence.text) for sentence in _asked(pieces))
    groups, too_long = _by_canvas(lm, list(counts), settings.longest)
    if progress is not None:
        progress(sum(counts[prompt] for prompt in too_long))
    outputs: dict[str, Output] = {}
    for canvas, prompts in sorted(groups.items()):

        def tell(index: int, _: Output, prompts: Sequence[str] = prompts) -> None:
            if progress is not None:
                progress(counts[prompts[index]])

        answers = lm.generate(
            prompts, batch_size=settings.batch_size, on_output=tell, max_new_tokens=canvas, **decoding
        )
        outputs.update(zip(prompts, answers, strict=True))
    words_of = {prompt: _corrected_words(prompt, output) for prompt, output in outputs.items()}
    corrected = [_corrected(piece, words_of) for piece in pieces]
    return Corrected(
        text="".join(map(str, corrected)),
        changes=tuple(
            Change(before.line, _shown(before), _shown(after))
            for before, after in zip(pieces, corrected, strict=True)
            if isinstance(before, Sentence) and isinstance(after, Sentence) and str(before) != str(after)
        ),
        num_sentences=sum(counts[prompt] for prompt in outputs),
        num_too_long=sum(counts[prompt] for prompt in too_long),
        num_refused=sum(counts[prompt] for prompt, words in words_of.items() if words is None),
        num_forwards=sum(output.num_forwards for output in outputs.values()),
    )


def num_asked(text: str) -> int:
    """How many sentences `correct_text` asks about, or leaves as too long."""
    return len(_asked(split_sentences(text)))


def _asked(pieces: Sequence[Piece]) -> list[Sentence]:
    found = [piece for piece in pieces if isinstance(piece, Sentence)]
    return [one for one in found if sum(plain_word(word) is not None for word in one.words) >= LEAST_WORDS]


def _by_canvas(lm: LanguageModel, prompts: Sequence[str], longest: int) -> tuple[dict[int, list[str]], list[str]]:
    """The prompts by the room that their answers get, and those that are too long for the model or for `longest`."""
    groups: dict[int, list[str]] = {}
    too_long = []
    step = max(_CANVAS_STEP, lm.role.block_size or 1)
    for prompt in prompts:
        given = len(lm.encode(prompt))
        # A corrected sentence is rarely longer than the one with errors, whose broken words take more tokens.
        canvas = -(-(given + given // 4 + 4) // step) * step
        if given > longest or given + canvas > lm.network.max_positions:
            too_long.append(prompt)
        else:
            groups.setdefault(canvas, []).append(prompt)
    return groups, too_long


def _corrected_words(prompt: str, output: Output) -> list[str] | None:
    """The words of an answer; None if it is no correction of the prompt."""
    text = " ".join(output.text.split())
    if output.finish_reason != "stop" or not text or any(map(_is_unfit, set(text) - set(prompt))):
        return None
    if difflib.SequenceMatcher(None, prompt, text, autojunk=False).ratio() < LEAST_LIKE:
        return None
    return text.split(" ")


def _corrected(piece: Piece, words_of: dict[str, list[str] | None]) -> Piece:
    if not isinstance(piece, Sentence):
        return piece
    words = words_of.get(straight_quotes(piece.text))
    if words is None:
        return piece
    if piece.is_fragment:  # which models, that have learnt from whole sentences, would end with a full stop
        words = [*words[:-1], words[-1].rstrip(".!?") or words[-1]]
    return piece.with_words(_merged(piece.words, words))


def _is_unfit(character: str) -> bool:
    """Whether no correction brings it in: a control character, or what stands for broken bytes."""
    return character == "\ufffd" or not character.isprintable()


def _merged(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The words after the correction, but for changes that touch words which are not plain: these stay as they were."""
    plain = [straight_quotes(word) for word in before]
    words: list[str] = []
    for first, last, start, end in _changed_places(plain, after):
        old, new = plain[first:last], after[start:end]
        words += before[first:last] if old == new or _special(old) != _special(new) else new
    return words


def _changed_places(before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[int, int, int, int]]:
    """Which words became which: where they begin and end before and after. As many others are changed one by one."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for _, first, last, start, end in matcher.get_opcodes():
        if last - first == end - start:
            yield from ((first + i, first + i + 1, start + i, start + i + 1) for i in range(last - first))
        else:
            yield first, last, start, end


def _special(words: Sequence[str]) -> list[str]:
    """Words with letters or digits that are not plain."""
    return [word for word in words if plain_word(word) is None and any(map(str.isalnum, word))]


def _shown(sentence: Sentence) -> str:
    """As it stands in the text, without what is behind it."""
    return str(sentence).removesuffix(sentence.gaps[-1]) if sentence.gaps else ""
