"""What a checkpoint says of its tokens: which of them end an answer, and which rows of the head stand for none."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fewstep.errors import FewstepError
from fewstep.models.checkpoint_files import CONFIG, GENERATION_CONFIG, read_object
from fewstep.values import shown


def end_tokens_named(*folders: Path) -> list[int]:
    """Ids that generation_config.json and config.json of these folders name as `eos_token_id`.

    FewstepError, naming the file, if it is damaged or such an id is no integer.
    """
    return [
        one
        for folder in folders
        for file in (folder / GENERATION_CONFIG, folder / CONFIG)
        if file.exists()
        for one in token_ids(read_object(file).get("eos_token_id"), f"{file}: eos_token_id")
    ]


def token_ids(value: Any, what: str) -> list[int]:
    """One id, a list of them, or None for none, as a list. FewstepError naming `what` for anything else."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool):
            raise FewstepError(f"{what} must be a token's id or a list of ids, got {shown(value)}")
    return list(ids)


def set_end_tokens(module: PreTrainedModel, ids: Iterable[int | None]) -> None:
    """Keep the ids in the settings that are saved with the weights, where stock transformers looks for them too.

    None is that of a tokenizer without one.
    """
    unique = list(dict.fromkeys(one for one in ids if one is not None))
    value = None if not unique else unique[0] if len(unique) == 1 else unique
    module.config.eos_token_id = value
    if module.generation_config is not None:
        module.generation_config.eos_token_id = value


def ids_without_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Rows of a head that no token of the tokenizer has: heads are padded to sizes that hardware likes."""
    unnamed = set(range(vocab_size)).difference(tokenizer.get_vocab().values())
    # Two ids of one spelling are both tokens, though the vocabulary, which goes by spelling, holds only one of them.
    return [one for one in sorted(unnamed) if not _is_token(tokenizer, one)]


def _is_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and backend.id_to_token(token_id) is not None
