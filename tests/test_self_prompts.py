"""Prompts that a chat model writes itself, on random networks with a chat template."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import self_prompts

from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.load import save_network
from fewstep.models.text import encode_before_user
from fewstep.models.tiny import tiny_network
from fewstep.train.self_prompts import kept

RECIPE = self_prompts.__file__


def test_a_sample_begins_where_the_user_speaks() -> None:
    lm = LanguageModel(tiny_network("autoregressive"))
    start = encode_before_user(lm.network.tokenizer)
    whole = lm.encode("what is 1+1?")
    assert 0 < len(start) < len(whole)
    assert whole[: len(start)] == start
    lm.network.tokenizer.chat_template = None
    with pytest.raises(FewstepError, match="no chat template"):
        encode_before_user(lm.network.tokenizer)


def test_whole_prompts_of_some_words_that_repeat_little_are_kept_once() -> None:
    lm = LanguageModel(tiny_network("autoregressive"))
    encode = lm.network.tokenizer.encode

    def output(text: str, reason: str = "stop") -> SimpleNamespace:
        return SimpleNamespace(token_ids=encode(text, add_special_tokens=False), finish_reason=reason)

    said = [
        output("how much is this?"), output(" how much is this?"), output("two words"),
        output("how many are there", "length"), output("one and one and one and one and one and one and one and one"),
        output("what is 3 + 4?"),
    ]  # fmt: skip
    assert list(kept(lm, said)) == [(0, "how much is this?"), (5, "what is 3 + 4?")]


def test_the_command_writes_rows_that_collect_takes_or_says_that_there_are_none(tmp_path: Path) -> None:
    save_network(tiny_network("autoregressive", max_positions=512), tmp_path / "chat")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, RECIPE, tmp_path / "chat", tmp_path / "prompts.jsonl", "--device", "cpu", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    none = run("--count", "4", "--max-tokens", "1")
    assert (none.returncode, none.stderr.count("\n")) == (2, 1)
    assert "none of 4 samples can be a prompt" in none.stderr
    assert not (tmp_path / "prompts.jsonl").exists()
    some = run("--count", "200", "--max-tokens", "200")
    assert some.returncode == 0, some.stderr
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert rows
    assert {tuple(row) for row in rows} == {("id", "prompt")}
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_users_go_on_with_conversations(tmp_path: Path) -> None:
    network = tiny_network("autoregressive", max_positions=512)
    save_network(network, tmp_path / "chat")
    said = [{"role": "user", "content": "what is 1+1?"}, {"role": "assistant", "content": "it is 2"}]
    start = encode_before_user(network.tokenizer, said)
    whole = LanguageModel(network).encode([*said, {"role": "user", "content": "and 2+2?"}])
    assert whole[: len(start)] == start
    assert len(start) > len(encode_before_user(network.tokenizer))
    asked = [{"prompt": f"what is {i}?", "completion": f"it is {i}"} for i in range(39)]
    rows = [{"messages": said}, *asked, {"prompt": "left out", "completion": "by --count"}]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "prompts.jsonl"
    self_prompts.main(
        str(tmp_path / "chat"), out, count=40, after=tmp_path / "said.jsonl", max_tokens=200, device="cpu"
    )
    written = [json.loads(line) for line in out.read_text().splitlines()]
    known = [said, *([{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
                     for row in asked)]  # fmt: skip
    assert written
    assert all(row["messages"][:-1] in known and row["messages"][-1]["role"] == "user" for row in written)
