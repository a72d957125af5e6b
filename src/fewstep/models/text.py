"""Prompts to token ids and back."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from fewstep.errors import FewstepError
from fewstep.files import is_unicode
from fewstep.models.templates import render
from fewstep.values import shown

Message = dict[str, str]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], *, raw: bool = False
) -> list[int]:
    """Token ids of a prompt: through the chat template, unless `raw` is set or the tokenizer has none.

    A string stands for one user message; a list of messages has `role` and `content` each. FewstepError if it is
    neither, or if the template refuses the messages.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        if raw or not tokenizer.chat_template:
            return tokenizer.encode(prompt)
        prompt = [{"role": "user", "content": prompt}]
    _check_messages(prompt)
    if not tokenizer.chat_template:
        raise FewstepError("this model has no chat template for messages; give the prompt as text")
    return tokenizer.encode(render(tokenizer, prompt), add_special_tokens=False)


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


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens left out."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
