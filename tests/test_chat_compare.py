"""The chat comparison at toy size, on random causal networks with a chat template, and the prompts that it asks."""

import importlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.json_files import read_rows, write_rows_whole
from fewstep.measure import conversations
from fewstep.measure.conversations import Conversation, hold
from fewstep.models.load import save_network
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network

RECIPES = Path(__file__).parents[1] / "recipes"
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
ROWS = [
    {"id": f"{category}-{i}", "category": category, "turns": [f"what is {i}+{i}?", "are you sure of that?"]}
    for category in ("math", "stem")
    for i in range(2)
]


@pytest.fixture(scope="module")
def chat() -> ModuleType:
    return importlib.import_module("chat_compare")


def network(seed: int) -> Network:
    """Random, with distributions sharp enough that its answers vary from place to place."""
    found = tiny_network("autoregressive", head_scale=20, max_positions=512, seed=seed)
    with torch.no_grad():
        for weight in found.module.base_model.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    return found


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders plain and other with random weights, and a few prompts."""
    folder = tmp_path_factory.mktemp("toys")
    for seed, name in enumerate(("plain", "other")):
        save_network(network(seed), folder / name)
    write_rows_whole(folder / "prompts.jsonl", ROWS)
    return folder


def report_of(chat: ModuleType, toys: Path, results: Path, **options: Any) -> dict[str, Any]:
    given = {
        "baseline": f"plain={toys / 'plain'}",
        "contender": [f"jacobi={toys / 'plain'},decoder=jacobi,window=4", f"other={toys / 'other'},decoder=jacobi"],
        "prompts": toys / "prompts.jsonl", "max_new_tokens": 12, "timed": 2, "device": "cpu",
    }  # fmt: skip
    chat.compare(folder=results, **{**given, **options})
    return json.loads((results / "chat.json").read_text())


# --- the prompts ---


def test_the_prompts_are_ten_of_each_category_all_different(chat: ModuleType) -> None:
    conversations = chat.read_conversations(chat.PROMPTS)
    assert Counter(one.category for one in conversations) == dict.fromkeys(CATEGORIES, 10)
    assert all(one.id.startswith(f"{one.category}-") for one in conversations)
    rows = list(read_rows(chat.PROMPTS))
    assert len({row["id"] for row in rows}) == 80
    assert all(len(row["turns"]) == 2 and all(turn.strip() == turn != "" for turn in row["turns"]) for row in rows)
    assert len({turn.casefold() for row in rows for turn in row["turns"]}) == 160


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"id": "1", "category": "math", "turns": ["only one"]}], "must be two texts"),
        ([{"id": "1", "category": "math", "turns": ["one", " "]}], "must be two texts"),
        ([{"id": "1", "category": "math", "turns": ["a", "b"]}] * 2, "'1' occurs twice"),
        ([{"id": "1", "category": "all", "turns": ["a", "b"]}], "a name of the report"),
        ([{"id": "1", "turns": ["a", "b"]}], "line 1 has no field 'category'"),
        ([], "holds no conversation"),
    ],
)
def test_damaged_prompts_are_refused(chat: ModuleType, tmp_path: Path, rows: list[Any], sentence: str) -> None:
    write_rows_whole(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(FewstepError, match=sentence):
        chat.read_conversations(tmp_path / "prompts.jsonl")


# --- contenders ---


def test_a_contender_is_a_name_a_model_and_settings_in_their_types(chat: ModuleType) -> None:
    found = chat.greedy_contender("a name=folder/x,decoder=lookahead,window=8,ngram=3,role=autoregressive", 12)
    assert (found.name, found.model, found.role) == ("a name", "folder/x", "autoregressive")
    assert found.settings == {"decoder": "lookahead", "window": 8, "ngram": 3, "max_new_tokens": 12}
    assert chat.greedy_contender("plain=gsm-ar", 12).settings == {"max_new_tokens": 12}


@pytest.mark.parametrize(
    ("specification", "sentence"),
    [
        ("a=m,decoder=jacobi,windw=4", "'windw=4' in .* is no setting=value; did you mean 'window'"),
        ("a=m,decoder=jacoby", "unknown decoder 'jacoby'; did you mean 'jacobi'"),
        ("a=m,window=many", "--window must be an integer"),
        ("a=m,window", "'window' in 'm,window' is no setting=value"),
        ("a=m,window=1,window=2", "window is set twice"),
        ("a=m,temperature=0.7", "temperature is not a contender's own"),
        ("a=m,max_new_tokens=9", "max_new_tokens is not a contender's own"),
        ("folder/x", "names no contender"),
        ("a=", "names no contender"),
        ("a/b=m", "a name is not empty, holds no /"),
    ],
)
def test_a_misspelt_contender_is_a_sentence(chat: ModuleType, specification: str, sentence: str) -> None:
    with pytest.raises(FewstepError, match=sentence):
        chat.greedy_contender(specification, 12)


def test_the_command_takes_the_option_again_and_again(chat: ModuleType, toys: Path, tmp_path: Path) -> None:
    command = [
        "--results", tmp_path, "--baseline", f"a={toys}/plain",
        "--contender", f"b={toys}/plain,decoder=jacobi", "--contender", f"c={toys}/plain,decoder=jacobi,windw=3",
    ]  # fmt: skip
    wrong = f"'windw=3' in '{toys}/plain,decoder=jacobi,windw=3' is no setting=value; did you mean 'window'?"
    with pytest.raises(FewstepError, match=re.escape(wrong)):
        CliRunner().invoke(chat.app, [str(one) for one in command], catch_exceptions=False)


def test_models_that_cannot_be_compared_are_refused_before_anything_long(
    chat: ModuleType, toys: Path, tmp_path: Path
) -> None:
    silent = tiny_network("autoregressive")
    silent.tokenizer.chat_template = None
    save_network(silent, tmp_path / "silent")
    save_network(tiny_network("autoregressive", vocab_size=72), tmp_path / "wide")  # the same tokens and more
    save_network(tiny_network("autoregressive"), tmp_path / "foreign")
    file = tmp_path / "foreign" / "tokenizer.json"
    file.write_text(file.read_text().replace("<unused0>", "<new>"))

    def load(second: str) -> dict[str, LanguageModel]:
        contenders = [chat.greedy_contender(one, 12) for one in (f"a={toys}/plain", f"b={second}")]
        return chat.load_for_conversations(contenders, dtype="auto", device="cpu")

    assert list(load(f"{tmp_path}/wide")) == ["a", "b"]
    same = load(f"{toys}/plain,decoder=jacobi")
    assert same["a"] is same["b"]
    for second, sentence in {
        f"{tmp_path}/foreign": "b has other tokens than a",
        f"{tmp_path}/silent": "no chat template",
        f"{toys}/plain,decoder=jacobi,draft=x": "the jacobi decoder takes no draft",
        f"{toys}/nowhere": "no model",
    }.items():
        with pytest.raises(FewstepError, match=sentence):
            load(second)


# --- the whole way ---


def test_a_lossless_decoder_agrees_and_the_report_has_a_row_for_everybody(
    chat: ModuleType, toys: Path, tmp_path: Path
) -> None:
    told = report_of(chat, toys, tmp_path)
    plain, jacobi, other = told["rows"]
    assert [row["contender"] for row in told["rows"]] == ["plain", "jacobi", "other"]
    assert [row["decoder"] for row in told["rows"]] == ["autoregressive", "jacobi", "jacobi"]
    assert list(plain["groups"]) == ["all", "turn 1", "turn 2", "math", "stem"]
    for figures in jacobi["groups"].values():
        assert {figures["agreement"][name] for name in ("identical", "common_prefix", "similarity")} == {1.0}
    assert other["groups"]["all"]["agreement"]["identical"] < 1
    assert other["groups"]["all"]["agreement"]["similarity"] < 1
    assert plain["groups"]["all"]["n"] == 8
    assert plain["groups"]["math"]["n"] == plain["groups"]["turn 2"]["n"] == 4
    assert plain["groups"]["all"]["tokens_per_forward"] == pytest.approx(1, abs=0.1)
    assert plain["groups"]["all"]["batch_1"]["n"] == 4  # two turns of two conversations, from everywhere in the list
    assert plain["groups"]["stem"]["batch_1"]["n"] == 2
    assert plain["groups"]["stem"]["speed_ratio"] == 1
    assert all(0 <= row["groups"]["all"]["cut_off"] <= 1 for row in told["rows"])
    assert "Quality is not measured" in told["note"]

    document = (tmp_path / "chat.md").read_text()
    first_table = document.split("\n\n")[0].splitlines()
    assert [line.split(" | ")[1] for line in first_table[2:]] == ["plain", "jacobi", "other"]
    assert len({line.count("|") for line in document.splitlines() if line.startswith("|")}) == 1
    assert document.count("| stem |") == 3
    assert "No judge model is used" in document

    answers = list(read_rows(tmp_path / "answers.jsonl"))
    assert len(answers) == 3 * 8
    assert {len({row["text"] for row in answers[i : i + 2]}) for i in range(0, 24, 3)} == {1}


def test_the_second_turn_follows_the_baselines_answer_or_the_own_one(chat: ModuleType) -> None:
    several = [Conversation(id=row["id"], category="math", turns=tuple(row["turns"])) for row in ROWS]
    plain, other = (LanguageModel(network(seed)) for seed in (0, 1))
    settings = {"max_new_tokens": 12}
    baseline = hold(plain, several, settings)
    followed, own = (hold(other, several, settings, history=history) for history in (baseline.answers, None))
    assert followed.prompts == baseline.prompts
    assert own.prompts != baseline.prompts
    for conversation in several:
        first, second = conversation.keys
        question, reply, _ = own.prompts[second]
        assert reply == {"role": "assistant", "content": own.answers[first]["text"]}
        assert question == own.prompts[first][0]
        alone = other.generate(own.prompts[second], **settings)
        assert alone.token_ids == own.answers[second]["token_ids"]


def test_with_own_histories_only_first_answers_are_compared(chat: ModuleType, toys: Path, tmp_path: Path) -> None:
    told = report_of(chat, toys, tmp_path, history="own", per_category=1)
    jacobi = told["rows"][1]["groups"]
    assert jacobi["turn 2"]["agreement"] is None
    assert (jacobi["all"]["n"], jacobi["all"]["agreement"]["n"]) == (4, 2)
    assert jacobi["math"]["agreement"]["identical"] == 1
    assert "agreement is about first turns alone" in (tmp_path / "chat.md").read_text()


def test_conversations_are_held_once_and_those_of_others_are_refused(
    chat: ModuleType, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys = Path(shutil.copytree(toys, tmp_path / "toys"))
    first = report_of(chat, toys, tmp_path, timed=1)
    assert first["rows"][1]["groups"]["stem"]["batch_1"] is None  # the conversation that was timed is no "stem"
    (tmp_path / "conversations" / "jacobi.json").unlink()
    held = []
    monkeypatch.setattr(
        conversations, "hold", lambda *given, hold=hold, **more: held.append(given) or hold(*given, **more)
    )
    again = report_of(chat, toys, tmp_path, timed=1)
    assert len(held) == 1
    assert again["rows"][1]["groups"]["all"]["agreement"] == first["rows"][1]["groups"]["all"]["agreement"]
    with pytest.raises(FewstepError, match="max_new_tokens is 12 there and 11 here"):
        report_of(chat, toys, tmp_path, timed=1, max_new_tokens=11)
    plain, jacobi, other = f"plain={toys / 'plain'}", f"jacobi={toys / 'plain'},decoder=jacobi,window=4", toys / "other"
    with pytest.raises(FewstepError, match=r"other.json keeps a result .* \(follows is plain there and itself here"):
        report_of(chat, toys, tmp_path, baseline=f"other={other},decoder=jacobi", contender=[plain, jacobi])
    network(2).module.save_pretrained(toys / "plain")
    with pytest.raises(FewstepError, match=r"plain.json keeps a result of other weights"):
        report_of(chat, toys, tmp_path)
