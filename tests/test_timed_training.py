"""Training for a time, and the token tables that recipes train on."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.models.fresh import SPECIAL_TOKENS, fresh_network, fresh_tokenizer
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.train import timed
from fewstep.train.examples import Examples
from fewstep.train.objectives import CausalObjective
from fewstep.train.records import PromptRow, prompts_of
from fewstep.train.timed import train_for
from fewstep.train.token_tables import Limits, read_tables, write_tables
from fewstep.train.trainer import TrainSettings, train

EXAMPLES = Examples.from_ids([[3, 10 + i, 4] for i in range(12)], [[20 + i, 21 + i, 1] for i in range(12)])
SETTINGS = TrainSettings(max_steps=1000, rows=1, row_length=64, warmup_steps=50)


def objective_of(network: Network, asked: list[int]) -> Any:
    def made(steps: int) -> CausalObjective:
        asked.append(steps)
        return CausalObjective(network.role, EXAMPLES, network.eos_token_id)

    return made


def test_the_steps_that_fit_are_trained_as_if_there_had_been_no_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, asked = tiny_network("autoregressive"), list[int]()
    done = train_for(0.05, network, objective_of(network, asked), SETTINGS, tmp_path / "timed", probe_steps=3)
    told = re.search(r"timed: (\d+) steps of", capsys.readouterr().out)
    assert told is not None
    assert asked == [3, done.steps] == [3, int(told[1])]
    settings = json.loads((tmp_path / "timed/report.json").read_text())["settings"]
    assert settings["warmup_steps"] == min(50, done.steps)
    plain = tiny_network("autoregressive")
    train(plain, objective_of(plain, [])(0), TrainSettings(**{**settings, "betas": (0.9, 0.95)}), tmp_path / "plain")
    one, other = (load_network(tmp_path / name).module.state_dict() for name in ("timed", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_settings_limit_the_steps_and_no_time_is_told(tmp_path: Path) -> None:
    network, asked = tiny_network("autoregressive"), list[int]()
    few = TrainSettings(max_steps=2, rows=1, row_length=64)
    train_for(1e6, network, objective_of(network, asked), few, tmp_path / "few", probe_steps=3)
    assert asked == [3, 2]
    with pytest.raises(FewstepError, match="no time is left to train late; allow more seconds"):
        train_for(-1.0, network, objective_of(network, []), few, tmp_path / "late")
    with pytest.raises(FewstepError, match="few already holds a model"):
        train_for(1.0, network, objective_of(network, asked), few, tmp_path / "few")
    assert asked == [3, 2]


def test_an_interrupted_run_goes_on_to_its_own_number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, asked = tiny_network("autoregressive"), list[int]()

    def interrupted(*arguments: Any, **others: Any) -> Any:
        settings = arguments[2]
        if settings.max_steps == 4:
            others["evaluate"] = interrupt
        return train(*arguments, **others)

    def interrupt(network: Network, step: int) -> dict[str, float]:
        raise FewstepError("stopped")

    monkeypatch.setattr(timed, "train", interrupted)
    settings = TrainSettings(max_steps=4, rows=1, row_length=64, evaluate_every=4)
    with pytest.raises(FewstepError, match="stopped"):
        train_for(1e6, network, objective_of(network, asked), settings, tmp_path / "run", probe_steps=3)
    monkeypatch.setattr(timed, "train", train)
    again = tiny_network("autoregressive")
    done = train_for(0.001, again, objective_of(again, asked), settings, tmp_path / "run", probe_steps=3)
    assert asked == [3, 4, 4]
    assert done.steps == 4


def rows_of(word: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{word} {i}", "completion": word * (i + 1)} for i in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_tables_are_made_once_in_parts_and_read_as_one(tmp_path: Path, workers: int) -> None:
    tiny_network().tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts = {tmp_path / "data" / f"{word}.safetensors": partial(rows_of, word, 3) for word in ("ab", "cd")}
    write_tables(parts, tmp_path / "tokenizer", Limits(prompt=9, completion=5), workers=workers)
    written = [path.stat().st_mtime_ns for path in parts]
    write_tables(parts, tmp_path / "tokenizer", Limits(prompt=9, completion=5))
    assert [path.stat().st_mtime_ns for path in parts] == written
    found = read_tables(tmp_path / "data")
    assert found is not None
    tokenizer = tiny_network().tokenizer
    texts = [tokenizer.decode(completion) for _, completion in found.pairs()]
    assert texts == ["ab<eos>", "abab<eos>", "cd<eos>", "cdcd<eos>"]  # longer ones are left out
    assert read_tables(tmp_path / "data", "x*") is None
    (tmp_path / "data" / "cd.safetensors").write_bytes(b"no table")
    with pytest.raises(FewstepError, match=r"cd\.safetensors is no token table"):
        read_tables(tmp_path / "data")


def test_examples_are_prompts_with_references() -> None:
    assert prompts_of(EXAMPLES.head(2)) == [
        PromptRow("0", [3, 10, 4], [20, 21, 1]),
        PromptRow("1", [3, 11, 4], [21, 22, 1]),
    ]


def test_a_fresh_tokenizer_and_network_fit_each_other() -> None:
    tokenizer = fresh_tokenizer(["the first snow, the last snow"] * 3, 300, whole=["snow, the"])
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert len(tokenizer("snow, the").input_ids) == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": " a "}], tokenize=False) == "<bos> a <answer>"
    network, again = (fresh_network(tokenizer, width=32, layers=1) for _ in range(2))
    assert network.vocab_size == len(tokenizer)
    assert network.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(network.module.get_input_embeddings().weight, again.module.get_input_embeddings().weight)
