"""Every field of every file of a checkpoint, changed in turn: the model works, or one sentence says why it does not.

`make test` draws some of the cases; `make fuzz` (FEWSTEP_FUZZ=all) runs each.
"""

import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest

import fewstep
from fewstep.errors import FewstepError
from fewstep.models import load
from fewstep.models.importers.convert import import_checkpoint
from fewstep.models.load import save_network
from fewstep.models.names import not_found
from fewstep.models.tiny import tiny_network

VALUES = [None, True, False, -1, 0, 1, 3, 2.5, 1e308, 10**20, "", "x", "2", "../x", [], [1], [[]], {}, {"a": 1}]
TEXTS = ["null", "[]", "5", '"x"', "", "{", '{"a": ' + "1" * 5000 + "}", "[" * 100_000, "\ud800", '{"a": NaN}', "\x00"]
NUM_DRAWN = 100
SECONDS = 10

Case = tuple[str, str, tuple[Any, ...] | None, Any]
"""Folder, file, the way to a field and the value that it gets; without a way, the text that the file gets."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model, a student, an adapter of the first as PEFT leaves it, and weights in two files."""
    folder = tmp_path_factory.mktemp("sources")
    causal = tiny_network("autoregressive", hidden=16)
    save_network(causal, folder / "causal")
    save_network(tiny_network("block_causal", hidden=16), folder / "student")
    save_network(causal, folder / "sharded")
    (folder / "sharded/model.safetensors").rename(folder / "sharded/model-00001.safetensors")
    names = dict.fromkeys(causal.module.state_dict(), "model-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    plain = json.loads((folder / "causal/config.json").read_text())
    (folder / "plain").mkdir()
    for file in (folder / "causal").iterdir():
        shutil.copy(file, folder / "plain")
    ours = set(causal.role.to_config())
    (folder / "plain/config.json").write_text(json.dumps({k: v for k, v in plain.items() if k not in ours}))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    causal.module.name_or_path = str(folder / "causal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(causal.module, settings).save_pretrained(folder / "adapter")
    return folder


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every field; of what is long only to its first and last few."""
    if path:
        yield path
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys if len(keys) < 60 else keys[:2] + keys[-2:]:
            yield from paths_of(value[key], (*path, key))


def cases(sources: Path) -> list[Case]:
    found: list[Case] = []
    for folder in sorted(sources.iterdir()):
        for file in sorted(folder.glob("*.json")):
            if folder.name != "student" or file.name == "config.json":
                found += [(folder.name, file.name, None, text) for text in TEXTS]
                for path in paths_of(json.loads(file.read_text())):
                    found += [(folder.name, file.name, path, value) for value in [*VALUES, "remove"]]
    return found


def damaged(source: Path, target: Path, file: str, path: tuple[Any, ...] | None, value: Any) -> Path:
    target.mkdir()
    for one in source.iterdir():
        if one.name != file:
            os.link(one, target / one.name)
    if path is None:
        (target / file).write_bytes(value.encode("utf-8", "surrogatepass"))
        return target
    whole = json.loads((source / file).read_text())
    inside = whole
    for key in path[:-1]:
        inside = inside[key]
    if value == "remove":
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    (target / file).write_text(json.dumps(whole))
    return target


def works_or_says_why(action: Callable[[], Any]) -> str | None:
    """What is wrong with how an action ends, if it does not end well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except FewstepError as error:
            return None if "\n" not in str(error).strip() else f"several lines: {error}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{type(error).__name__}: {error}"
    return None


def test_any_field_of_any_file_is_read_or_told_in_one_sentence(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub(name: str) -> Path:
        raise not_found(name, "the hub does not answer")

    monkeypatch.setattr(load, "hub_folder", no_hub)
    every = cases(sources)
    chosen = every if os.environ.get("FEWSTEP_FUZZ") == "all" else random.Random(0).sample(every, NUM_DRAWN)
    wrong = []
    for number, (folder, file, path, value) in enumerate(chosen):
        started = time.monotonic()
        target = damaged(sources / folder, tmp_path / str(number), file, path, value)
        said = works_or_says_why(lambda target=target: answer(target))
        if said is None and folder == "plain":
            imported = tmp_path / f"{number}-imported"
            said = works_or_says_why(lambda target=target, to=imported: import_checkpoint(target, to, check=True))
            said = said and f"import: {said}"
            shutil.rmtree(imported, ignore_errors=True)
        if time.monotonic() - started > SECONDS:
            said = f"took more than {SECONDS} seconds"
        if said is not None:
            wrong.append(f"{folder}/{file} {path} = {str(value)[:30]!r}: {said[:300]}")
        shutil.rmtree(target)
    assert wrong == [], "\n".join(wrong)


def answer(folder: Path) -> None:
    model = fewstep.load(folder, device="cpu")
    model.generate("12+3", max_new_tokens=4)
