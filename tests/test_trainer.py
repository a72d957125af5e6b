"""The trainer on tiny networks: it learns, resumes exactly, stops loudly and leaves whole folders."""

import errno
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from fewstep.decode.diffusion import Diffusion
from fewstep.decode.health import Health, measure_health
from fewstep.errors import FewstepError
from fewstep.json_files import read_rows
from fewstep.models.load import load_network, save_network
from fewstep.models.network import Network, Plan
from fewstep.models.tiny import tiny_network
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.checkpoint import _hashes
from fewstep.train.collect import collect, decode_with, distribution_of, teacher_of
from fewstep.train.corruption import Corruption
from fewstep.train.documents import CanvasLengths
from fewstep.train.examples import Examples, Origin
from fewstep.train.interruption import Interrupt
from fewstep.train.learner import Learner
from fewstep.train.lora import LoRASettings, save_trained
from fewstep.train.monitor import CollapseError, CollapseLimits, CollapseMonitor
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective
from fewstep.train.output import check_output
from fewstep.train.records import PromptRow
from fewstep.train.samples import Samples
from fewstep.train.stream import BatchStream
from fewstep.train.trainer import TrainSettings, train
from fewstep.train.trajectories import read_table

SETTINGS = TrainSettings(
    max_steps=12, rows=2, row_length=64, learning_rate=3e-3, warmup_steps=2, log_every=2, save_every=4
)


@pytest.mark.parametrize(
    ("max_steps", "given", "taken"), [(3, None, 1), (500, None, 50), (10_000, None, 100), (3, 100, 100), (3, 0, 0)]
)
def test_the_warm_up_is_cut_to_the_run_unless_it_is_given(max_steps: int, given: int | None, taken: int) -> None:
    assert TrainSettings(max_steps=max_steps, warmup_steps=given).num_warmup_steps == taken


def counting_examples(count: int = 40, seed: int = 0) -> Examples:
    """A prompt names a token, the answer counts upwards from it."""
    starts = np.random.default_rng(seed).integers(10, 40, count)
    prompts = [[3, int(start), 4] for start in starts]
    answers = [[*range(int(start), int(start) + 3 + i % 5), 1] for i, start in enumerate(starts)]
    return Examples.from_ids(prompts, answers)


def objective_for(network: Network, examples: Examples | None = None) -> CausalObjective | MaskedDiffusionObjective:
    examples = examples or counting_examples()
    kind = CausalObjective if network.role.name == "autoregressive" else MaskedDiffusionObjective
    return kind(network.role, examples, network.eos_token_id)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    network = load_network(folder, dtype="float32", device="cpu")
    return dict(network.module.state_dict())


def logits_of(network: Network) -> torch.Tensor:
    tokens = torch.arange(10, 22)[None]
    positions = torch.arange(12)[None]
    plan = Plan(
        kind="full",
        tokens_RQ=tokens,
        positions_RQ=positions,
        blocks_RQ=network.role.blocks(positions, torch.tensor([[4]])),
        slots_RQ=None,
        scored_RS=positions,
    )
    with torch.no_grad():
        return network.score(plan).logits_RSV


# Learning


@pytest.mark.parametrize("role", ["autoregressive", "bidirectional", "block_causal"])
def test_training_lowers_the_loss(role, tmp_path):
    network = tiny_network(role)
    result = train(network, objective_for(network), replace(SETTINGS, max_steps=40, save_every=None), tmp_path / "out")
    losses = [line["loss"] for line in result.history]
    assert losses[-1] < 0.8 * losses[0]
    assert result.real_tokens > 40 * 80
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["history"] == result.history
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert not (tmp_path / "out" / "finished").exists()


def test_a_line_of_the_log_has_the_means_of_the_steps_since_the_last(tmp_path):
    histories = {}
    for every in (1, 3):
        network = tiny_network("autoregressive")
        settings = replace(SETTINGS, max_steps=7, log_every=every, save_every=None)
        histories[every] = train(network, objective_for(network), settings, tmp_path / f"out{every}").history
    steps = [line["loss"] for line in histories[1]]
    assert [line["step"] for line in histories[3]] == [3, 6, 7]
    means = [sum(steps[:3]) / 3, sum(steps[3:6]) / 3, steps[6]]
    assert [line["loss"] for line in histories[3]] == pytest.approx(means, rel=1e-5)


def test_two_half_batches_step_as_one_whole_batch_does(tmp_path):
    """With documents of one length, both fill the rows, and the means over halves average to the mean."""
    prompts = [[3, 10 + i % 30, 4] for i in range(64)]
    examples = Examples.from_ids(prompts, [[5 + i % 50] * 4 + [1] for i in range(64)])
    networks = []
    for rows, accumulation in ((4, 1), (2, 2)):
        network = tiny_network("autoregressive")
        settings = replace(SETTINGS, max_steps=4, rows=rows, accumulation=accumulation, row_length=64, save_every=None)
        train(network, objective_for(network, examples), settings, tmp_path / f"out{rows}")
        networks.append(network)
    whole, halves = (dict(network.module.state_dict()) for network in networks)
    for name, value in whole.items():
        assert_close(halves[name], value, atol=2e-4, rtol=0)


