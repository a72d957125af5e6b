"""The files of a checkpoint: what may lie in its folder, and the one boundary through which libraries read them.

A checkpoint comes from somebody else: it may be damaged, incomplete or malicious. transformers, tokenizers, PEFT,
huggingface_hub and safetensors raise many kinds of errors about it; here each becomes one sentence.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.json_files import read_json
from fewstep.models.names import not_found

CONFIG, ADAPTER_CONFIG, GENERATION_CONFIG = "config.json", "adapter_config.json", "generation_config.json"
SINGLE, INDEX, ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Of which a tokenizer needs one."""
HEADS = "medusa.json"
"""What describes Medusa heads."""
DESCRIPTIONS = (CONFIG, HEADS)
"""Of a model and of Medusa heads: the file that says what a folder holds."""
GATED = "gated_adapter"
"""The key of a config.json that describes a gated adapter."""
_OTHER_JSON = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json")
HUB_SECONDS = 5.0
"""For the hub to answer that it knows a name."""


@contextmanager
def reading(what: object, *, advice: str = "correct it, or fetch it again") -> Iterator[None]:
    """Turn whatever a library raises while it reads `what`, a file or folder, into one FewstepError that names it."""
    try:
        yield
    except FewstepError:
        raise
    except BaseException as error:
        # Libraries raise errors of any class on damaged files, and a panic of a Rust library is no Exception; what
        # stops the program (Ctrl-C, exit) is none of ours.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FewstepError(f"{what} cannot be read: {sentence(error)}; {advice}") from error


def sentence(error: BaseException) -> str:
    """What an error of a library says, on one line, cut where it goes on for long."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 250 else f"{text[:250]} ..."
    said = short and not isinstance(error, KeyError | AttributeError | IndexError | TypeError | AssertionError)
    return short if said else f"{type(error).__name__}{short and ': '}{short}"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. FewstepError if it holds anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise FewstepError(f"{path} is not a JSON object; correct it, or fetch it again")
    return value


def check_files(folder: Path) -> None:
    """FewstepError naming a file of the folder that is not a regular file with content: a pipe, which would never end,
    or a git-lfs pointer.
    """
    with reading(folder, advice="check the folder"):
        for file in sorted(folder.iterdir()):
            try:
                status = file.stat()
            except OSError:  # a link to nothing is like no file
                continue
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise FewstepError(f"{file} is a pipe or device, not a file; put the file in its place")
            if status.st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs.github.com/"):
                raise FewstepError(f"{file} is a git-lfs pointer and not the file itself; fetch it with `git lfs pull`")


def check_generation_config(folder: Path) -> None:
    """FewstepError naming the folder's file of generation settings if it exists and is not valid."""
    from transformers import GenerationConfig

    if (folder / GENERATION_CONFIG).exists():
        read_object(folder / GENERATION_CONFIG)
        with reading(folder / GENERATION_CONFIG):
            GenerationConfig.from_pretrained(folder, local_files_only=True)


def name_damaged_json(folder: Path) -> None:
    """FewstepError naming the first of a tokenizer's files that is no JSON object, or no tokenizer."""
    from tokenizers import Tokenizer

    for name in (TOKENIZER, TOKENIZER_CONFIG, *_OTHER_JSON):
        if (folder / name).exists():
            read_object(folder / name)
    if (folder / TOKENIZER).exists():
        with reading(folder / TOKENIZER):
            Tokenizer.from_file(str(folder / TOKENIZER))


def hub_folder(name: str) -> Path:
    """The folder in huggingface_hub's cache that holds what a model needs, fetched first if it must be.

    FewstepError if the hub does not answer in time or knows no such model, and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def fetched(patterns: list[str], revision: str | None) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*", etag_timeout=HUB_SECONDS
            )
        )

    try:
        folder = fetched(["*.json", "*.jinja", "*.txt", "*.model"], None)
    except HFValidationError as error:
        raise not_found(name, f"the hub knows no such name ({sentence(error)})") from error
    except HfHubHTTPError as error:
        raise not_found(name, f"the hub refuses it ({sentence(error)})") from error
    except Exception as error:  # the network's errors have classes of their own, by version of the client
        raise not_found(name, "the hub does not answer") from error
    weights = _weight_names(folder)
    if not all((folder / weight).exists() for weight in weights):
        with reading(f"the weights of {name} on the hub", advice="try again"):
            fetched(weights, folder.name)
    return folder


def _weight_names(folder: Path) -> list[str]:
    if (folder / ADAPTER_CONFIG).exists():
        return [ADAPTER_WEIGHTS]
    if not (folder / INDEX).exists():
        return [SINGLE]
    weight_map = read_object(folder / INDEX).get("weight_map")
    return sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else [SINGLE]
