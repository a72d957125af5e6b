"""The command line as a user meets it, on tiny random networks saved to folders."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Run, fewstep_process
from helpers.files import read_lines, write_lines

import fewstep
from fewstep.cli import demo
from fewstep.cli.option_names import naming_options
from fewstep.errors import FewstepError
from fewstep.kept import kept_path
from fewstep.measure.timing import Timing
from fewstep.models.load import save_network
from fewstep.models.tiny import tiny_network
from fewstep.tasks.registry import TASKS
from fewstep.tasks.scoring import METRICS

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of random networks: teacher, student, causal."""
    folder = tmp_path_factory.mktemp("networks")
    roles = {"teacher": "bidirectional", "student": "block_causal", "causal": "autoregressive"}
    for name, role in roles.items():
        save_network(tiny_network(role, head_scale=30.0, max_positions=1024), folder / name)  # type: ignore[arg-type]
    return {name: str(folder / name) for name in roles}


# The program itself


def test_help_lists_every_command(run: Run) -> None:
    shown = run("--help")
    assert shown.code == 0
    for (
        command
    ) in "demo chat generate infill correct collect train eval compare bench calibrate merge models doctor".split():
        assert f" {command} " in shown.out


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "chat",
        "generate",
        "infill",
        "correct",
        "collect",
        "eval",
        "compare",
        "bench",
        "calibrate",
        "merge",
        "models",
        "doctor",
        "train",
    ],
)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    shown = run(command, "--help")
    assert shown.code == 0
    assert f"fewstep {command}" in shown.out


@pytest.mark.parametrize("command", ["diffusion", "cdlm", "sft"])
def test_every_training_explains_itself(run: Run, command: str) -> None:
    shown = run("train", command, "--help")
    assert shown.code == 0
    assert "--learning-rate" in shown.out
    assert "--json" in shown.out