def test_the_average_of_the_weights_is_what_is_saved_and_evaluated(tmp_path):
    network = tiny_network("autoregressive")
    seen = []

    def evaluate(network: Network, step: int) -> dict[str, float]:
        seen.append(logits_of(network))
        return {}

    settings = replace(SETTINGS, ema_decay=0.8, evaluate_every=12)
    train(network, objective_for(network), settings, tmp_path / "out", evaluate=evaluate)
    assert_close(logits_of(load_network(tmp_path / "out", dtype="float32", device="cpu")), seen[-1])
    assert_close(logits_of(network), seen[-1])
    plain = tiny_network("autoregressive")
    train(plain, objective_for(plain), SETTINGS, tmp_path / "plain")
    assert (logits_of(plain) - seen[-1]).abs().max() > 1e-3


def test_a_precision_may_follow_another_in_one_process(tmp_path):
    for precision in ("no", "bf16", "no"):
        network = tiny_network("autoregressive")
        settings = replace(SETTINGS, max_steps=2, precision=precision, weights_dtype="bfloat16")
        train(network, objective_for(network), settings, tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}")


@pytest.mark.parametrize(("kind", "precision"), [("top_k", "no"), ("hidden", "bf16")])
def test_a_student_trained_on_trajectories_comes_closer_to_the_teacher(kind, precision, tmp_path):
    teacher = tiny_network("bidirectional", head_scale=10)
    distribution = distribution_of(teacher, kind, top_k=8)
    decoder = Diffusion(role=teacher.role, block_size=4, canvas_length=12)
    collect(
        decode_with(teacher, decoder, max_new_tokens=12, batch_size=8, distribution=distribution),
        [PromptRow(str(start), [3, start, 4], [start, start + 1, 1]) for start in range(10, 40)],
        tmp_path / "store",
        teacher=teacher_of(teacher),
        settings={},
        distribution=distribution,
    )
    table, references = read_table(tmp_path / "store", teacher)
    student = tiny_network("block_causal", seed=1)
    settings = CDLMSettings(denoising=0.05)
    objective = CDLMObjective(student.role, table, student.eos_token_id, references=references, settings=settings)
    result = train(
        student, objective, replace(SETTINGS, max_steps=60, precision=precision, save_every=None), tmp_path / "out"
    )
    assert {"distillation", "consistency", "denoising"} <= result.history[0].keys()
    assert result.history[-1]["distillation"] < 0.8 * result.history[0]["distillation"]


# What is written


def test_the_folder_loads_with_stock_transformers(tmp_path):
    network = tiny_network("autoregressive")
    train(network, objective_for(network), replace(SETTINGS, weights_dtype="bfloat16"), tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.dtype == torch.bfloat16
    ids = torch.tensor([[3, 12, 4]])
    with torch.no_grad():
        assert_close(stock(ids).logits.float(), network.module(ids).logits, atol=0.05, rtol=0.05)


def test_an_adapter_on_its_base_is_the_trained_network(tmp_path):
    save_network(tiny_network("block_causal"), tmp_path / "base")
    network = load_network(tmp_path / "base", dtype="float32", device="cpu")
    before = logits_of(network)
    train(network, objective_for(network), SETTINGS, tmp_path / "out", lora=LoRASettings(rank=4))
    trained = logits_of(network)
    assert (trained - before)[..., 3:].abs().max() > 1e-2
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < 100_000
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "out"):  # the pair may move
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    loaded = load_network(tmp_path / "elsewhere" / "out", dtype="float32", device="cpu")
    assert loaded.role == network.role
    assert_close(logits_of(loaded), trained, atol=1e-4, rtol=1e-4)


