"""Prompts to token ids and back."""

import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from fewstep.errors import FewstepError
from fewstep.json_files import is_unicode
from fewstep.models.checkpoint_files import reading
from fewstep.models.templates import render
from fewstep.values import shown

Message = dict[str, str]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    raw: bool = False,
    stop_token_ids: Sequence[int] = (),
    literal: Collection[int] = (),
) -> list[int]:
    """Token ids of a prompt: through the chat template, unless `raw` is set or the tokenizer has none.

    A string stands for one user message; a list of messages has `role` and `content` each. Without a template the
    tokenizer puts its begin-of-text before the text, if it has one and the text does not begin with it; an end-of-text
    (the tokenizer's or one of `stop_token_ids`) that it puts behind the text is left out, since the answer follows.
    `literal`: ids of special tokens whose names in the prompt are text like any other; those that a template puts
    there mean what they mean. FewstepError if the prompt is neither, or if the template refuses the messages.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        if raw or not tokenizer.chat_template:
            return _encode_text(tokenizer, prompt, {tokenizer.eos_token_id, *stop_token_ids}, literal)
        prompt = [{"role": "user", "content": prompt}]
    else:
        _check_messages(prompt)
    if not tokenizer.chat_template:
        raise FewstepError("this model has no chat template for messages; give the prompt as text")
    if literal:
        prompt = [{name: _cut_field(tokenizer, name, one, literal) for name, one in each.items()} for each in prompt]
    return [one for part in render(tokenizer, prompt).split(_CUT) for one in encode_plain(tokenizer, part)]


_CUT = "\ufdd0"
"""Where a text is cut, so that its parts are encoded one by one: a noncharacter, which is in no text that is exchanged,
and outlasts a template.
"""


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, literal: Collection[int]) -> str:
    """The text with a cut behind the first character of each name of these tokens: no part of it is such a name."""
    names = sorted(map(str, tokenizer.convert_ids_to_tokens(list(literal))), key=len, reverse=True)
    spelt = re.compile(f"(?={'|'.join(map(re.escape, names))})(.)", re.DOTALL)
    return spelt.sub(rf"\1{_CUT}", text.replace(_CUT, ""))


def _cut_field(tokenizer: PreTrainedTokenizerBase, name: str, value: str, literal: Collection[int]) -> str:
    """Of a message. A template compares roles with their names."""
    return value if name == "role" else _cut(tokenizer, value, literal)


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, literal: Collection[int] = ()) -> list[int]:
    """Token ids of a text with nothing added; `literal` as for `encode_prompt`. FewstepError if the tokenizer cannot
    read it: one with no token for a character fails on it.
    """
    if not literal:
        with reading("this text", advice="the model's tokenizer has no tokens for it, or is damaged"):
            return tokenizer.encode(text, add_special_tokens=False)
    parts = _cut(tokenizer, text, literal).split(_CUT)
    ids = [one for part in parts for one in encode_plain(tokenizer, part)]
    if not set(literal).isdisjoint(ids):  # such as by a normaliser
        raise FewstepError("the text spells a special token of the model so that it cannot be told from it; reword it")
    return ids


def encode_before_user(tokenizer: PreTrainedTokenizerBase, said: Sequence[Message] = ()) -> list[int]:
    """Token ids of the chat template, after what was `said`, up to where a user's next words stand. FewstepError
    without a template.
    """
    if not tokenizer.chat_template:
        raise FewstepError("there is no chat template, so the model has not learnt what users say; choose a chat model")
    words = "what the user says"
    text = render(tokenizer, [*said, {"role": "user", "content": words}])
    return encode_plain(tokenizer, text[: text.rindex(words)])


def _encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, ends: set[int | None], literal: Collection[int]
) -> list[int]:
    """With what the tokenizer adds before the text, unless it is there, and without the ends that it adds behind."""
    if literal:
        first, cut, rest = _cut(tokenizer, text, literal).partition(_CUT)
        if cut:
            rest_ids = encode_plain(tokenizer, rest.replace(_CUT, ""), literal)
            return [*_encode_text(tokenizer, first, ends, ()), *rest_ids]
    plain, full = encode_plain(tokenizer, text), tokenizer.encode(text)
    num_ends = _num_last(full, ends) - _num_last(plain, ends)
    full = full[: len(full) - max(num_ends, 0)]
    added = full[: len(full) - len(plain)]
    return plain if added and plain[: len(added)] == added else full


def _num_last(ids: Sequence[int], ends: set[int | None]) -> int:
    """How many of the last ids are ends."""
    return next((i for i, one in enumerate(reversed(ids)) if one not in ends), len(ids))


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, stop_token_ids: Sequence[int] = ()) -> list[int]:
    """Token ids of what is to be learnt, with one end: the tokenizer's, unless the text ends with an end token."""
    ids = encode_plain(tokenizer, text)
    return ids if ids and ids[-1] in (tokenizer.eos_token_id, *stop_token_ids) else [*ids, tokenizer.eos_token_id]