def test_square_brackets_stand_in_the_help(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert "such as [https://example.org]" in run("serve", "--help").out


@pytest.mark.parametrize("command", ["diffusion", "cdlm", "sft", "cllm", "medusa", "embedding"])
def test_every_option_of_training_says_what_it_is(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    lines = [line.strip("│ ") for line in run("train", command, "--help").out.splitlines() if line.startswith("│ --")]
    assert len(lines) > 20
    said = {line.split()[0]: re.split(" {2,}", line)[-1] for line in lines}
    described = {option: re.sub(r"(Required|Default: .*)\.$", "", text).strip() for option, text in said.items()}
    assert [option for option, text in described.items() if not text.endswith(".")] == []


@pytest.mark.parametrize("command", ["cdlm", "diffusion"])
def test_every_option_of_diffusion_training_is_documented(run: Run, command: str) -> None:
    documented = set(re.findall(r"--[a-z-]+", (REPOSITORY / "docs" / "cdlm.md").read_text(encoding="utf-8")))
    options = set(re.findall(r"--[a-z-]+", run("train", command, "--help").out)) - {"--help"}
    assert {option for option in options if not option.startswith("--no-")} <= documented


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == fewstep.__version__


def test_a_misspelt_command_is_an_error_with_a_suggestion(run: Run) -> None:
    assert "'generate'" in run("genrate").sentence()
    assert "'cdlm'" in run("train", "cdml").sentence()


@pytest.mark.parametrize(
    "arguments",
    [("generate", "--treshold", "0.5"), ("eval", "--treshold", "0.5"), ("train", "sft", "--larning-rate", "1")],
)
def test_a_misspelt_option_is_an_error_with_a_suggestion(run: Run, arguments: tuple[str, ...]) -> None:
    sentence = run(*arguments).sentence()
    assert arguments[-2] in sentence
    assert "--threshold" in sentence or "--learning-rate" in sentence


@pytest.mark.parametrize("terminal", [False, True])
def test_models_are_listed_in_aligned_columns_that_fit_80(
    run: Run, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    header, *lines = re.sub(r"\x1b\[\d*m", "", run("models").out).splitlines()
    lines = [line for line in lines if not line.startswith("─")]
    assert [line.split()[0] for line in lines] == ["gsm-ar", "gsm-cllm", "gsm-draft", "gsm-student", "gsm-teacher"]
    assert len(header) <= 80
    assert all(
        line[header.index("role") :].startswith(("autoregressive", "bidirectional", "block_causal")) for line in lines
    )
    assert all(line[header.index("what it is") :].startswith("A ") for line in lines)
    assert {len(line) for line in lines} == {len(header)}
    blocks = [line[: header.index("block") + len("block")].split()[-1] for line in lines]
    assert [block if block.isdecimal() else None for block in blocks] == [None, None, None, "32", "16"]


WITHOUT_TORCH = """
import sys
from fewstep.cli.main import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "--model", "gsm-studnt"],
        ["collect", "--model", "gsm-studnt", "--data", "x", "--output", "y"],
        ["compare", "gsm-studnt,threshold=0.5", "gsm-teacher"],
        ["demo", "--student", "gsm-studnt"],
        ["merge", "gsm-studnt", "--output", "y"],
    ],
)
def test_a_misspelt_model_is_found_before_anything_heavy_is_imported(arguments: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2, ended.stderr
    assert (
        ended.stderr
        == "fewstep: no model 'gsm-studnt', neither a folder nor a bundled name; did you mean 'gsm-student'?\n"
    )


WITHOUT_EXTRA = """
import importlib.abc, importlib.util, sys
HIDDEN = {"pyarrow", "tensorboard"}
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(name=name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name.split(".")[0] in HIDDEN else find_spec(name, *package)
sys.meta_path.insert(0, Hide())
from fewstep.cli.main import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as stopped:
        print(f"exit code {stopped.code or 0}")
"""


def test_training_explains_itself_without_its_extra_and_names_it() -> None:
    wanting = "train sft --model gsm-ar --data rows.jsonl --output out --max-steps 1"
    command = [sys.executable, "-c", WITHOUT_EXTRA, "train --help", "train cdlm --help", wanting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.findall("exit code .", done.stdout) == ["exit code 0", "exit code 0", "exit code 2"], done.stderr
    assert done.stdout.count("Usage: fewstep train") == 2
    assert "pip install 'fewstep[train]'" in done.stderr


def test_models_and_doctor_report(run: Run, tmp_path: Path) -> None:
    assert run("models", "--json", tmp_path / "m.json").code == 0
    assert isinstance(json.loads((tmp_path / "m.json").read_text()), list)
    shown = run("doctor", "--json", tmp_path / "d.json")
    assert shown.code == 0
    report = json.loads((tmp_path / "d.json").read_text())
    assert report["packages"]["torch"] == torch.__version__
    assert report["self_check"].startswith("ok")


# generate and infill


def test_generate_prints_what_python_returns(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    shown = run(
        "generate", "--model", networks["student"], "2 + 2 =", "--max-new-tokens", 12, "--json", tmp_path / "r.json"
    )
    expected = fewstep.load(networks["student"]).generate("2 + 2 =", max_new_tokens=12)
    assert shown.out == expected.text + "\n"
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["num_tokens"], report["num_forwards"]) == (expected.num_tokens, expected.num_forwards)
    assert report["decoder"] == "block"
    tokens, passes = expected.num_tokens, expected.num_forwards
    assert re.fullmatch(
        rf"{tokens} tokens in {passes} passes \({tokens / passes:.1f} per pass\), \d+\.\d\d s\n", shown.err
    )


def test_generate_reports_the_settings_that_took_effect(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    network = tiny_network("block_causal")
    save_network(network.with_role(replace(network.role, threshold=0.97, gaps=2)), tmp_path / "student")
    report = tmp_path / "r.json"

    def effective(model: object, *options: object) -> tuple[Any, ...]:
        shown = run("generate", "2", "--model", model, "--max-new-tokens", 8, "--json", report, *options)
        assert shown.code == 0, shown.err
        written = json.loads(report.read_text())
        return tuple(written[key] for key in ("decoder", "threshold", "gaps", "block_size", "steps"))

    assert effective(tmp_path / "student") == ("block", 0.97, 2, 4, None)
    assert json.loads(report.read_text())["settings"] == {"max_new_tokens": 8}
    assert effective(tmp_path / "student", "--threshold", 0.5, "--block-size", 2) == ("block", 0.5, 2, 2, None)
    assert effective(networks["teacher"], "--steps", 4) == ("diffusion", None, None, 4, 4)
    assert effective(networks["causal"]) == ("autoregressive", None, None, None, None)


def test_generate_takes_its_settings_from_options(run: Run, networks: dict[str, str]) -> None:
    options = (
        "--decoder",
        "diffusion",
        "--steps",
        6,
        "--order",
        "entropy",
        "--temperature",
        0.7,
        "--top-k",
        8,
        "--seed",
        3,
    )
    shown = run("generate", "--model", networks["teacher"], "--max-new-tokens", 12, *options, "2 + 2 =")
    expected = fewstep.load(networks["teacher"]).generate(
        "2 + 2 =", max_new_tokens=12, decoder="diffusion", steps=6, order="entropy", temperature=0.7, top_k=8, seed=3
    )
    assert shown.out == expected.text + "\n"


def test_dreams_sampler_takes_its_settings_from_options(run: Run, networks: dict[str, str]) -> None:
    model = ("--model", networks["teacher"], "--max-new-tokens", 12)
    shown = run("generate", *model, "--steps", 12, "--alg", "entropy", "--alg-temp", 2.5, "--seed", 3, "2 + 2 =")
    settings: dict[str, Any] = {"max_new_tokens": 12, "steps": 12, "alg": "entropy", "seed": 3}
    lm = fewstep.load(networks["teacher"])
    assert shown.out == lm.generate("2 + 2 =", **settings, alg_temp=2.5).text + "\n"
    assert shown.out != lm.generate("2 + 2 =", **settings).text + "\n"


def test_gaps_are_an_option_of_a_student(run: Run, networks: dict[str, str]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "threshold": 0.3, "gaps": 1}
    shown = run(
        "generate", "--model", networks["student"], "--max-new-tokens", 12, "--threshold", 0.3, "--gaps", 1, "2 + 2 ="
    )
    expected = fewstep.load(networks["student"]).generate("2 + 2 =", **options)
    assert shown.out == expected.text + "\n"
    assert shown.err.startswith(f"{expected.num_tokens} tokens in {expected.num_forwards} passes")


def test_generate_file_to_file(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        *({"id": name, "prompt": f"{name} = "} for name in ("a", "b", "c")),
        {"id": 7, "prompt": "x"},
    )
    outputs = []
    for batch_size in (1, 3):
        target = tmp_path / f"out{batch_size}.jsonl"
        shown = run(
            "generate", "--model", networks["student"], "--max-new-tokens", 8,
            "--input", source, "--output", target, "--batch-size", batch_size,
        )  # fmt: skip
        assert shown.code == 0, shown.err
        outputs.append(read_lines(target))
    for rows in outputs:
        assert [row["id"] for row in rows] == ["a", "b", "c", 7]
        assert all(set(row) == {"id", "text", "num_tokens", "num_forwards", "seconds"} for row in rows)
    assert [row["text"] for row in outputs[0]] == [row["text"] for row in outputs[1]]


def test_a_prompt_without_an_id_is_named_by_its_line(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    base = ("generate", "--model", networks["student"], "--max-new-tokens", 8, "--input", source, "--output", target)
    source.write_text('{"prompt": "2 ="}\n\n{"id": "a", "prompt": "3 ="}\n{"prompt": "4 ="}\n')
    shown = run(*base)
    assert shown.code == 0, shown.err
    assert [row["id"] for row in read_lines(target)] == ["1", "a", "4"]
    assert shown.err.endswith(" s for the slowest of 3 prompts\n")
    write_lines(source, {"id": "2", "prompt": "2 ="}, {"prompt": "3 ="})
    assert "line 2: the id '2'" in run(*base).sentence()


def test_generate_reads_standard_input(run: Run, networks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"2 + 2 =\n")))
    done = run("generate", "--model", networks["causal"], "--max-new-tokens", 4)
    assert done.code == 0, done.err
    assert done.out == fewstep.load(networks["causal"]).generate("2 + 2 =", max_new_tokens=4).text + "\n"
    assert done.err.startswith("4 tokens in 4 passes (1.0 per pass), ")
    assert done.err.count("\n") == 1


def test_infill_between_and_inside(run: Run, networks: dict[str, str]) -> None:
    between = run("infill", "--model", networks["teacher"], "--prefix", "2 +", "--suffix", "= 4", "--num-tokens", 3)
    assert between.code == 0, between.err
    assert between.out.startswith("2 +")
    assert between.out.endswith("= 4\n")
    inside = run("infill", "--model", networks["teacher"], "2 +<mask><mask><mask>= 4")
    assert inside.out == between.out
    assert between.err.startswith("3 tokens in ")


def test_a_gap_has_a_suffix_or_is_said_to_have_none(run: Run, networks: dict[str, str]) -> None:
    base = ("infill", "--model", networks["teacher"])
    at_the_end = ("--prefix", "2 +", "--num-tokens", 3)
    assert "--suffix is missing" in run(*base, *at_the_end).sentence()
    shown = run(*base, *at_the_end, "--suffix", "")
    assert shown.code == 0, shown.err
    assert shown.err.startswith("3 tokens in ")
    assert "holds no mask token" in run(*base, "2 + 2 = 4").sentence()
    assert "--num-tokens has no effect" in run(*base, "2 +<mask>= 4", "--num-tokens", 3).sentence()


@pytest.mark.parametrize("text", ["- there are <mask><mask>", "-5 + <mask>", "--- <mask>", "--json is<mask>"])
def test_a_text_that_begins_with_a_dash_is_no_option(run: Run, networks: dict[str, str], text: str) -> None:
    base = ("infill", "--model", networks["teacher"])
    if "--json" not in text:
        filled = run(*base, text, "--seed", 1)
        assert filled.out.startswith(text.split("<mask>")[0]), filled.err
    assert run(*base, "--seed", 1, "--", text).code == 0
    between = run(*base, "--prefix", "- 2", "--num-tokens", 2, "--suffix", "-5")
    assert between.out.startswith("- 2")
    assert between.out.endswith("-5\n")


def test_a_misspelt_option_is_no_text(run: Run, networks: dict[str, str]) -> None:
    base = ("generate", "--model", networks["causal"], "--max-new-tokens", 2)
    told = run(*base, "-foo").sentence()
    assert (
        told
        == "fewstep: No such option: -f; see fewstep generate --help, or put -- before a text that begins with a dash\n"
    )
    assert run(*base, "--", "-foo").code == 0
    assert "--threshold" in run(*base, "--thresold").sentence()
    assert "No such option: --threshold 0.5" in run(*base, "--threshold 0.5").sentence()
    assert run(*base, "- a", "- b").sentence().startswith("fewstep: Got unexpected extra argument(s) (- b)")


def test_infilling_a_first_token_with_shifted_logits_is_refused(run: Run, tmp_path: Path) -> None:
    save_network(tiny_network("bidirectional", right_shift_logits=True), tmp_path / "dream")
    base = ("infill", "--model", tmp_path / "dream")
    assert "--prefix or --prompt" in run(*base, "--suffix", "= 4", "--num-tokens", 2).sentence()
    assert "--prefix or --prompt" in run(*base, "<mask>= 4").sentence()
    for fine in (("2<mask>= 4",), ("--suffix", "= 4", "--num-tokens", 2, "--prompt", "2")):
        shown = run(*base, *fine)
        assert shown.code == 0, shown.err


# Bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--decoder", "blok"], "block"),
        (["--role", "bidirectinal"], "bidirectional"),
        (["--order", "sideways"], "low_confidence"),
        (["--threshold", "1.5"], "fewstep: --threshold is a probability in (0, 1], got 1.5"),
        (["--threshold", "zero"], "--threshold"),
        (["--gaps", "-1"], "--gaps must be at least 0, got -1"),
        (["--decoder", "diffusion", "--gaps", "1"], "gaps belongs to the policy threshold; set threshold with it"),
        (["--max-new-tokens", "0"], "fewstep: --max-new-tokens must be at least 1"),
        (["--temperature", "-1"], "fewstep: --temperature must"),
        (["--decoder", "diffusion", "--alg", "origin", "--block-size", "4"], "takes no --block-size"),
        (["--alg-temp", "0.2"], "the block decoder takes no --alg-temp; only diffusion can"),
        (["--decoder", "diffusion", "--eps", "0.2"], "eps belongs to the policy dream; set alg with it"),
        (["--alg", "origin", "--alg-temp", "0.2"], "takes no --alg-temp; leave one of the two out"),
        (["--alg", "entropy", "--alg-temp", "-1"], "--alg-temp must be at least 0, got -1.0"),
        (["--alg", "entropy", "--alg-temp", "inf"], "--alg-temp must be a finite number, got inf"),
        (["--decoder", "block", "--alg", "entropy", "--alg-temp", "1"], "only diffusion can"),
        (["--decoder", "block", "--canvas-length", "8"], "takes no --canvas-length; only diffusion can"),
        (["--top-p", "2"], "fewstep: --top-p is"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "int3"], "int3"),
        (["--decoder", "diffusion", "--max-new-tokens", "12", "--steps", "2"], "steps"),
        (["--max-new-tokens", "5000"], "1024"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--decoder", "autoregressive"], "autoregressive"),
        (["--gen-length=8", "--max-new-tokens", "8"], "--gen-length is another name of --max-new-tokens"),
    ],
)
def test_generate_refuses(run: Run, networks: dict[str, str], options: list[str], named: str) -> None:
    assert named in run("generate", "2 + 2 =", "--model", networks["student"], *options).sentence()


@pytest.mark.parametrize(
    "arguments",
    [
        "generate x --batch-size", "eval --batch-size", "eval --limit", "compare a b --limit", "demo --num-problems",
        "infill --suffix x --num-tokens", "import a b --block-size", "collect --data x --output y --batch-size",
        "collect --data x --output y --shard-size", "collect --data x --output y --top",
    ],
)  # fmt: skip
def test_counts_have_bounds_before_any_work(run: Run, arguments: str) -> None:
    option = arguments.split()[-1]
    assert run(*arguments.split(), 0).sentence() == f"fewstep: {option} must be at least 1, got 0\n"
    assert f"{option} must be at most" in run(*arguments.split(), 10**20).sentence()


def test_other_numbers_have_bounds_too(run: Run) -> None:
    base = ("collect", "--data", "x", "--output", "y")
    assert "--most-repetition must be at most 1" in run(*base, "--most-repetition", 1.5).sentence()
    assert "--seed must be at most" in run("import", "out", "--random-weights", "tiny", "--seed", 10**20).sentence()
    assert "--worker must be K/N" in run(*base, "--worker", f"0/{'9' * 5000}").sentence()


def test_a_role_that_cannot_run_a_decoder_is_refused(run: Run, networks: dict[str, str]) -> None:
    assert "block" in run("generate", "2", "--model", networks["causal"], "--decoder", "block").sentence()
    assert "infill" in run("infill", "--model", networks["causal"], "2<mask>3").sentence()


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_refused(run: Run, networks: dict[str, str], prompt: str) -> None:
    assert "empty" in run("generate", "--model", networks["student"], prompt).sentence()


def test_a_prompt_longer_than_the_positions_is_refused(run: Run, networks: dict[str, str]) -> None:
    assert "positions" in run("generate", "--model", networks["student"], "2" * 1100).sentence()


def test_prompt_and_files_are_checked_together(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    assert "--input" in run("generate", "--output", tmp_path / "x.jsonl").sentence()
    both = run("generate", "2", "--input", tmp_path / "x.jsonl", "--output", tmp_path / "y.jsonl")
    assert "not both" in both.sentence()
    missing = run("generate", "--input", tmp_path / "x.jsonl", "--output", tmp_path / "y.jsonl")
    assert "x.jsonl" in missing.sentence()
    assert "--num-tokens" in run("infill", "--prefix", "a", "--suffix", "b").sentence()


@pytest.mark.parametrize(
    "second", ['{"id": "b"}', '{"id": "a", "prompt": "x"}', '{"id": "b", "prompt": ""}', "no json"]
)
def test_a_bad_line_is_named_and_the_output_kept(
    run: Run, networks: dict[str, str], tmp_path: Path, second: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "a", "prompt": "x"}\n' + second + "\n")
    target.write_text("before")
    refused = run("generate", "--model", networks["student"], "--input", source, "--output", target)
    assert "line 2" in refused.sentence()
    assert target.read_text() == "before"


def test_rows_go_to_standard_output_where_no_file_is_named(
    run: Run, networks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": role, "content": "2"} for role in ("user", "assistant", "user")]
    ids = [["a", 1], 1.5, "1", 1, {"b": None}]
    write_lines(
        tmp_path / "in.jsonl", *({"id": one, "messages": turns, "prompt": None} for one in ids), {"prompt": "2"}
    )
    base = ("generate", "--model", networks["student"], "--max-new-tokens", 4, "--input", "in.jsonl")
    for options in ((), ("--output", "-")):
        shown = run(*base, *options)
        assert shown.code == 0, shown.err
        assert [json.loads(line)["id"] for line in shown.out.splitlines()] == [*ids, "6"]
    shown = run("generate", "2", "--model", networks["student"], "--max-new-tokens", 4, "--json", "-")
    assert json.loads(shown.out[shown.out.index("{\n") :])["n"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_text_that_is_no_unicode_is_refused_in_one_sentence(
    run: Run, networks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latin = os.fsdecode(b"caf\xe9")
    base = ("generate", "--model", networks["student"], "--max-new-tokens", 4)
    assert "not valid Unicode" in run(*base, latin).sentence()
    assert "not valid Unicode" in run("infill", latin, "--model", networks["teacher"]).sentence()
    half = tmp_path / "half.jsonl"
    for row in ('{"prompt": "\\ud83d"}', '{"id": "\\uD83D", "prompt": "1"}', '{"prompt": "1", "n": %s}' % ("9" * 5000)):
        half.write_text(row + "\n")
        assert "half.jsonl line 1 holds a" in run(*base, "--input", half).sentence()
    half.write_text('{"prompt": "1", "x": %s}\n' % ("[" * 200_000))
    assert "line 1 is" in run(*base, "--input", half).sentence()
    half.write_text('{"prompt": "\\ud83d\\ude00"}\n')
    assert "0 tokens" not in run(*base, "--input", half).err  # a whole pair is one character


def test_a_prompt_that_is_too_long_is_found_before_decoding(
    run: Run, networks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("fewstep.engine.language_model.answer", never)
    source = write_lines(tmp_path / "in.jsonl", {"id": "a", "prompt": "2"}, {"id": "late", "prompt": "2" * 1100})
    base = ("generate", "--model", networks["student"], "--input", source, "--output", tmp_path / "out.jsonl")
    sentence = run(*base, "--max-new-tokens", 8).sentence()
    assert "prompt 'late'" in sentence
    assert "1024 positions" in sentence
    write_lines(source, {"id": "a", "prompt": "2"}, {"id": "odd", "prompt": ["2"]})
    sentence = run(*base).sentence()
    assert "line 2: every message needs" in sentence
    assert "role and content" in sentence


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_or_damaged_weights_are_one_sentence(run: Run, tmp_path: Path, damage: str) -> None:
    save_network(tiny_network(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.unlink() if damage == "missing" else weights.write_bytes(weights.read_bytes()[:200])
    assert "model" in run("generate", "2", "--model", tmp_path / "model").sentence()


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "2"),
        ("train", "sft", "--model", "gsm-ar", "--data", "rows.jsonl", "--output", "out", "--max-steps", 1),
    ],
)
def test_a_report_that_cannot_be_written_is_found_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("fewstep.load", never)
    monkeypatch.setattr("fewstep.cli.training.load_network", never)
    (tmp_path / "file").write_text("")
    for folder in ("file", "no/such"):
        assert "report.json does not exist" in run(*command, "--json", tmp_path / folder / "report.json").sentence()
    assert not (tmp_path / "no").exists()
    assert "name a file" in run(*command, "--json", tmp_path).sentence()


def test_an_error_names_options_and_leaves_what_only_looks_like_one() -> None:
    options = {"max_steps": "--max-steps", "rows": "--rows", "temperature": "--temperature"}
    for said, told in (
        ("max_steps must be at least 1", "--max-steps must be at least 1"),
        ("raise max_steps or lower rows (max_steps=1)", "raise --max-steps or lower rows (--max-steps=1)"),
        ("rows must be at least 1", "--rows must be at least 1"),
        ("temperature is a number", "--temperature is a number"),
        ("the temperature must be 0", "--temperature must be 0"),
        ("a temperature is a number", "a temperature is a number"),
        ("rows of a file", "rows of a file"),
        ("no max_steps_taken", "no max_steps_taken"),
        ("runs/max_steps/max_steps.json, settings.max_steps", "runs/max_steps/max_steps.json, settings.max_steps"),
        ("an unknown key 'max_steps' in max_steps.yaml", "an unknown key 'max_steps' in max_steps.yaml"),
    ):
        with pytest.raises(FewstepError) as caught, naming_options(options):
            raise FewstepError(said)
        assert str(caught.value) == told


def test_ctrl_c_is_one_sentence_and_exit_code_130(networks: dict[str, str], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", *({"id": i, "prompt": f"{i}"} for i in range(2000)))
    target = tmp_path / "out.jsonl"
    process = fewstep_process(
        "generate", "--model", networks["student"], "--input", str(source), "--output", str(target),
        "--max-new-tokens", "64",
    )  # fmt: skip
    kept = kept_path(target)
    while process.poll() is None and (not kept.exists() or kept.read_bytes().count(b"\n") < 2):
        time.sleep(0.05)  # until an answer is kept, however slow the machine is
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("fewstep: interrupted")
    assert "Traceback" not in err
    assert not target.exists()


@pytest.mark.parametrize(
    "sentence", ["interrupted at step 7; a checkpoint is saved, repeat the command to continue", ""]
)
@pytest.mark.parametrize("command", ["generate", "train"])
def test_an_interrupt_keeps_its_own_sentence(
    run: Run,
    networks: dict[str, str],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    sentence: str,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt(*[sentence] if sentence else [])

    model = ("--model", networks["causal"])
    if command == "train":
        monkeypatch.setattr("fewstep.train.trainer.train", interrupted)
        stopped = run("train", "sft", *model, "--data", rows, "--output", tmp_path / "out", *TINY_RUN)
    else:
        monkeypatch.setattr("fewstep.load", interrupted)
        stopped = run("generate", "2", *model)
    assert stopped.code == 130
    assert stopped.err == f"fewstep: {sentence or 'interrupted'}\n"


def test_a_closed_pipe_is_quiet() -> None:
    process = fewstep_process("models")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=120)
    assert err == ""


# Teacher -> trajectories -> student -> folder, on the command line

TINY_RUN = ("--max-steps", 2, "--rows", 2, "--row-length", 256, "--warmup-steps", 1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "rows.jsonl",
        *({"id": str(i), "prompt": f"{i} + 2 =", "completion": f"{i + 2} is the sum"} for i in range(12)),
    )


def test_the_whole_way_to_a_student(run: Run, networks: dict[str, str], rows: Path, tmp_path: Path) -> None:
    teacher, trajectories, student, merged = (
        tmp_path / name for name in ("teacher", "trajectories", "student", "merged")
    )
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {networks['causal']}\nmax_steps: 1000\nlearning_rate: 1e-3\nrows: 2\nrow_length: 256\n")
    trained = run(
        "train", "diffusion", "--config", config, "--data", rows, "--output", teacher, "--max-steps", 2,
        "--watch-data", rows, "--watch-num-prompts", 2, "--watch-max-new-tokens", 8, "--evaluate-every", 2,
        "--json", tmp_path / "train.json",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "sample/0 at step 2" in trained.err
    assert len((teacher / "samples.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "train.json").read_text())["steps"] == 2
    assert fewstep.load(teacher).role.name == "bidirectional"

    collecting = ("collect", "--model", teacher, "--data", rows, "--max-new-tokens", 16, "--shard-size", 5)
    for worker in ("0/2", "1/2"):
        collected = run(*collecting, "--output", trajectories, "--worker", worker, "--json", tmp_path / "collect.json")
        assert collected.code == 0, collected.err
    assert json.loads((tmp_path / "collect.json").read_text())["num_shards"] == 1
    before = {path.name: path.read_bytes() for path in trajectories.iterdir()}
    assert run(*collecting, "--output", trajectories).code == 0
    assert {path.name: path.read_bytes() for path in trajectories.iterdir()} == before
    assert "max_new_tokens" in run(*collecting[:-3], 24, "--shard-size", 5, "--output", trajectories).sentence()

    distilling = ("train", "cdlm", "--trajectories", trajectories, "--output", student, "--block-size", 4, *TINY_RUN)
    assert "teacher" in run(*distilling, "--teacher", networks["teacher"]).sentence()
    distilled = run(*distilling, "--teacher", teacher, "--lora", "--lora-rank", 4)
    assert distilled.code == 0, distilled.err
    assert (student / "adapter_config.json").exists()
    modes = {path.name: path.stat().st_mode for path in student.iterdir() if path.is_file()}
    assert modes["adapter_model.safetensors"] == rows.stat().st_mode == modes["config.json"]
    assert "already" in run(*distilling, "--teacher", teacher).sentence()

    assert run("merge", student, "--output", merged).code == 0
    assert "not empty" in run("merge", student, "--output", merged).sentence()
    assert "nothing to merge" in run("merge", merged, "--output", tmp_path / "again").sentence()
    answers = [run("generate", "2 + 2 =", "--model", model, "--max-new-tokens", 8).out for model in (student, merged)]
    assert answers[0] == answers[1]


def test_a_student_from_its_own_states(run: Run, networks: dict[str, str], rows: Path, tmp_path: Path) -> None:
    store, teacher, student = tmp_path / "own", networks["teacher"], networks["student"]
    collected = run(
        "collect", "--model", teacher, "--student", student, "--threshold", 0.3, "--data", rows, "--output", store,
        "--max-new-tokens", 16, "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert collected.code == 0, collected.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["student"], report["num_records"]) == (student, 12)
    decoding = json.loads((store / "manifest.json").read_text())["decoding"]
    assert (decoding["decoder"], decoding["threshold"], decoding["gaps"]) == ("block", 0.3, None)
    assert decoding["block_size"] == fewstep.load(student).role.block_size
    assert decoding["teacher_canvas_length"] >= 16
    training = ("train", "cdlm", "--trajectories", store, "--teacher", teacher, "--model", student, *TINY_RUN)
    assert "hard" in run(*training, "--output", tmp_path / "hard", "--direction", "hard").sentence()
    trained = run(*training, "--output", tmp_path / "student")
    assert trained.code == 0, trained.err


def test_a_teacher_may_keep_the_alignment_of_its_causal_model(
    run: Run, networks: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    base = ("train", "diffusion", "--model", networks["causal"], "--data", rows, *TINY_RUN)
    for option, shifted in (("--right-shift-logits", True), ("--no-right-shift-logits", False)):
        trained = run(*base, "--output", tmp_path / option, option)
        assert trained.code == 0, trained.err
        assert fewstep.load(tmp_path / option).role.right_shift_logits is shifted


def test_long_work_says_how_far_it_is(
    run: Run, networks: dict[str, str], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.cli.report.SECONDS_PER_LINE", 0.0)
    short = ("--max-new-tokens", 8)
    assert "evaluating: 2 of 2," in run("eval", "--model", networks["student"], "--limit", 2, *short).err
    collecting = ("collect", "--model", networks["teacher"], "--data", rows, "--output", tmp_path / "t", *short)
    assert "collecting: 12 of 12," in run(*collecting, "--shard-size", 5, "--worker", "0/1").err
    assert run(*collecting, "--shard-size", 5).err.startswith("collecting: 12 of 12,")
    base = ("train", "sft", "--model", networks["causal"], "--data", rows, "--output", tmp_path / "out", *TINY_RUN)
    trained = run(*base, "--log-every", 1)
    assert "step 1/2 loss" in trained.err
    assert trained.out == ""


def test_a_student_from_hidden_rows(run: Run, networks: dict[str, str], rows: Path, tmp_path: Path) -> None:
    store = tmp_path / "hidden"
    teacher = networks["teacher"]
    collected = run(
        "collect", "--model", teacher, "--data", rows, "--output", store, "--max-new-tokens", 16,
        "--distribution", "hidden", "--threshold", 0.5,
    )  # fmt: skip
    assert collected.code == 0, collected.err
    unknown = run(
        "train", "cdlm", "--trajectories", store, "--teacher", teacher, "--output", tmp_path / "student", *TINY_RUN,
        "--reference-late", 0.5, "--reference-late-tokens", "[99999]",
    )  # fmt: skip
    assert "tokens has no id 99999" in unknown.sentence()
    distilled = run(
        "train", "cdlm", "--trajectories", store, "--teacher", teacher, "--output", tmp_path / "student", *TINY_RUN,
        "--direction", "reverse", "--consistency", 1, "--later-state", "next", "--reference-visited", 0.5,
    )  # fmt: skip
    assert distilled.code == 0, distilled.err
    assert fewstep.load(tmp_path / "student").role.name == "block_causal"


def test_sft_of_a_causal_model(run: Run, networks: dict[str, str], rows: Path, tmp_path: Path) -> None:
    trained = run(
        "train", "sft", "--model", networks["causal"], "--data", rows, "--output", tmp_path / "out", *TINY_RUN
    )
    assert trained.code == 0, trained.err
    assert fewstep.load(tmp_path / "out").role.name == "autoregressive"


def test_a_short_run_has_warmed_up_after_its_first_step(
    run: Run, networks: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    base = ("train", "sft", "--model", networks["causal"], "--data", rows, "--max-steps", 2, "--rows", 2)
    for options, rates in (((), [1e-3, 5e-4]), (("--warmup-steps", 2), [5e-4, 1e-3])):
        output = tmp_path / f"out{rates[0]}"
        trained = run(
            *base, "--row-length", 256, "--log-every", 1, "--schedule", "linear", "--output", output, *options
        )
        assert trained.code == 0, trained.err
        history = json.loads((output / "report.json").read_text())["history"]
        assert [line["learning_rate"] for line in history] == pytest.approx(rates)  # each that of its own step


def test_training_refuses(run: Run, networks: dict[str, str], rows: Path, tmp_path: Path) -> None:
    base = ("train", "sft", "--model", networks["causal"], "--output", tmp_path / "out", *TINY_RUN)
    config = tmp_path / "run.yaml"
    assert "--data" in run(*base).sentence()
    config.write_text("lerning_rate: 1\n")
    assert "'learning_rate'" in run(*base, "--data", rows, "--config", config).sentence()
    config.write_text("learning_rate: fast\n")
    assert "'learning_rate' in" in run(*base, "--data", rows, "--config", config).sentence()
    assert "--learning-rate must be above 0" in run(*base, "--data", rows, "--learning-rate", 0).sentence()
    assert "--row-length is at most" in run(*base, "--data", rows, "--row-length", 10**6).sentence()
    assert "--collapse-loss-factor must" in run(*base, "--data", rows, "--collapse-loss-factor", 0.5).sentence()
    config.write_text("a: [\n")
    assert "YAML" in run(*base, "--data", rows, "--config", config).sentence()
    assert "--learning-rate" in run(*base, "--data", rows, "--learning-rate", "fast").sentence()
    assert "schedule" in run(*base, "--data", rows, "--schedule", "sawtooth").sentence()
    bad = write_lines(tmp_path / "bad.jsonl", {"prompt": "a", "completion": "b"}, {"question": "a"})
    sentence = run(*base, "--data", bad).sentence()
    assert "bad.jsonl" in sentence
    assert "2" in sentence
    unanchored = ("--distillation", 0, "--denoising", 0)
    store = (
        "--trajectories",
        tmp_path / "none",
        "--teacher",
        networks["teacher"],
        "--output",
        tmp_path / "out",
        *TINY_RUN,
    )
    assert "collapse" in run("train", "cdlm", *store, *unanchored).sentence()
    assert "none" in run("train", "cdlm", *store).sentence()
    undenoised = run("train", "cdlm", *store, "--denoising", 0, "--reference-visited", 0.5)
    assert undenoised.sentence().endswith("--reference-visited has no effect with --denoising 0\n")
    assert not (tmp_path / "out").exists()


def test_precision_no_is_the_choice_and_no_boolean(
    run: Run, networks: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    base = ("train", "sft", "--model", networks["causal"], "--data", rows, *TINY_RUN)
    given = run(*base, "--output", tmp_path / "option", "--precision", "no")
    assert given.code == 0, given.err
    config = tmp_path / "run.yaml"
    config.write_text("precision: no\n")
    read = run(*base, "--output", tmp_path / "file", "--config", config)
    assert read.code == 0, read.err
    assert "choose no or bf16" in run(*base, "--output", tmp_path / "x", "--precision", "off").sentence()
    config.write_text("precision: yes\n")
    assert "choose no or bf16" in run(*base, "--output", tmp_path / "x", "--config", config).sentence()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lora-rank", "4"], "--lora-rank has no effect without --lora\n"),
        (["--watch-num-prompts", "4"], "--watch-num-prompts has no effect without --watch-data\n"),
        (["--watch-data", "rows.jsonl"], "--watch-data has no effect without --evaluate-every\n"),
        (["--role", "block_causal", "--leftward", "0.5"], "--leftward has no effect with --role block_causal\n"),
        (["--role", "block_causal", "--canvas-weights", "[1]"], "--canvas-weights has no effect with"),
        (["--frontier", "0.5"], "frontier, late and visited are shares of the leftward documents; set leftward too"),
        (["--untouched", "0.5"], "--untouched has no effect with --role bidirectional\n"),
        (["--watch-num-prompts", "0"], "fewstep: --watch-num-prompts must be at least 1, got 0"),
        (["--block-size", "0"], "--block-size must be at least 1, got 0"),
        (["--max-prompt", "0"], "--max-prompt must be at least 1, got 0"),
        (["--max-completion", "0"], "--max-completion must be at least 1, got 0"),
    ],
)
def test_what_training_would_not_use_is_refused(
    run: Run, networks: dict[str, str], rows: Path, tmp_path: Path, options: list[str], named: str
) -> None:
    base = ("train", "diffusion", "--model", networks["causal"], "--data", rows, "--output", tmp_path / "out")
    assert named in run(*base, *TINY_RUN, *options).sentence()


def test_what_a_run_file_sets_and_nothing_uses_is_refused(run: Run, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: none\ndata: {rows}\noutput: {tmp_path / 'out'}\nlora_alpha: 8\nwatch_data: null\n")
    for command in ("sft", "diffusion"):
        assert "--lora-alpha has no effect" in run("train", command, "--config", config, *TINY_RUN).sentence()


def test_collect_refuses(run: Run, networks: dict[str, str], rows: Path, tmp_path: Path) -> None:
    base = ("collect", "--data", rows, "--output", tmp_path / "t", "--max-new-tokens", 8)
    for worker in ("two", "0/0", "2/2"):
        assert "K/N" in run(*base, "--model", networks["teacher"], "--worker", worker).sentence()
    assert "--top" in run(*base, "--model", networks["teacher"], "--distribution", "hidden", "--top", 4).sentence()
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"prompt": "a"}\n\n{"prompt": 5}\n')
    sentence = run("collect", "--data", odd, "--output", tmp_path / "t", "--model", networks["teacher"]).sentence()
    assert "line 3: the prompt must be text" in sentence
    assert "mask" in run(*base, "--model", networks["causal"], "--role", "bidirectional").sentence()
    assert "--most-repetition" in run(*base, "--model", networks["teacher"], "--most-repetition", 0.5).sentence()
    empty = write_lines(tmp_path / "empty.jsonl", {"id": "a", "prompt": ""})
    sentence = run("collect", "--data", empty, "--output", tmp_path / "t", "--model", networks["teacher"]).sentence()
    assert "line 1" in sentence


# eval, compare, demo

EVAL_KEYS = set(
    "model role decoder engine task threshold gaps block_size steps batch_size dtype device n accuracy accuracy_ci95 "
    "num_tokens_mean num_forwards_mean tokens_per_forward tokens_per_forward_correct seconds_median tokens_per_second "
    "step_ms".split()
)


def test_eval_on_a_file_and_on_bundled_problems(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    problems = write_lines(
        tmp_path / "sums.jsonl", *({"id": i, "question": f"{i} + 2 =", "answer": i + 2} for i in range(3))
    )
    report, records = tmp_path / "r.json", tmp_path / "records.jsonl"
    base = ("eval", "--model", networks["student"], "--max-new-tokens", 8, "--json", report)
    assert run(*base, "--data", problems, "--records", records).code == 0
    written = json.loads(report.read_text())
    assert set(written) == EVAL_KEYS
    assert (written["task"], written["n"], written["threshold"], written["block_size"]) == ("sums", 3, 0.9, 4)
    assert len(read_lines(records)) == 3
    assert run(*base, "--data", problems, "--split", "dev", "--limit", 2).code == 0
    assert json.loads(report.read_text())["task"] == "sums"
    assert run(*base, "--split", "dev", "--limit", 2, "--batch-size", 2, "--no-early-stop").code == 0
    assert json.loads(report.read_text())["task"] == "gsm-symbolic"


def test_eval_sweep_and_plot(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    shown = run(
        "eval", "--model", networks["teacher"], "--max-new-tokens", 16, "--limit", 2, "--batch-size", 2,
        "--sweep-thresholds", "0.2,0.9", "--sweep-steps", "8", "--json", report, "--plot", tmp_path / "curve.png",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    written = json.loads(report.read_text())
    assert [(one["threshold"], one["steps"]) for one in written] == [(0.2, None), (0.9, None), (None, 8)]
    assert (tmp_path / "curve.png").stat().st_size > 0
    assert (tmp_path / "curve.svg").stat().st_size > 0


def test_a_plot_has_the_baseline_of_an_earlier_report(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    report, plot = tmp_path / "teacher.json", ("--plot", tmp_path / "curve")
    short = ("--max-new-tokens", 8, "--limit", 2)
    assert run("eval", "--model", networks["teacher"], *short, "--json", report).code == 0
    base = ("eval", "--model", networks["student"], "--max-new-tokens", 8, "--baseline", report)
    shown = run(*base, "--limit", 2, *plot)
    assert shown.code == 0, shown.err
    assert "has no effect without --plot" in run(*base, "--limit", 2).sentence()
    assert "is of 2 problems of gsm-symbolic, and these are 1" in run(*base, "--limit", 1, *plot).sentence()
    report.write_text('{"n": 2}')
    assert "holds no report of eval" in run(*base, "--limit", 2, *plot).sentence()


def test_eval_refuses(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    base = ("eval", "--model", networks["student"], "--limit", 2)
    assert "--sweep-thresholds" in run(*base, "--sweep-thresholds", "0.5;0.9").sentence()
    bad = write_lines(tmp_path / "bad.jsonl", {"id": 1, "question": "a"})
    assert "'answer'" in run(*base, "--data", bad).sentence()
    write_lines(bad, {"id": 1, "question": "a", "answer": "nan"})
    assert "give a number" in run(*base, "--data", bad).sentence()


def test_eval_takes_a_task_by_name(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    report, records = tmp_path / "r.json", tmp_path / "records.jsonl"
    base = ("eval", "--model", networks["student"], "--max-new-tokens", 8, "--json", report)
    shown = run(*base, "--task", "gsm-symbolic", "--split", "heldout", "--limit", 1, "--records", records)
    assert shown.code == 0, shown.err
    assert (json.loads(report.read_text())["task"], read_lines(records)[0]["id"]) == ("gsm-symbolic", "heldout-00000")
    write_lines(tmp_path / "train.jsonl", {"question": "1 + 1 =", "answer": "<<1+1=2>>2\n#### 2"})
    shown = run(*base, "--task", "gsm8k", "--data", tmp_path, "--split", "train")
    assert shown.code == 0, shown.err
    assert (json.loads(report.read_text())["task"], json.loads(report.read_text())["n"]) == ("gsm8k", 1)
    own = write_lines(tmp_path / "own.jsonl", {"question": "The capital of France?", "answer": "Paris"})
    shown = run(*base, "--task", "jsonl", "--data", own, "--metric", "contains")
    assert shown.code == 0, shown.err
    told = json.loads(report.read_text())
    assert (told["task"], told["metric"], set(told) - EVAL_KEYS) == ("own", "contains", {"metric", "chrf", "chrf_ci95"})


def test_what_no_task_is_is_refused_before_a_model_is_loaded(run: Run, tmp_path: Path) -> None:
    own = write_lines(tmp_path / "own.jsonl", {"question": "a", "answer": 1})
    assert "did you mean 'gsm8k'" in run("eval", "--task", "gsm8").sentence()
    assert "--data must be given for the task gsm8k" in run("eval", "--task", "gsm8k").sentence()
    assert "--data is not read by the task" in run("eval", "--task", "gsm-symbolic", "--data", own).sentence()
    assert "--split must be one that" in run("eval", "--split", "validation").sentence()
    assert "--split must be one that" in run("eval", "--data", own, "--split", "validation").sentence()
    assert "--split must be left out" in run("eval", "--task", "jsonl", "--data", own, "--split", "dev").sentence()
    assert "--metric must be number for" in run("eval", "--metric", "exact").sentence()
    assert "no metric" in run("eval", "--data", own, "--metric", "bleu").sentence()
    assert "--data must be given" in run("compare", "gsm-student", "gsm-ar", "--task", "jsonl").sentence()
    assert "--data must be given" in run("demo", "--task", "gsm8k").sentence()


def test_the_help_names_every_metric(run: Run) -> None:
    shown = run("eval", "--help").out
    for name in (*METRICS, *TASKS):
        assert name in shown


def test_compare(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    student, teacher = (f"{networks[name]},max_new_tokens=8" for name in ("student", "teacher"))
    shown = run(
        "compare", f"{student},threshold=0.2", f"{teacher},steps=8", "--limit", 2, "--json", tmp_path / "c.json"
    )
    assert shown.code == 0, shown.err
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["n"] == 2
    assert (written["first"]["threshold"], written["second"]["steps"]) == (0.2, 8)
    model = networks["student"]
    assert f"{model} solves 0.0%" in shown.out
    shown = run("compare", f"{student},threshold=0.2", f"{student},threshold=0.3", "--limit", 1)
    assert f"{model} (threshold 0.2) solves 0.0%" in shown.out
    assert f", {model} (threshold 0.3) 0.0%" in shown.out
    assert shown.out.count(f"\n{model} (threshold 0.") == 3  # two rows of the table, and the sentence
    shown = run("compare", f"{student},gaps=0", f"{student},gaps=2", "--limit", 1)
    assert f"{model} (gaps 0) solves 0.0%" in shown.out
    assert f", {model} (gaps 2) 0.0%" in shown.out
    shown = run("compare", f"{teacher},alg=entropy", f"{teacher},alg=entropy,alg-temp=0.5", "--limit", 1)
    assert f"{networks['teacher']} (default alg_temp) solves 0.0%" in shown.out
    assert f", {networks['teacher']} (alg_temp 0.5) 0.0%" in shown.out
    assert "thresold" in run("compare", f"{student},thresold=0.2", teacher).sentence()
    assert "--threshold" in run("compare", f"{student},threshold=much", teacher).sentence()


def test_demo_in_plain_lines(
    run: Run, networks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.cli.demo.CANVAS_LENGTH", 64)
    shown = run(
        "demo", "--teacher", networks["teacher"], "--student", networks["student"], "--causal", networks["causal"],
        "--num-problems", 2, "--json", tmp_path / "d.json",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "problem 1: teacher" in shown.out
    assert "\x1b" not in shown.out
    told = json.loads((tmp_path / "d.json").read_text())
    assert {name: timing["n"] for name, timing in told["timings"].items()} == dict.fromkeys(told["runs"], 2)
    assert "On problems 1 to 2, by medians, the student is" in shown.out
    factors = told["factors"]
    assert factors["total"] == pytest.approx(factors["stopping"] * factors["fewer_passes"] * factors["caching"])


def test_demo_on_problems_of_ones_own(run: Run, networks: dict[str, str], tmp_path: Path) -> None:
    own = write_lines(tmp_path / "own.jsonl", {"question": "How many wings has a bird?", "answer": "any"})
    base = ("demo", "--teacher", networks["teacher"], "--student", networks["student"], "--causal", networks["causal"])
    shown = run(*base, "--data", own, "--metric", "contains", "--json", tmp_path / "d.json")
    assert shown.code == 0, shown.err
    assert "Problem 1. How many wings has a bird?" in shown.out
    assert "0 of 1" in shown.out


def test_one_disturbed_problem_hardly_moves_the_demos_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    def runs(*seconds: float) -> list[demo.Run]:
        return [
            demo.Run(problem=str(i), num_tokens=24, num_forwards=2 + i, seconds=one, right=True)
            for i, one in enumerate(seconds)
        ]

    taken = {"published": runs(8.0), "teacher": runs(4.0, 6.0, 90.0), "student": runs(2.0, 2.0, 3.0)}
    timings = {name: Timing() for name in taken}
    for name, of in taken.items():
        for one in of:
            timings[name].add(one)
    demo._print_table(taken, timings, "student")
    header, *lines = capsys.readouterr().out.strip().splitlines()
    assert re.split(" {2,}", header) == ["model", "right", "passes", "median s", "tok/pass", "vs. student"]
    assert [line.split()[-4:] for line in lines] == [
        ["2.0", "8.000", "12.00", "4.0x"],
        ["3.0", "6.000", "8.00", "3.0x"],
        ["3.0", "2.000", "8.00", "1.0x"],
    ]
