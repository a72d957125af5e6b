"""Prompts to token ids and back."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], *, raw: bool = False
) -> list[int]:
    """Token ids of a prompt: through the chat template, unless `raw` is set or the tokenizer has none.

    A string stands for one user message; a list of messages has `role` and `content` each.
    """
    if isinstance(prompt, str):
        if raw or not tokenizer.chat_template:
            return tokenizer.encode(prompt)
        prompt = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens left out."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