def _check_messages(prompt: object) -> None:
    if not isinstance(prompt, Sequence):
        raise FewstepError(f"the prompt must be text or a list of messages, got {type(prompt).__name__}")
    for message in prompt:
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise FewstepError(f"every message needs role and content as text, got {shown(message)}")
        for value in fields.values():
            if isinstance(value, str):
                check_text(value)


def check_text(text: str) -> None:
    """FewstepError for a text that no tokenizer takes: one that was read from bytes that are no UTF-8."""
    if not is_unicode(text):
        raise FewstepError("the text is not valid Unicode: some of its bytes are no UTF-8; convert it to UTF-8")


# Back to text

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens left out.

    Bytes that are no UTF-8 become replacement characters, and those beside them stay what they are: tokenizers that
    spell rare characters in tokens of a byte ("byte fallback") would give up all bytes that stand together.
    """
    with reading("the tokens of the answer", advice="the model's tokenizer is damaged"):
        byte_of = _bytes_spelt(tokenizer)
        if not byte_of.keys().isdisjoint(ids):
            ids = _well_formed(tokenizer, ids, byte_of)
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class GrowingText:
    """The text of ids that arrive one by one. What it once was it begins with for ever: it can be printed as it comes.

    A character whose bytes have not all arrived is held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._text = ""

    @property
    def text(self) -> str:
        """Of the ids so far."""
        text = decode_text(self._tokenizer, self.ids).rstrip(_UNKNOWN)
        if text.startswith(self._text):  # not so where a tokenizer's later tokens change the text of earlier ones
            self._text = text
        return self._text


class TokenTexts:
    """What each id adds to the text of ids that arrive one by one: these texts together are the whole text.

    An id whose bytes end inside a character adds nothing, and the one that completes it adds the character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Decoded together with the id before it: some tokenizers drop the space in front of the first one.
        self._before: list[int] = []
        self._begun: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that this id adds."""
        self._begun.append(token_id)
        text = decode_text(self._tokenizer, [*self._before, *self._begun])
        if text.endswith(_UNKNOWN):
            return ""
        known = len(decode_text(self._tokenizer, self._before))
        self._before, self._begun = self._begun, []
        return text[known:]


class AnswerText:
    """The text of an answer whose tokens become final in any order, as far as everything before them is final too.

    It ends with the first of the tokens `ends`, or before the first of the texts `stop`. What it once was it begins
    with for ever: a character whose bytes have not all arrived, and what a stop text may begin with, are held back.
    `stopped`: whether a stop text is complete.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, ends: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._growing = GrowingText(tokenizer)
        self._ends, self._stop = set(ends), tuple(stop)
        self._waiting: dict[int, int] = {}
        self.stopped = False

    def add(self, position: int, token_id: int) -> None:
        """A token is final; positions count from 0."""
        self._waiting[position] = token_id
        ids = self._growing.ids
        # Behind an end stand tokens that were final before it; the answer is without them.
        while len(ids) in self._waiting and not self.stopped and not (ids and ids[-1] in self._ends):
            ids.append(self._waiting.pop(len(ids)))
            self.stopped = any(text in self._growing.text for text in self._stop)

    @property
    def text(self) -> str:
        """What can be shown."""
        whole = self._growing.text
        if self.stopped:
            return before_stop(whole, self._stop)
        held = max((_num_begun(whole, text) for text in self._stop), default=0)
        return whole[: len(whole) - held]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop texts, all of it if it has none."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def _num_begun(text: str, stop: str) -> int:
    """How many of the last characters a stop text begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def num_ids_to_stop(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str]) -> int | None:
    """How many of the ids it takes until one of the stop texts is complete; None if none is."""

    def complete(count: int) -> bool:
        text = decode_text(tokenizer, ids[:count])
        return any(one in text for one in stop)

    if not complete(len(ids)):
        return None
    return bisect_left(range(len(ids)), True, key=complete)


def _well_formed(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], byte_of: dict[int, int]) -> list[int]:
    """The ids with bytes that are no UTF-8 replaced by those of the replacement character."""
    id_of = {byte: one for one, byte in byte_of.items()}
    special = {one for one, token in tokenizer.added_tokens_decoder.items() if token.special}
    fixed: list[int] = []
    together = bytearray()

    def close() -> None:
        fixed.extend(id_of[byte] for byte in together.decode(errors="replace").encode())
        together.clear()

    for one in ids:
        if one in byte_of:
            together.append(byte_of[one])
        elif one not in special:  # those are left out, so bytes on both sides of them stand together
            close()
            fixed.append(one)
    close()
    return fixed


@lru_cache(maxsize=8)
def _bytes_spelt(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Ids of the tokens <0x00> to <0xFF> and the bytes that they stand for; empty unless the tokenizer joins them."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = tokenizer.get_vocab()
    if not all(name in vocabulary for name in names) or tokenizer.decode([vocabulary[names[ord("A")]]]) != "A":
        return {}
    return {vocabulary[name]: byte for byte, name in enumerate(names)}
