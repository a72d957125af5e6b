"""The example of retrieval: what it finds, and that it answers through the server with its sources."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.networks import network
from helpers.serving import running

from fewstep.engine.language_model import LanguageModel

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "rag"
EXPECTED = [
    "toys",
    "toys",
    "bakery",
    "bakery",
    "cousins",
    "cousins",
    "clinic",
    "kitchen",
    "kitchen",
    "drinks",
    "school",
]
EXPECTED += ["circus"]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "rag.py"))


def test_each_question_finds_the_passage_that_answers_it(example: dict[str, Any]) -> None:
    documents = example["Documents"](FOLDER / "notes")
    questions = (FOLDER / "questions.txt").read_text(encoding="utf-8").splitlines()
    assert [documents.find(question, 1)[0][0] for question in questions] == [f"{name}.txt" for name in EXPECTED]
    assert documents.find("zebra?", 3) == []


def test_a_chat_model_is_given_numbered_sources(example: dict[str, Any]) -> None:
    prompt = example["prompt_of"]("why?", [("a.md", "one"), ("b.md", "two")], bare=False)
    assert "[1] one\n\n[2] two\n\nwhy?" in prompt
    assert example["prompt_of"]("why?", [("a.md", "one"), ("b.md", "two")], bare=True) == "one why?"


def test_answers_come_with_sources_and_times(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {name: LanguageModel(network()) for name in ("student", "teacher")}
    with running(models) as server:
        arguments = ["--server", f"{server.url}/v1", "--models", *models, "--passages", "1"]
        monkeypatch.setattr(sys, "argv", ["rag.py", *arguments, "how many marbles?", "zebra?"])
        example["main"]()
    out = capsys.readouterr().out
    assert "> how many marbles?\n" in out
    assert "[1] toys.txt" in out
    assert "no document has its words" in out
    assert "student: median of 1 answers" in out
    assert "teacher: median of 1 answers" in out


def test_an_empty_folder_is_said(example: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no"):
        example["Documents"](tmp_path)


def test_it_is_as_short_as_it_says() -> None:
    assert len((FOLDER / "rag.py").read_text(encoding="utf-8").splitlines()) <= 80
