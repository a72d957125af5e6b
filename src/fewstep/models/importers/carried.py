"""What travels with the weights: tokenizer, chat template, generation settings, licence."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fewstep.errors import FewstepError
from fewstep.json_files import write_json_whole
from fewstep.models.checkpoint_files import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    name_damaged_json,
    read_object,
    reading,
)

_TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
]
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def read_tokenizer(folder: Path, *, stock_class: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; `stock_class` stands in for a class that is code of the checkpoint.

    FewstepError if the folder has none or it cannot be read.
    """
    if not any((folder / name).exists() for name in _VOCABULARIES):
        raise FewstepError(f"{folder} has no tokenizer: none of {', '.join(_VOCABULARIES)} is there")
    for name in (*_TOKENIZER_FILES, TOKENIZER_CONFIG):
        check_own(folder, folder / name)
    settings: dict[str, Any] = {}
    if (folder / TOKENIZER_CONFIG).exists():
        settings = read_object(folder / TOKENIZER_CONFIG)
    settings.pop("auto_map", None)
    if not hasattr(transformers, str(settings.get("tokenizer_class"))):
        settings["tokenizer_class"] = stock_class
    # In a folder of its own: beside a config.json, transformers asks the model's type, which may be unknown to it.
    with tempfile.TemporaryDirectory() as scratch:
        for name in _TOKENIZER_FILES:
            if (folder / name).exists():
                shutil.copy(folder / name, scratch)
        write_json_whole(Path(scratch) / TOKENIZER_CONFIG, settings)
        try:
            with reading(f"the tokenizer in {folder}"):
                return AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
        except FewstepError as error:
            name_damaged_json(folder)
            raise FewstepError(str(error).replace(scratch, str(folder))) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer beside a config.json. FewstepError if transformers would read it otherwise from there.

    For some model types (Qwen2) it builds the tokenizer of that family whatever the folder says.
    """
    with reading("the tokenizer, as stock transformers writes it,"):
        tokenizer.save_pretrained(folder)
        reread = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        same = reread.get_vocab() == tokenizer.get_vocab() and reread.encode(_PROBE) == tokenizer.encode(_PROBE)
    if not same:
        raise FewstepError(
            f"stock transformers would read the tokenizer ({type(tokenizer).__name__}) as a {type(reread).__name__} "
            "and split text differently; such a tokenizer cannot go with this model type"
        )


_PROBE = "The 1st: it's 12,345.67  (x\u00b2)\n\n  2. na\u00efve \u4f60\u597d \U0001f600\tend"
"""Words, digits, runs of spaces, several scripts: where the splitting rules of tokenizers differ."""


def complete_tokens(
    tokenizer: PreTrainedTokenizerBase, *, source: Path, mask_token_id: int | None, end_tokens: Sequence[int]
) -> None:
    """Name the mask and end-of-text tokens to the tokenizer, where only the checkpoint's configs say which they are.

    FewstepError if one of them is not in the vocabulary, or the tokenizer names another mask token.
    """
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _token(tokenizer, source, "eos_token_id", end_tokens[0] if end_tokens else None)
    if mask_token_id is None or tokenizer.mask_token_id == mask_token_id:
        return
    if tokenizer.mask_token_id is not None:
        raise FewstepError(
            f"config.json in {source} says the mask token is {mask_token_id}, its tokenizer {tokenizer.mask_token_id}; "
            "correct the wrong one"
        )
    tokenizer.mask_token = _token(tokenizer, source, "mask_token_id", mask_token_id)


def name_mask_token(tokenizer: PreTrainedTokenizerBase, token: str, *, vocab_size: int) -> None:
    """Make `token` the mask token: one of the vocabulary, or a new one if the network has a row left for it.

    FewstepError if it has none, or if the tokenizer names another mask token already.
    """
    if tokenizer.mask_token not in (None, token):
        raise FewstepError(f"the tokenizer has the mask token {tokenizer.mask_token!r} already; leave out {token!r}")
    if token not in tokenizer.get_vocab() and len(tokenizer) >= vocab_size:
        raise FewstepError(
            f"{token!r} is not in the vocabulary, and the network has no row left for a new token; "
            "name a token of the vocabulary that no text needs"
        )
    tokenizer.add_special_tokens({"mask_token": token})


def _token(tokenizer: PreTrainedTokenizerBase, source: Path, what: str, token_id: int | None) -> str:
    if not isinstance(token_id, int):
        raise FewstepError(f"neither config.json nor the tokenizer in {source} names {what.removesuffix('_id')}")
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    if token is None:
        raise FewstepError(
            f"the tokenizer in {source} has no token {token_id}, which config.json calls {what}; "
            "add it to the tokenizer's files"
        )
    return token


def mask_token_id(source: Path, config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The mask token's id, as config.json, generation_config.json or the tokenizer says."""
    from_file = {}
    if (source / GENERATION_CONFIG).exists():
        from_file = read_object(source / GENERATION_CONFIG)
    for said in (config.get("mask_token_id"), from_file.get("mask_token_id"), tokenizer.mask_token_id):
        if isinstance(said, int) and not isinstance(said, bool):
            return said
    return None


def copy_settings(source: Path, target: Path) -> None:
    """Generation settings and licence texts, as they stand. FewstepError for a link that leads out of the folder."""
    for name in (GENERATION_CONFIG, "LICENSE*", "NOTICE*"):
        for file in sorted(source.glob(name)):
            if file.is_file():
                check_own(source, file)
                shutil.copy(file, target)


def check_own(folder: Path, file: Path) -> None:
    """FewstepError if `file` is a link to what lies outside of the checkpoint: its text would travel on as if it were
    the checkpoint's. The hub's cache keeps a checkpoint's files as links to `blobs` beside its `snapshots`.
    """
    own = [Path(os.path.realpath(folder))]
    if own[0].parent.name == "snapshots":
        own.append(own[0].parent.parent / "blobs")
    if file.exists() and not any(Path(os.path.realpath(file)).is_relative_to(place) for place in own):
        raise FewstepError(f"{file} is a link to a file outside of the folder; copy the file itself to its place")