def test_the_report_says_what_was_trained_how_and_on_what(tmp_path):
    network = tiny_network("bidirectional")
    corruption = Corruption(leftward=0.5, frontier=0.25)
    objective = MaskedDiffusionObjective(network.role, counting_examples(), network.eos_token_id, corruption=corruption)
    train(network, objective, replace(SETTINGS, max_steps=1), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["objective"] == "MaskedDiffusionObjective"
    assert report["corruption"]["leftward"] == 0.5
    assert report["device"].startswith("cpu (")
    assert report["lora"] is None


def test_a_folder_that_holds_a_model_is_refused(tmp_path):
    network = tiny_network("autoregressive")
    train(network, objective_for(network), replace(SETTINGS, max_steps=1), tmp_path / "out")
    with pytest.raises(FewstepError, match="already holds a model"):
        train(network, objective_for(network), SETTINGS, tmp_path / "out")


def test_a_kill_while_the_finished_files_are_moved_is_made_good(tmp_path):
    out = tmp_path / "out"
    (out / "finished").mkdir(parents=True)
    (out / "finished" / "config.json").write_text("{}")
    (out / "model.safetensors").write_text("moved already")
    network = tiny_network("autoregressive")
    train(network, objective_for(network), replace(SETTINGS, max_steps=1), out)
    assert_close(logits_of(load_network(out, dtype="float32", device="cpu")), logits_of(network))


@pytest.mark.parametrize("of_a_run", [True, False])
def test_checkpoints_that_a_kill_left_beside_a_finished_model_are_removed(tmp_path, of_a_run):
    out, network = tmp_path / "out", tiny_network("autoregressive")
    settings = replace(SETTINGS, max_steps=1)
    train(network, objective_for(network), settings, out)
    for name in ("checkpoints/step-00000001", "checkpoints/.step-00000002.0123abcd.tmp", "finished"):
        (out / name).mkdir(parents=True)
    (out / "checkpoints" / "step-00000001" / "run.json").write_text("{")
    if not of_a_run:
        (out / "report.json").write_text('{"mine": 1}')
    with pytest.raises(FewstepError, match="already holds a model"):
        train(network, objective_for(network), settings, out)
    assert (out / "checkpoints").exists() != of_a_run
    assert (out / "finished").exists() != of_a_run


def test_other_files_beside_the_checkpoints_of_a_finished_model_stay(tmp_path):
    out, network = tmp_path / "out", tiny_network("autoregressive")
    train(network, objective_for(network), replace(SETTINGS, max_steps=1), out)
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    (out / "checkpoints" / "mine").write_text("notes")
    with pytest.raises(FewstepError, match="already holds a model"):
        check_output(out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["mine"]


# Interruption


def run_adapter(output: Path, stop_at: int = 0, stop_with: int = signal.SIGKILL) -> None:
    """One training run with everything that has a state; it sends itself a signal at that step (0: never)."""
    network = tiny_network("block_causal")

    def evaluate(network: Network, step: int) -> dict[str, float]:
        if step == stop_at:
            os.kill(os.getpid(), stop_with)
        return {"probe": float(logits_of(network)[0, 0, 5])}

    settings = replace(SETTINGS, accumulation=2, ema_decay=0.9, evaluate_every=1)
    monitor = CollapseMonitor(CollapseLimits(loss_memory=2))
    lora = LoRASettings(rank=4, dropout=0.1)
    train(network, objective_for(network), settings, output, lora=lora, evaluate=evaluate, monitor=monitor)


def run_plain(output: Path, stop_at: int = 0) -> None:
    """As `run_adapter`, of all weights of a network whose embedding is its head."""
    network = tiny_network("autoregressive")
    network.module.config.tie_word_embeddings = True
    network.module.tie_weights()

    def evaluate(network: Network, step: int) -> dict[str, float]:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    train(network, objective_for(network), replace(SETTINGS, evaluate_every=1), output, evaluate=evaluate)


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import test_trainer
test_trainer.{call}
"""


def script(call: str) -> str:
    """A program that calls one of the functions of this file."""
    return SCRIPT.format(tests=str(Path(__file__).parent), call=call)


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in history]


def final_state(output: Path) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    weights = {path.name: path.read_bytes() for path in sorted(output.glob("*.safetensors"))}
    assert weights
    return weights, without_times(json.loads((output / "report.json").read_text())["history"])


def checkpoints_in(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_killed_runs_resume_and_equal_uninterrupted_ones(tmp_path):
    for run in (run_adapter, run_plain):
        output = tmp_path / f"{run.__name__}-killed"
        process = multiprocessing.get_context("fork").Process(target=run, args=(output, 7))
        process.start()
        run(tmp_path / run.__name__)
        process.join(timeout=300)
        assert process.exitcode == -signal.SIGKILL
        assert checkpoints_in(output) == ["step-00000004"]
        assert not (output / "config.json").exists()
        run(output)
        assert final_state(output) == final_state(tmp_path / run.__name__)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_a_checkpoint_from_which_the_run_continues_exactly(number, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 7; a checkpoint is saved, repeat the command"):
        run_adapter(tmp_path / "stopped", 7, number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert checkpoints_in(tmp_path / "stopped") == ["step-00000007"]
    run_adapter(tmp_path / "stopped")
    run_adapter(tmp_path / "whole")
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once_but_not_the_same_one_sent_twice_nor_a_second_sigterm(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Interrupt(main=True) as interrupt:
        for later, number in ((0, signal.SIGTERM), (0.01, signal.SIGINT), (9, signal.SIGTERM)):
            now = later
            signal.raise_signal(number)
        assert interrupt.wanted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err.count("stopping after this step") == 1


def test_a_signal_while_the_finished_model_is_written_costs_nothing(tmp_path, monkeypatch):
    def save(*args: object, **named: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        save_trained(*args, **named)

    network = tiny_network("autoregressive")
    monkeypatch.setattr("fewstep.train.trainer.save_trained", save)
    train(network, objective_for(network), SETTINGS, tmp_path / "out")
    assert_close(logits_of(load_network(tmp_path / "out", dtype="float32", device="cpu")), logits_of(network))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_no_memory_for_a_step_is_one_sentence(error, tmp_path, monkeypatch):
    def step(*args: object) -> None:
        raise error

    network = tiny_network("autoregressive")
    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(FewstepError, match="a step needs more memory than there is on cpu; use fewer rows"):
        train(network, objective_for(network), SETTINGS, tmp_path / "out")


def interrupt_at(step: int) -> Callable[[Network, int], dict[str, float]]:
    def evaluate(network: Network, now: int) -> dict[str, float]:
        if now == step:
            raise RuntimeError("pulled the plug")
        return {}

    return evaluate


def test_a_run_killed_in_its_last_evaluation_only_evaluates_when_it_is_repeated(tmp_path):
    def run(name: str, evaluate: Callable[[Network, int], dict[str, float]]) -> None:
        network = tiny_network("autoregressive")
        settings = replace(SETTINGS, evaluate_every=100)
        train(network, objective_for(network), settings, tmp_path / name, evaluate=evaluate)

    def probe(network: Network, step: int) -> dict[str, float]:
        return {"probe": float(logits_of(network)[0, 0, 5])}

    with pytest.raises(RuntimeError, match="plug"):
        run("killed", interrupt_at(SETTINGS.max_steps))
    assert checkpoints_in(tmp_path / "killed") == [f"step-{SETTINGS.max_steps:08d}"]
    run("killed", probe)
    run("whole", probe)
    assert final_state(tmp_path / "killed") == final_state(tmp_path / "whole")
    assert not (tmp_path / "killed/checkpoints").exists()


def begun(output: Path, network: Network | None = None) -> None:
    """A run in `output` that stopped at step 6 of 12, with a checkpoint of step 4."""
    network = network or tiny_network("autoregressive")
    settings = replace(SETTINGS, evaluate_every=1)
    with pytest.raises(RuntimeError, match="plug"):
        train(network, objective_for(network), settings, output, evaluate=interrupt_at(6))


def test_a_checkpoint_of_tied_weights_is_saved_without_a_word_and_continued_exactly(tmp_path, caplog):
    def tied() -> Network:
        network = tiny_network("autoregressive")
        network.module.config.tie_word_embeddings = True
        network.module.tie_weights()
        assert network.module.lm_head.weight is network.module.model.embed_tokens.weight
        return network

    begun(tmp_path / "out", tied())
    assert checkpoints_in(tmp_path / "out") == ["step-00000004"]
    assert (tmp_path / "out" / "checkpoints" / "step-00000004" / "model.safetensors").exists()
    assert caplog.text == ""
    for name in ("out", "whole"):
        network = tied()
        train(network, objective_for(network), replace(SETTINGS, evaluate_every=1), tmp_path / name)
    assert final_state(tmp_path / "out") == final_state(tmp_path / "whole")


def test_a_checkpoint_of_another_run_is_refused_in_one_sentence(tmp_path):
    begun(tmp_path / "out")
    network = tiny_network("autoregressive")
    cases = {
        "learning_rate is 0.003 there and 0.1 here": (replace(SETTINGS, learning_rate=0.1), None, None),
        "examples is": (SETTINGS, counting_examples(seed=1), None),
        "lora is": (SETTINGS, None, LoRASettings()),
    }
    for sentence, (settings, examples, lora) in cases.items():
        with pytest.raises(FewstepError, match=sentence) as raised:
            train(network, objective_for(network, examples), settings, tmp_path / "out", lora=lora)
        assert "\n" not in str(raised.value)
        network = tiny_network("autoregressive")
    train(network, objective_for(network), replace(SETTINGS, save_every=3), tmp_path / "out")


def test_a_kill_between_writing_and_removing_checkpoints_continues_the_newest(tmp_path):
    begun(tmp_path / "out")
    newest = tmp_path / "out/checkpoints/step-00000004"
    (tmp_path / "out/checkpoints/step-00000002").mkdir()  # would not load
    (tmp_path / "out/checkpoints/.step-00000008.0f.tmp").mkdir()
    network = tiny_network("autoregressive")
    settings = replace(SETTINGS, evaluate_every=1)
    with pytest.raises(RuntimeError, match="plug"):
        train(network, objective_for(network), settings, tmp_path / "out", evaluate=interrupt_at(9))
    assert not newest.exists()
    assert checkpoints_in(tmp_path / "out") == ["step-00000008"]


def test_resuming_across_an_epoch_repeats_the_stream():
    def stream() -> BatchStream:
        return BatchStream(objective_for(tiny_network("bidirectional")), rows=1, row_length=600, seed=3)

    one = stream()
    seen, states = [], []
    for _ in range(12):
        states.append(one.state_dict())
        seen.append(one.next_batch().examples_N.tolist())
    assert max(state["epoch"] for state in states) >= 2
    for state, expected in zip(states, seen, strict=True):
        two = stream()
        two.load_state_dict(state)
        assert two.next_batch().examples_N.tolist() == expected


def test_every_epoch_shows_every_example_once_to_one_process():
    objective = objective_for(tiny_network("autoregressive"))
    streams = [BatchStream(objective, rows=2, row_length=20, process=(k, 2)) for k in range(2)]
    shown: list[int] = []
    for stream in streams:
        while stream.state_dict()["epoch"] == 0:
            shown += stream.next_batch().examples_N.tolist()
    assert sorted(shown) == list(range(40))


def test_a_document_longer_than_a_row_is_one_clear_sentence():
    objective = objective_for(tiny_network("autoregressive"))
    with pytest.raises(FewstepError, match="does not fit a row of 4"):
        BatchStream(objective, rows=2, row_length=4).next_batch()


@pytest.mark.parametrize(
    ("role", "row_length", "sentence"),
    [
        ("autoregressive", 9, r"rows.jsonl line 7: a document of 10 tokens does not fit a row of 9"),
        ("block_causal", 16, r"rows.jsonl line 7: a document of 19 tokens does not fit a row of 16"),
        ("bidirectional", 30, r"rows.jsonl line 1: a document of 35 tokens does not fit a row of 30"),
    ],
)
def test_an_example_longer_than_a_row_is_named_before_the_first_step(role, row_length, sentence, tmp_path):
    """The canvas of a teacher is drawn: the longest counts, not the one that the first step happens to draw."""
    network = tiny_network(role)
    short, long = [[3, 10, 4]] * 3, [[5, 1], [5, 1], [5, 6, 7, 8, 9, 10, 1]]
    examples = replace(Examples.from_ids(short, long), origins=(Origin("rows.jsonl", "line", [1, 3, 7]),))
    with pytest.raises(FewstepError, match=sentence):
        train(network, objective_for(network, examples), replace(SETTINGS, row_length=row_length), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_answer_longer_than_any_canvas_is_named_before_the_first_step(tmp_path):
    network = tiny_network("bidirectional")
    examples = Examples.from_ids([[3, 10, 4]] * 2, [[5, 1], [5] * 40])
    with pytest.raises(FewstepError, match=r"example 2: an answer of 40 tokens exceeds the longest canvas of 32"):
        train(network, objective_for(network, examples), SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_longest_canvas_is_what_no_draw_exceeds():
    canvas = CanvasLengths(block_size=4, weights=(1.0, 2.0, 0.0, 1e-3, 0.0))
    needed_N = np.array([1, 8, 17])
    assert canvas.draw(needed_N, None).tolist() == [16, 16, 20]
    drawn = [canvas.draw(needed_N, np.random.default_rng(seed)) for seed in range(50)]
    assert (np.max(drawn, 0) <= canvas.draw(needed_N, None)).all()


def test_held_out_prompts_that_cannot_be_answered_are_named_before_a_run(tmp_path):
    network = tiny_network("autoregressive")
    names = ["held.jsonl line 1", "held.jsonl line 3"]
    Samples(["who?", "what?"], max_new_tokens=4).check(network, names)
    too_long = Samples(["who?", "a" * network.max_positions], max_new_tokens=4)
    with pytest.raises(FewstepError, match=r"held.jsonl line 3: a prompt of .* exceed the .* positions"):
        too_long.check(network, names)
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(FewstepError, match=r"samples.jsonl line 1 has no field 'step'"):
        Samples(["who?"], file=tmp_path / "samples.jsonl", max_new_tokens=4).check(network, names[:1])


# Stopping


def poison_at(step: int, network: Network) -> Callable[[Network, int], dict[str, float]]:
    def evaluate(_: Network, now: int) -> dict[str, float]:
        if now == step:
            with torch.no_grad():
                network.module.get_output_embeddings().weight.fill_(float("nan"))
        return {}

    return evaluate


def test_a_loss_that_is_no_number_stops_the_run_before_it_reaches_a_checkpoint(tmp_path):
    network = tiny_network("autoregressive")
    settings = replace(SETTINGS, log_every=100, evaluate_every=7)
    with pytest.raises(FewstepError, match=r"loss is nan at step 8; .*the last checkpoint is kept"):
        train(network, objective_for(network), settings, tmp_path / "out", evaluate=poison_at(7, network))
    assert checkpoints_in(tmp_path / "out") == ["step-00000004"]
    assert not (tmp_path / "out/config.json").exists()


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    begun(tmp_path / "out")
    network = tiny_network("autoregressive")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accelerate.Accelerator.save_state", full)
    with pytest.raises(FewstepError, match="disk is full"):
        train(network, objective_for(network), replace(SETTINGS, evaluate_every=1), tmp_path / "out")
    assert checkpoints_in(tmp_path / "out") == ["step-00000004"]


def test_a_full_disk_at_the_end_keeps_the_checkpoint_and_a_rerun_finishes(tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    network = tiny_network("autoregressive")
    with monkeypatch.context() as patched:
        patched.setattr("fewstep.train.trainer.save_trained", full)
        with pytest.raises(FewstepError, match="disk is full"):
            train(network, objective_for(network), SETTINGS, tmp_path / "out")
    assert checkpoints_in(tmp_path / "out") == ["step-00000008"]
    again, whole = tiny_network("autoregressive"), tiny_network("autoregressive")
    train(again, objective_for(again), SETTINGS, tmp_path / "out")
    train(whole, objective_for(whole), SETTINGS, tmp_path / "whole")
    assert final_state(tmp_path / "out") == final_state(tmp_path / "whole")


def test_samples_are_written_logged_and_judged(tmp_path):
    network = tiny_network("block_causal", head_scale=20)
    references = ["the quick brown fox jumps over", "lazy dogs, 12 of them"]
    baseline = measure_health([network.tokenizer.encode(text, add_special_tokens=False) for text in references])
    monitor = CollapseMonitor(CollapseLimits(grace_steps=4), baseline=baseline)
    samples = Samples(["what is 1+1?", "who?"], file=tmp_path / "out/samples.jsonl", monitor=monitor, max_new_tokens=12)
    settings = replace(SETTINGS, max_steps=3, evaluate_every=1)
    result = train(network, objective_for(network), settings, tmp_path / "out", evaluate=samples, monitor=monitor)
    rows = list(read_rows(tmp_path / "out/samples.jsonl", ["step", "prompt", "text", "num_tokens", "num_forwards"]))
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (s, p) for s in (1, 2, 3) for p in ("what is 1+1?", "who?")
    ]
    assert {"health/repetition", "health/entropy", "tokens_per_forward", "loss"} <= result.history[-1].keys()
    assert next((tmp_path / "out/logs").glob("events*")).stat().st_size > 0
    with pytest.raises(CollapseError, match="at step 4 the outputs have collapsed"):
        monitor.observe_health(replace(baseline, entropy=0.0), step=4)


def test_samples_of_steps_that_are_repeated_are_replaced(tmp_path):
    network = tiny_network("block_causal")
    samples = Samples(["who?"], file=tmp_path / "samples.jsonl", max_new_tokens=4)
    for step in (5, 10, 15, 10):
        samples(network, step)
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [5, 10]


def test_a_collapse_stops_the_run_and_keeps_the_samples(tmp_path):
    network = tiny_network("block_causal")
    sound = Health(
        num_outputs=1, mean_length=9, empty=0, repetition=0, longest_run=1, distinct_1=1, distinct_2=1, entropy=99
    )
    monitor = CollapseMonitor(baseline=sound)
    samples = Samples(["who?"], file=tmp_path / "out/samples.jsonl", monitor=monitor, max_new_tokens=8)
    settings = replace(SETTINGS, evaluate_every=5)
    with pytest.raises(CollapseError, match="at step 5 the outputs have collapsed: "):
        train(network, objective_for(network), settings, tmp_path / "out", evaluate=samples, monitor=monitor)
    assert len(list(read_rows(tmp_path / "out/samples.jsonl"))) == 1
    assert (tmp_path / "out/checkpoints/step-00000004").exists()


@pytest.mark.parametrize(
    "wrong", [{"max_steps": 0}, {"learning_rate": 0.0}, {"ema_decay": 1.0}, {"save_every": 0}, {"precision": "fp8"}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(FewstepError, match=next(iter(wrong))):
        replace(SETTINGS, **wrong)


# Numbers that are not finite


def values_of(network: Network) -> torch.Tensor:
    return network.module.get_output_embeddings().weight


@pytest.mark.parametrize(("log_every", "save_every", "max_steps"), [(100, 2, 12), (100, None, 8), (100, 100, 5)])
def test_weights_that_overflow_in_a_step_with_a_finite_loss_are_never_saved(log_every, save_every, max_steps, tmp_path):
    """The step before a checkpoint, or the last one: no later loss tells of it."""
    network = tiny_network("autoregressive")
    settings = replace(
        SETTINGS, max_steps=max_steps, log_every=log_every, save_every=save_every, learning_rate=1e3, weight_decay=1e3,
        warmup_steps=1, schedule="constant_with_warmup",
    )  # fmt: skip
    with pytest.raises(FewstepError, match=r"is not finite at step \d+; |loss is nan at step") as raised:
        train(network, objective_for(network), settings, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out/config.json").exists()
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


@pytest.mark.parametrize("where", ["moment", "average"])
def test_moments_and_averages_that_overflow_stop_the_run_and_the_kept_checkpoint_goes_on(where, tmp_path, monkeypatch):
    step = Learner.step

    def overflowing(self, *args):
        parts = step(self, *args)
        overflowing.calls += 1
        if overflowing.calls == 6:
            if where == "moment":
                next(iter(self._optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = torch.inf
            else:
                next(self.average.parameters()).data.view(-1)[0] = torch.inf
        return parts

    overflowing.calls = 0
    settings = replace(SETTINGS, ema_decay=0.9)
    network = tiny_network("autoregressive")
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", overflowing)
        with pytest.raises(FewstepError, match=f"{where}|exp_avg_sq .*is not finite at step 6; .*checkpoint is kept"):
            train(network, objective_for(network), settings, tmp_path / "out")
    assert checkpoints_in(tmp_path / "out") == ["step-00000004"]
    for name in ("out", "whole"):
        network = tiny_network("autoregressive")
        train(network, objective_for(network), settings, tmp_path / name)
    assert final_state(tmp_path / "out") == final_state(tmp_path / "whole")


def test_weights_that_only_float32_holds_are_kept_in_a_checkpoint_and_saved_in_float32(tmp_path):
    def enlarge(network: Network, step: int) -> dict[str, float]:
        with torch.no_grad():
            network.module.get_input_embeddings().weight[60] = torch.finfo(torch.float32).max
        return {}

    settings = replace(SETTINGS, evaluate_every=12, weights_dtype="bfloat16")
    network = tiny_network("autoregressive")
    with pytest.raises(FewstepError, match=r"embed_tokens.weight does not fit bfloat16; a checkpoint of step 12"):
        train(network, objective_for(network), settings, tmp_path / "out", evaluate=enlarge)
    assert checkpoints_in(tmp_path / "out") == ["step-00000012"]
    again = tiny_network("autoregressive")
    train(again, objective_for(again), replace(settings, weights_dtype="float32"), tmp_path / "out")
    assert_close(values_of(load_network(tmp_path / "out", dtype="float32", device="cpu")), values_of(network))


def test_weights_that_are_not_finite_from_the_start_are_refused(tmp_path):
    network = tiny_network("autoregressive")
    with torch.no_grad():
        values_of(network)[3, 3] = float("nan")
    with pytest.raises(FewstepError, match=r"lm_head.weight of .* holds values that are not finite"):
        train(network, objective_for(network), SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_are_compiled_on_a_gpu_only(tmp_path):
    network = tiny_network("autoregressive")
    with pytest.raises(FewstepError, match="compiled layers need a CUDA GPU, and the network is on cpu"):
        train(network, objective_for(network), replace(SETTINGS, compiled=True), tmp_path / "out")


def test_a_mac_with_an_apple_gpu_trains_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    save_network(tiny_network("autoregressive"), tmp_path / "model")
    network = load_network(tmp_path / "model")
    assert network.device.type == "cpu"
    train(network, objective_for(network), replace(SETTINGS, max_steps=2), tmp_path / "out")
    assert network.device.type == "cpu"


# The learning rate


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "shares"),
    [
        ("linear", 2, [1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 0, [1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        ("constant_with_warmup", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1]),
        ("cosine", 1, [1, *((1 + math.cos(math.pi * step / 5)) / 2 for step in (1, 2, 3, 4))]),
    ],
)
def test_every_step_learns_and_the_warm_up_ends_at_the_highest_rate(schedule, warmup_steps, shares, tmp_path):
    settings = replace(
        SETTINGS, max_steps=5, log_every=1, save_every=None, schedule=schedule, warmup_steps=warmup_steps
    )
    network = tiny_network("autoregressive")
    history = train(network, objective_for(network), settings, tmp_path / "out").history
    assert [line["learning_rate"] for line in history] == pytest.approx([3e-3 * share for share in shares])


# What is wrong with the folder


def damage(folder: Path, name: str, how: str) -> None:
    path = folder / name
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        torch.save({}, path)


NAMES = (
    "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "average.pt", "process-0.json",
    "run.json", "hashes.json",
)  # fmt: skip


def test_a_damaged_file_of_a_checkpoint_is_told_in_one_sentence_and_never_passed_over(tmp_path):
    settings = replace(SETTINGS, evaluate_every=1, ema_decay=0.9)

    def run(output: Path, evaluate: Callable[[Network, int], dict[str, float]] | None = None) -> None:
        network = tiny_network("autoregressive")
        train(network, objective_for(network), settings, output, evaluate=evaluate)

    with pytest.raises(RuntimeError, match="plug"):
        run(tmp_path / "begun", interrupt_at(6))
    for index, name in enumerate(NAMES):
        for how in ("missing", ("cut", "flipped", "other")[index % 3]):
            output = tmp_path / f"{name}-{how}"
            shutil.copytree(tmp_path / "begun", output)
            damage(output / "checkpoints/step-00000004", name, how)
            with pytest.raises(FewstepError, match=re.escape(name)) as raised:
                run(output)
            assert "\n" not in str(raised.value)
            assert "step-00000004" in str(raised.value)


def test_random_states_that_are_whole_but_cannot_be_restored_are_not_passed_over(tmp_path):
    begun(tmp_path / "out")
    folder = tmp_path / "out/checkpoints/step-00000004"
    other = torch.Generator().manual_seed(5).get_state()
    torch.save({"torch_manual_seed": other}, folder / "random_states_0.pkl")  # without those of Python and numpy
    (folder / "hashes.json").write_text(json.dumps(_hashes(folder)))
    network = tiny_network("autoregressive")
    with pytest.raises(FewstepError, match="its random states cannot be restored"):
        train(network, objective_for(network), replace(SETTINGS, evaluate_every=1), tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling", "too long", "zero byte", "logs", "checkpoints"])
def test_an_output_that_can_be_no_folder_is_refused_before_any_work(kind, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    output = tmp_path / {"below a file": "file/x", "too long": "x" * 300, "zero byte": "x\0y"}.get(kind, kind)
    if kind in ("logs", "checkpoints"):
        output = tmp_path / "out"
        output.mkdir()
        (output / kind).write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FewstepError) as raised:
        check_output(output)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_with_too_little_room_is_refused_before_the_first_step(tmp_path, monkeypatch):
    network = tiny_network("autoregressive")
    num_bytes = 4 * sum(value.numel() for value in network.module.parameters())
    for free, settings in ((num_bytes - 1, replace(SETTINGS, save_every=None)), (4 * num_bytes - 1, SETTINGS)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(FewstepError, match="what is saved there takes"):
            train(network, objective_for(network), settings, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_trying_out_an_output_leaves_nothing_behind(tmp_path):
    check_output(tmp_path / "a/b/c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_log_that_cannot_be_written_is_one_sentence(number, tmp_path, monkeypatch, capfd):
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    network = tiny_network("autoregressive")
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", refuse)
    with pytest.raises(FewstepError, match=f"could not write the log in .*: {os.strerror(number)}"):
        train(network, objective_for(network), replace(SETTINGS, log_every=1), tmp_path / "out")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("size", [20_000, 110_000])
def test_a_limit_on_the_size_of_files_is_one_sentence(size, tmp_path):
    network = tiny_network("autoregressive")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(FewstepError, match=r"could not write .*step-00000004: a file would be larger than"):
            train(network, objective_for(network), SETTINGS, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out/checkpoints").iterdir())


# Two processes


def run_two(output: Path) -> None:
    """Run by each of two processes: a whole run, one that the main process stops, and its resumption."""
    import torch.distributed as distributed

    def run(name: str, stop_at: int = 0) -> None:
        def evaluate(network: Network, step: int) -> dict[str, float]:
            if step == stop_at:
                raise FewstepError("stopped by the main process")
            return {"probe": float(logits_of(network)[0, 0, 5])}

        network = tiny_network("block_causal")
        settings = replace(SETTINGS, max_steps=20, evaluate_every=5)
        train(network, objective_for(network), settings, output / name, evaluate=evaluate)
        assert distributed.get_world_size() == 2

    run("whole")
    with pytest.raises(FewstepError, match="stopped by the main process"):
        run("stopped", stop_at=10)
    run("stopped")
    step, rank = Learner.step, distributed.get_rank()

    def signalled(self, *args):
        if rank == 1 and self._scheduler.scheduler.last_epoch == 2 * 6:
            signal.raise_signal(signal.SIGTERM)  # one process alone
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Learner, "step", signalled)
        with pytest.raises(KeyboardInterrupt, match="interrupted at step 7; a checkpoint is saved"):
            run("signalled")
    run("signalled")
    distributed.destroy_process_group()


def test_two_processes_train_together_stop_together_and_resume_exactly(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(script(f"run_two(Path({str(tmp_path)!r}))"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "whole/report.json").read_text())
    assert report["processes"] == 2
    assert report["history"][-1]["loss"] < report["history"][0]["loss"]
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")
    assert final_state(tmp_path / "signalled") == final_state(tmp_path / "whole")


def test_processes_of_the_command_line_say_once_what_is_wrong(tmp_path):
    save_network(tiny_network("autoregressive"), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "who?", "completion": "you"}\n' * 4)
    options = {
        "model": tmp_path / "model", "data": tmp_path / "rows.jsonl", "output": tmp_path / "out", "max-steps": 2,
        "row-length": 4, "device": "cpu",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fewstep"]
    command += ["train", "sft", *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    ours = [line for line in done.stderr.splitlines() if line.startswith("fewstep:")]
    assert len(ours) == 1, done.stderr
    assert "rows.jsonl line 1: a document of" in ours[0]
