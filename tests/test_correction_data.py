"""The sentences that correction is trained on, and the recipe that gathers them."""

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fewstep.errors import FewstepError
from fewstep.json_files import read_rows
from fewstep.models.fresh import SPECIAL_TOKENS
from fewstep.tasks.prose import SentenceFolder
from fewstep.tasks.registry import task_named
from fewstep.train.trainer import TrainSettings, train


class Pool:
    """The same in this process."""

    def __init__(self, _: int) -> None: ...

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None: ...

    def imap(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(function, items)

    imap_unordered = imap


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return importlib.import_module("correction_data")


@pytest.fixture
def gathered(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three pages of two packages, gathered."""
    texts = {f"page{i}": [f"The page of number {word} is the one that was read." for word in ("one", "two", str(i))]
             for i in range(400)}  # fmt: skip

    def documents(package: str) -> list[tuple[str, list[str]]]:
        made = [recipe.Document(f"{package}/{name}", [" ".join(those)]) for name, those in texts.items()]
        return [(one.name, list(one.sentences())) for one in made]

    monkeypatch.setattr(recipe, "documents", documents)
    monkeypatch.setattr(recipe, "Pool", Pool)
    recipe.sentences(tmp_path, package=["python3.11-doc", "python-flask-doc"])
    return tmp_path


def test_pages_are_read_and_no_other_files(recipe: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr/page.html").write_text("<p>The text of the page is read.</p>")
    (tmp_path / "usr/link.html").symlink_to("page.html")
    (tmp_path / "usr/page.txt").write_text("The text of other files is not read.")
    (page,) = recipe.pages(tmp_path, "package")
    assert page.name == "package/usr/page.html"
    assert list(page.sentences()) == ["The text of the page is read."]


def test_novels_are_read_from_a_data_file_of_r(recipe: ModuleType, tmp_path: Path) -> None:
    lines = [
        "EMMA",
        "",
        "CHAPTER I",
        "",
        "Emma Woodhouse was handsome and clever and",
        "rich with a home.",
        "",
        "CHAPTER II",
    ]
    content = b"X\n" + b"".join(b"\0\4\0\t" + len(line).to_bytes(4, "big") + line.encode() for line in lines)
    chunk = len(content).to_bytes(4, "big") + zlib.compress(content)
    (tmp_path / "Rdata.rdb").write_bytes(chunk + chunk)
    found = list(recipe.novels(tmp_path, "r"))
    assert [one.name for one in found] == ["r/0/0", "r/0/1", "r/0/2", "r/1/0", "r/1/1", "r/1/2"]
    assert list(found[1].sentences()) == ["Emma Woodhouse was handsome and clever and rich with a home."]


def test_a_document_is_in_one_part_for_ever(recipe: ModuleType) -> None:
    parts = [recipe.SPLIT.part(f"package/{i}") for i in range(2_000)]
    assert {part: parts.count(part) for part in ("train", "dev", "test")} == {"train": 1929, "dev": 22, "test": 49}
    assert recipe.SPLIT.part("tomcat10-docs/x.html") == "unseen"
    assert recipe.SPLIT.part("r-cran-janeaustenr/3/7") == "unseen"


def test_no_sentence_is_in_two_parts_even_with_other_numbers(recipe: ModuleType, gathered: Path) -> None:
    found = {part: SentenceFolder(gathered).read(part) for part in ("train", "dev", "test", "unseen")}
    every = [text for texts in found.values() for text in texts]
    assert len(every) == 3  # of 800 pages: two that differ in their words, and one that stands for all numbers
    assert len(found["unseen"]) == 3
    table = json.loads((gathered / "sources.json").read_text())
    assert table["python-flask-doc"]["unseen"] == 3
    assert table["python3.11-doc"] == {"licence": "PSF-2.0"}


def write_part(folder: Path, part: str, count: int) -> None:
    words = ["snow", "house", "river", "stone", "cloud", "garden", "letter", "window", "answer", "morning"]
    with gzip.open(folder / f"{part}.jsonl.gz", "wt") as stream:
        for i in range(count):
            a, b, c = words[i % 10], words[i // 10 % 10], words[i * 7 % 10]
            stream.write(
                json.dumps({"document": f"{part}/{i}", "text": f"The {a} of the {b} is not a {c}, they say."}) + "\n"
            )


def test_tokenizer_problems_and_rows(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for part, count in (("train", 300), ("dev", 20), ("test", 20), ("unseen", 20)):
        write_part(tmp_path, part, count)
    recipe.problems(tmp_path, count=8, vocab_size=320)
    tok = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tok.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert (tok.pad_token_id, tok.eos_token_id, tok.mask_token_id, tok.bos_token_id) == (0, 1, 2, 3)
    for text in ("The  snow\n of ’é’ 🙂.", " x"):
        assert tok.decode(tok.encode(text, add_special_tokens=False)) == text
    asked = task_named("correction").problems(data=tmp_path / "test-problems.jsonl")
    assert 0 < len(asked) <= 8
    assert any(problem.question != problem.answer for problem in asked)
    monkeypatch.setattr(recipe, "Pool", Pool)
    recipe.rows(tmp_path, tmp_path / "rows.jsonl", copies=2, limit=10, workers=1)
    rows = list(read_rows(tmp_path / "rows.jsonl", required=("prompt", "completion")))
    assert len(rows) == 20
    assert [row["completion"] for row in rows[:10]] == [row["completion"] for row in rows[10:]]
    assert [row["prompt"] for row in rows[:10]] != [row["prompt"] for row in rows[10:]]


def test_what_was_not_gathered_is_told(recipe: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"train.jsonl.gz is not there; gather the sentences first"):
        recipe.rows(tmp_path, tmp_path / "rows.jsonl")


def test_networks_of_every_role_are_trained_and_measured(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    training = importlib.import_module("correction")
    data, runs = tmp_path / "data", tmp_path / "runs"
    data.mkdir()
    for part, count in (("train", 60), ("dev", 9), ("test", 9), ("unseen", 9)):
        write_part(data, part, count)
    recipe.problems(data, count=3, vocab_size=320)
    training.tables(data, runs, copies=2, workers=1)
    assert len(training.read_tables(runs / "tables")) == 120

    def two_steps(seconds: float, network: Any, made: Any, settings: TrainSettings, output: Path) -> None:
        train(network, made(2), replace(settings, max_steps=2, warmup_steps=1), output)

    monkeypatch.setattr(training, "train_for", two_steps)
    small = {"width": 32, "layers": 1, "rows": 1, "row_length": 256}
    for name in training.TRAININGS:
        training.train(name, runs, prompts=8, **small)
    training.measure(data, runs, results=tmp_path / "results", part=["test"], timed=0, batch_size=4)
    rows = json.loads((tmp_path / "results/test.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["left as it is", *training.CONTENDERS]
    assert all(row["n"] == 3 and 0 <= row["restored"][0] <= 1 for row in rows)
    assert {row["num_forwards_mean"] for row in rows if row["contender"] == "embedding, 2 passes"} == {2}
    assert rows[0]["percent_of_right"] in (None, 100)
    assert rows[0]["percent_of_wrong"] in (None, 0)
