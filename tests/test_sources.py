"""A command never replaces what it reads, however the two are named."""

import json
import os
from pathlib import Path

import pytest

from fewstep.cli.main import main
from fewstep.cli.sources import Touched, Touches, check_sources
from fewstep.errors import FewstepError
from fewstep.models.names import BUNDLED

READS, MODEL, WRITES, REPLACES, FILLS = (
    Touches.READS, Touches.READS_MODEL, Touches.WRITES, Touches.REPLACES, Touches.FILLS,
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with data, a base, an adapter for it, a run and links."""
    monkeypatch.chdir(tmp_path)
    files = (
        "data.jsonl", "store/blob", "models/base/config.json", "models/base/tokenizer.json", "models/base/eval.json",
        "models/adapter/adapter_model.safetensors", "traj/manifest.json", "traj/shard-00000.parquet",
        "run/samples.jsonl", "run/rows.jsonl", "run/logs/old.jsonl", "models/base/sub/x", "heads/medusa.json",
        "gsm8k/test.jsonl", "models/base/tekken.json", "models/base/test.jsonl",
    )  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    config = {"base_model_name_or_path": "../base"}
    (tmp_path / "models/adapter/adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "link.jsonl").symlink_to("data.jsonl")
    os.link(tmp_path / "data.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "linked").symlink_to("models", target_is_directory=True)
    (tmp_path / "models/base/model.safetensors").symlink_to("../../store/blob")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((READS, "data.jsonl"), (WRITES, "data.jsonl")),
        ((READS, "data.jsonl"), (WRITES, "models/../data.jsonl")),
        ((READS, "link.jsonl"), (WRITES, "data.jsonl")),
        ((READS, "data.jsonl"), (WRITES, "link.jsonl")),
        ((READS, "data.jsonl"), (WRITES, "hard.jsonl")),
        ((MODEL, "models/base"), (WRITES, "models/base/config.json")),
        ((MODEL, "models/base"), (WRITES, "linked/base/tokenizer.json")),
        ((MODEL, "models/base,threshold=0.9"), (WRITES, "models/base/config.json")),
        ((MODEL, "models/base"), (WRITES, "store/blob")),
        ((MODEL, "models/adapter"), (WRITES, "models/base/config.json")),
        ((MODEL, "models/base"), (REPLACES, "models")),
        ((MODEL, "linked/base"), (REPLACES, "models")),
        ((MODEL, "models/base"), (REPLACES, "linked")),
        ((MODEL, "linked/base"), (REPLACES, ".")),
        ((MODEL, "models/base"), (REPLACES, "models/base")),
        ((MODEL, "models/base"), (REPLACES, "models/base/sub")),
        ((MODEL, "models/base"), (REPLACES, "store")),
        ((MODEL, "models/adapter"), (REPLACES, "models/base")),
        ((MODEL, "models/base"), (WRITES, "models/base/tekken.json")),
        ((MODEL, "heads"), (WRITES, "heads/medusa.json")),
        ((READS, "gsm8k"), (WRITES, "gsm8k/test.jsonl")),
        ((READS, "traj"), (WRITES, "traj/manifest.json")),
        ((READS, "traj"), (WRITES, "traj/shard-00000.parquet")),
        ((READS, "traj/shard-00000.parquet"), (FILLS, "traj")),
        ((READS, "run/samples.jsonl"), (FILLS, "run")),
        ((READS, "run/logs/old.jsonl"), (FILLS, "run")),
        ((MODEL, "models/base"), (FILLS, "models/base")),
        ((MODEL, "gsm-student"), (WRITES, str(BUNDLED / "gsm-student" / "config.json"))),
    ],
)
def test_what_is_read_is_not_replaced(place: Path, source: tuple[Touches, str], target: tuple[Touches, str]) -> None:
    touched = [Touched("--read", source[0], Path(source[1])), Touched("--write", target[0], Path(target[1]))]
    with pytest.raises(FewstepError, match=r"^--write .* --read .*, and would replace it; name another place$"):
        check_sources(touched)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((READS, "data.jsonl"), (WRITES, "out.jsonl")),
        ((READS, "missing.jsonl"), (WRITES, "missing.jsonl")),
        ((READS, "/dev/stdin"), (WRITES, "/dev/stdout")),
        ((READS, "data.jsonl"), (WRITES, "-")),
        ((MODEL, "models/base"), (WRITES, "models/base/eval.json")),  # a report that an earlier run laid there
        ((MODEL, "models/base"), (WRITES, "models/base/test.jsonl")),
        ((MODEL, "models/base"), (WRITES, "models/base/new.json")),
        ((MODEL, "models/base"), (REPLACES, "models/base/new")),
        ((MODEL, "models/base"), (REPLACES, "models/adapter")),
        ((READS, "run/rows.jsonl"), (FILLS, "run")),
        ((MODEL, "models/base"), (FILLS, "models/base/sub")),
        ((READS, "traj"), (FILLS, "traj/student")),
        ((MODEL, "some/hub-id"), (WRITES, "out.jsonl")),
    ],
)
def test_what_harms_no_source_is_allowed(place: Path, source: tuple[Touches, str], target: tuple[Touches, str]) -> None:
    check_sources([Touched("--read", source[0], Path(source[1])), Touched("--write", target[0], Path(target[1]))])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((WRITES, "r.json"), (WRITES, "./r.json")),
        ((WRITES, "data.jsonl"), (WRITES, "link.jsonl")),
        ((WRITES, "plot.svg"), (Touches.DRAWS, "plot.png")),
        ((REPLACES, "new"), (WRITES, "new")),
        ((REPLACES, "new"), (WRITES, "new/config.json")),
        ((FILLS, "traj"), (WRITES, "traj/manifest.json")),
    ],
)
def test_no_file_is_written_twice(place: Path, first: tuple[Touches, str], second: tuple[Touches, str]) -> None:
    touched = [Touched("--one", first[0], Path(first[1])), Touched("--two", second[0], Path(second[1]))]
    for order in (touched, touched[::-1]):
        with pytest.raises(FewstepError, match=r"would write the same file; name another$"):
            check_sources(order)
    check_sources([Touched("--one", WRITES, Path("/dev/null")), Touched("--two", WRITES, Path("/dev/null"))])


@pytest.mark.parametrize(
    "line",
    [
        "generate --input data.jsonl --output link.jsonl",
        "generate --model models/base --json models/base/config.json 12",
        "eval --data data.jsonl --records data.jsonl",
        "eval --data data.jsonl --json r.json --records r.json",
        "eval --model models/adapter --json models/base/config.json",
        "eval --model models/adapter --decoder medusa --heads traj --json traj/manifest.json",
        "compare gsm-student models/base,threshold=0.5 --json models/base/config.json",
        "calibrate --model models/base --output models/base --overwrite",
        "calibrate --reference models/adapter --output models/base --overwrite",
        "infill --model models/base --prefix a --suffix b --num-tokens 2 --json models/base/config.json",
        "demo --student models/base --json models/base/config.json",
        "collect --data data.jsonl --output traj --json data.jsonl",
        "collect --data traj/shard-00000.parquet --output traj",
        "collect --data data.jsonl --student models/base --output models/base",
        "import models/base models --overwrite",
        "import models/base models/base --overwrite",
        "merge models/adapter --output models/base --overwrite",
        "merge models/adapter --output models --overwrite",
        "train sft --max-steps 1 --model gsm-ar --data run/samples.jsonl --output run",
        "train sft --max-steps 1 --model gsm-ar --data data.jsonl --output run --json data.jsonl",
        "train cllm --max-steps 1 --trajectories traj --output traj",
        "train medusa --max-steps 1 --model models/base --data data.jsonl --output models/base",
        "train sft --max-steps 1 --config run/logs/old.jsonl --output run",
    ],
)
def test_every_command_refuses_before_any_work(place: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run/logs/old.jsonl").write_text("model: gsm-ar\ndata: data.jsonl\n")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "would replace it" in told or "would write the same file" in told, told
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_a_deeply_nested_adapter_config_is_left_to_what_loads_it(place: Path) -> None:
    (place / "models/adapter/adapter_config.json").write_text("[" * 100_000)
    check_sources([Touched("--model", MODEL, Path("models/adapter")), Touched("--output", WRITES, Path("out"))])
