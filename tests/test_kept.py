"""Answers are kept as they come: a run that was cut off goes on, and never with what others made."""

import json
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run

from fewstep.engine.answers import answer_all, check_prompts
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.kept import kept_path, kept_results
from fewstep.measure.evaluate import evaluate, sweep
from fewstep.models.load import save_network
from fewstep.models.tiny import tiny_network
from fewstep.tasks.problems import Problem

SETTINGS: dict[str, Any] = {"max_new_tokens": 16}
MADE_BY = {"weights": "a"}


def keep(target: Path, made_by: dict[str, Any], **results: Any) -> None:
    """Keep some results, and be killed."""
    with suppress(ZeroDivisionError), kept_results(target, lambda: made_by) as kept:
        for key, result in results.items():
            kept.add(key, result)
        raise ZeroDivisionError


def found(target: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    with suppress(ZeroDivisionError), kept_results(target, lambda: made_by) as kept:
        raise ZeroDivisionError
    return kept.results


def test_results_are_found_again_until_the_target_is_written(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    keep(target, {"weights": "a"}, one={"text": "größer"}, two=[2])
    keep(target, {"weights": "a"}, three=3)
    assert found(target, {"weights": "a"}) == {"one": {"text": "größer"}, "two": [2], "three": 3}
    with kept_results(target, lambda: {"weights": "a"}) as kept:
        assert kept.num_found == 3
        assert kept.under("t").get("wo") == [2]
        target.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_results_of_others_are_refused_and_stay(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    keep(target, {"weights": "a", "settings": {"steps": 4}}, one=1)
    sentence = r"keeps answers of a run with other settings \(settings\.steps is 4 there and 8 here, weights is a there"
    with (
        pytest.raises(FewstepError, match=sentence),
        kept_results(target, lambda: {"weights": "b", "settings": {"steps": 8}}),
    ):
        pass
    assert found(target, {"weights": "a", "settings": {"steps": 4}}) == {"one": 1}


def test_a_file_without_results_is_begun_anew_for_others(tmp_path: Path) -> None:
    kept_path(tmp_path / "out").write_bytes(b'{"made_by": {"weights": "a"}}\n')
    keep(tmp_path / "out", {"weights": "b"}, one=1)
    assert found(tmp_path / "out", {"weights": "b"}) == {"one": 1}


@pytest.mark.parametrize(
    "tail",
    [
        b'{"key": "two", "resu',
        b'{"key": "two", "result": 2}',
        b"\xff\n",
        b"[]\n",
        b'{"key": [[]], "result": 2}\n',
        b"\0" * 40,
    ],
)
def test_a_line_that_was_cut_off_is_made_again(tmp_path: Path, tail: bytes) -> None:
    keep(tmp_path / "out", MADE_BY, one=1)
    with kept_path(tmp_path / "out").open("ab") as stream:
        stream.write(tail)
    keep(tmp_path / "out", MADE_BY, three=3)
    assert found(tmp_path / "out", MADE_BY) == {"one": 1, "three": 3}


@pytest.mark.parametrize("damaged", [b"\xff\0{", b'{"key": "two", "resu', b"", b"[1]"])
def test_a_damaged_line_takes_no_whole_line_with_it(tmp_path: Path, damaged: bytes) -> None:
    keep(tmp_path / "out", MADE_BY, one=1, two=2, three=3)
    lines = kept_path(tmp_path / "out").read_bytes().split(b"\n")
    kept_path(tmp_path / "out").write_bytes(b"\n".join([*lines[:2], damaged, *lines[3:]]))
    assert found(tmp_path / "out", MADE_BY) == {"one": 1, "three": 3}
    keep(tmp_path / "out", MADE_BY, two=4)
    assert found(tmp_path / "out", MADE_BY) == {"one": 1, "two": 4, "three": 3}


@pytest.mark.parametrize("first", [b"", b'{"ma', b'{"made_by": {', b'{"made_by": {"weights": "a"}}'])
def test_a_first_line_that_was_cut_off_is_written_again(tmp_path: Path, first: bytes) -> None:
    kept_path(tmp_path / "out").write_bytes(first)
    keep(tmp_path / "out", MADE_BY, one=1)
    assert found(tmp_path / "out", MADE_BY) == {"one": 1}


@pytest.mark.parametrize(
    "text",
    ['{"id": 1, "prompt": "2"}\n', '{"id": 1}', "notes", '{"made_by": 3}', '{"made_by": {}, "a": 1}', "[]\n", "\n"],
)
def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path, text: str) -> None:
    kept_path(tmp_path / "out").write_text(text)
    with pytest.raises(FewstepError, match="holds no kept results"), kept_results(tmp_path / "out", lambda: MADE_BY):
        pass
    assert kept_path(tmp_path / "out").read_text() == text


def test_two_processes_do_not_add_to_one_file(tmp_path: Path) -> None:
    with kept_results(tmp_path / "out", lambda: MADE_BY) as kept:
        kept.add("one", 1)
        with pytest.raises(FewstepError, match="another process"), kept_results(tmp_path / "out", lambda: MADE_BY):
            pass
        kept.add("two", 2)
    assert not kept_path(tmp_path / "out").exists()


def interrupt(target: Path, **results: Any) -> None:
    with kept_results(target, lambda: MADE_BY) as kept:
        for key, result in results.items():
            kept.add(key, result)
        raise KeyboardInterrupt


def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    sentence = r"^interrupted; answers kept in .*out\.kept: 1; repeat the command to go on$"
    with pytest.raises(KeyboardInterrupt, match=sentence):
        interrupt(tmp_path / "out", one=1)


def test_an_interrupt_before_the_first_answer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        interrupt(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_for_a_device() -> None:
    with kept_results(Path("/dev/null"), lambda: MADE_BY) as kept, kept_results(None, lambda: MADE_BY) as without:
        kept.add("one", 1)
        without.add("one", 1)
    assert not Path("/dev/null.kept").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with kept_results(tmp_path / "out", lambda: MADE_BY) as kept, open("/dev/full", "wb") as full:
        kept._stream = full
        with pytest.raises(FewstepError, match="the disk is full"):
            kept.add("one", "x" * 100_000)
        kept._stream = None


# Answers


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return LanguageModel(tiny_network("block_causal", head_scale=30.0, max_positions=256))


PROMPTS = [f"{i} + 2 =" for i in range(5)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_resumed_run_answers_only_the_rest_and_answers_alike(
    student: LanguageModel, tmp_path: Path, batch_size: int
) -> None:
    whole = answer_all(student, PROMPTS, batch_size=batch_size, **SETTINGS)
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise ZeroDivisionError

    with suppress(ZeroDivisionError), kept_results(tmp_path / "out", lambda: MADE_BY) as kept:
        answer_all(student, PROMPTS, batch_size=batch_size, kept=kept, progress=stop, **SETTINGS)
    with kept_results(tmp_path / "out", lambda: MADE_BY) as kept:
        resumed = answer_all(student, PROMPTS, batch_size=batch_size, kept=kept, **SETTINGS)
    assert resumed.num_kept == 3
    assert [(one.text, one.num_forwards) for one in resumed.answers] == [
        (one.text, one.num_forwards) for one in whole.answers
    ]
    assert len(resumed.round_seconds) >= len(whole.round_seconds)
    assert resumed.wall_seconds > 0


def test_each_point_of_a_sweep_is_kept_apart(student: LanguageModel, tmp_path: Path) -> None:
    problems = [Problem(str(i), prompt, "1") for i, prompt in enumerate(PROMPTS)]
    options: dict[str, Any] = {"thresholds": (0.3, 0.9), "batch_size": 4, **SETTINGS}
    plain = sweep(student, problems, **options)
    with suppress(ZeroDivisionError), kept_results(tmp_path / "out", lambda: MADE_BY) as kept:
        sweep(student, problems, kept=kept, **options)
        raise ZeroDivisionError
    with kept_results(tmp_path / "out", lambda: MADE_BY) as kept:
        again = sweep(student, problems, kept=kept, **options)
    assert [report.num_kept for report in again] == [5, 5]
    assert [[record.text for record in report.records] for report in again] == [
        [record.text for record in report.records] for report in plain
    ]
    assert again[0].to_json()["answered_earlier"] == 5


# Lengths


def test_a_long_row_is_named_before_any_is_answered(student: LanguageModel) -> None:
    with pytest.raises(FewstepError, match=r"^rows line 2: a prompt of .* exceed the 256 positions"):
        check_prompts(student, ["1", "1 " * 300], ["rows line 1", "rows line 2"], **SETTINGS)
    asked: list[int] = []
    problems = [Problem("a", "1", "1"), Problem("b", "1 " * 300, "1")]
    with pytest.raises(FewstepError, match=r"^problem 'b': "):
        evaluate(student, problems, progress=lambda: asked.append(1), **SETTINGS)
    assert asked == []


@pytest.mark.parametrize("role", ["block_causal", "bidirectional", "autoregressive"])
def test_a_limit_is_that_of_what_was_asked_for_not_of_whole_blocks(role: str) -> None:
    lm = LanguageModel(tiny_network(role, head_scale=30.0, max_positions=64))  # type: ignore[arg-type]
    length = len(lm.encode("1", raw=True))
    prompt = "1" * (64 - 3 - length + 1)
    room = 64 - len(lm.encode(prompt, raw=True))
    assert lm.generate(prompt, raw=True, max_new_tokens=room).num_tokens <= room
    with pytest.raises(FewstepError, match="exceed the 64 positions"):
        lm.generate(prompt, raw=True, max_new_tokens=room + 1)


# Commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_network(tiny_network("block_causal", head_scale=30.0, max_positions=256), folder / "student")
    rows = ({"id": f"p{i}", "prompt": f"{i} + 2 =", "question": f"{i} + 2 =", "answer": i + 2} for i in range(6))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


COMMANDS = {
    "generate": "generate --model student --input rows.jsonl --output out.jsonl --max-new-tokens 16",
    "generate in batches": "generate --model student --input rows.jsonl --output out.jsonl --max-new-tokens 16 "
    "--batch-size 4",
    "eval": "eval --model student --data rows.jsonl --records out.jsonl --json out.json --max-new-tokens 16",
    "compare": "compare student,max_new_tokens=16 student,threshold=0.3,max_new_tokens=16 --data rows.jsonl "
    "--json out.json",
}


def without_times(path: Path) -> Any:
    """What a file says, less what depends on the moment."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: clean(one)
                for name, one in value.items()
                if not name.startswith("seconds") and name not in ("tokens_per_second", "step_ms", "answered_earlier")
            }
        return [clean(one) for one in value] if isinstance(value, list) else value

    text = path.read_text()
    return clean(json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()])


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_a_command_that_was_interrupted_goes_on(
    folder: Path, line: str, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(folder)
    outputs = [folder / name for name in ("out.jsonl", "out.json") if name in line.split()]
    assert run(*line.split()).code == 0
    whole = [without_times(path) for path in outputs]
    for path in outputs:
        path.unlink()
    generate, count = LanguageModel.generate, 0

    def interrupted(self: LanguageModel, prompt: Any, **options: Any) -> Any:
        told = options.get("on_output")

        def tell(index: int, output: Any) -> None:
            nonlocal count
            told(index, output)
            count += 1
            if count == 4:
                signal.raise_signal(signal.SIGTERM)

        return generate(self, prompt, **{**options, **({"on_output": tell} if told else {})})

    monkeypatch.setattr(LanguageModel, "generate", interrupted)
    done = run(*line.split())
    assert done.code == 143
    assert ".kept: 4; repeat the command to go on\n" in done.err
    assert not any(path.exists() for path in outputs)
    assert "of a run with other settings (" in run(*line.split(), "--dtype", "bfloat16").err
    done = run(*line.split())
    assert done.code == 0, done.err
    assert "of 6 answers are kept in" in done.err or "of 12 answers are kept in" in done.err
    assert [without_times(path) for path in outputs] == whole
    for path in outputs:
        path.unlink()
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl", "student"]


def test_an_interrupted_collection_tells_of_its_shards_and_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    from fewstep.train import collect

    save_network(tiny_network("bidirectional", head_scale=30.0, max_positions=256), tmp_path / "teacher")
    line = f"collect --model {tmp_path}/teacher --data {folder}/rows.jsonl --output {tmp_path}/traj --shard-size 2 "
    line += "--max-new-tokens 8"
    of_row, count = collect.row_seed, 0

    def interrupted(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count == 5:  # in the third shard, while the second may still be written
            signal.raise_signal(signal.SIGTERM)
        return of_row(*arguments)

    monkeypatch.setattr(collect, "row_seed", interrupted)
    done = run(*line.split())
    assert done.code == 143
    assert re.search(r"interrupted; finished shards kept in .*traj: [12]; repeat the command to go on\n$", done.err), (
        done.err
    )
    done = run(*line.split())
    assert done.code == 0
    assert "3 shards (1 made now)" in done.err or "3 shards (2 made now)" in done.err
