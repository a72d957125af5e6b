"""CLLM and Medusa training: packed windows against plain forwards, trajectories on disk, and fewer passes after it."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.command import Run
from helpers.files import contents, write_lines
from helpers.packed import batch_of, forward_of, unpacked_logits
from torch import Tensor
from torch.testing import assert_close

from fewstep.decode.health import REPEATED_NGRAM, repetition
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.jacobi_windows import JacobiTrajectory, jacobi_trajectories
from fewstep.decode.loop import decode
from fewstep.decode.medusa import Medusa
from fewstep.decode.requests import Output, Request
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.load import load_network, network_hash, save_network
from fewstep.models.masks import Layout
from fewstep.models.medusa import MedusaHeads, load_heads, save_heads
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.train.causal_records import collect_jacobi, read_jacobi_table
from fewstep.train.cllm import CLLMBatch, CLLMObjective, CLLMSettings, JacobiTable
from fewstep.train.collect import collect, decode_with, distribution_of, row_seed, teacher_of
from fewstep.train.documents import Batch
from fewstep.train.examples import Examples
from fewstep.train.lora import LoRASettings
from fewstep.train.medusa import MedusaObjective, MedusaSettings
from fewstep.train.records import PromptRow
from fewstep.train.settings import TrainSettings
from fewstep.train.trainer import train
from fewstep.train.trajectories import TrajectoryStore

WINDOW, MAX_NEW_TOKENS = 4, 11
SETTINGS = TrainSettings(
    max_steps=8, rows=2, row_length=128, learning_rate=3e-3, warmup_steps=2, log_every=2, save_every=4
)


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_network("autoregressive", head_scale=20)


def prompts(count: int = 5, length: int = 4) -> list[PromptRow]:
    rng = np.random.default_rng(0)
    return [
        PromptRow(f"p{i}", [3, *rng.integers(10, 60, length + i % 2).tolist(), 4], [20, 21 + i, 1] if i % 2 else None)
        for i in range(count)
    ]


def gather(network: Network, folder: Path, rows: list[PromptRow] | None = None, window: int = WINDOW, **options: Any):
    options = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 3, "shard_size": 2, "settings": {}} | options
    return collect_jacobi(network, rows or prompts(), folder, Jacobi(role=network.role, window=window), **options)


@pytest.fixture(scope="module")
def store(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cllm") / "trajectories"
    gather(network, folder)
    return folder


@pytest.fixture(scope="module")
def table(network: Network, store: Path) -> JacobiTable:
    return read_jacobi_table(store, network)[0]


def decoded(network: Network, rows: list[PromptRow]) -> list[JacobiTrajectory]:
    """The same trajectories as in a store, not by way of it."""
    requests = [
        Request(prompt_ids=list(row.prompt_ids), max_new_tokens=MAX_NEW_TOKENS, seed=row_seed(row.id, 0))
        for row in rows
    ]
    return jacobi_trajectories(network, requests, Jacobi(role=network.role, window=WINDOW))


# Trajectories on disk


def test_what_was_decoded_is_read_back(network, store):
    table, references = read_jacobi_table(store, network)
    trajectories = decoded(network, prompts())
    assert table.window == WINDOW
    assert table.examples.completion_ids.tolist() == [i for t in trajectories for i in t.output.token_ids]
    assert table.examples.prompt_ids.tolist() == [i for row in prompts() for i in row.prompt_ids]
    states = [window.states_PN for trajectory in trajectories for window in trajectory.windows]
    assert table.num_states_W.tolist() == [len(state_PN) for state_PN in states]
    assert table.states_Z.tolist() == torch.cat([state_PN.flatten() for state_PN in states]).tolist()
    assert references is not None
    assert references.completion_ids.tolist() == [20, 22, 1, 20, 24, 1]
    assert references.prompt_ids.tolist() == [i for row in prompts() if row.reference_ids for i in row.prompt_ids]


def test_collecting_again_by_others_and_after_an_interruption_gives_the_same_files(network, store, tmp_path):
    for worker in ((1, 2), (0, 2)):
        gather(network, tmp_path / "t", worker=worker, batch_size=2)
    assert contents(tmp_path / "t") == contents(store)
    (tmp_path / "t" / "shard-00001.parquet").unlink()
    with pytest.raises(FewstepError, match="holds 2 of 3 shards"):
        read_jacobi_table(tmp_path / "t", network)
    report = gather(network, tmp_path / "t")
    assert (report.num_shards_made_now, report.num_records) == (1, 5)
    assert contents(tmp_path / "t") == contents(store)


def test_repetitive_answers_are_rejected_and_counted(network, tmp_path):
    answers = [np.array(trajectory.output.token_ids) for trajectory in decoded(network, prompts())]
    shares = [repetition(answer, REPEATED_NGRAM) for answer in answers]
    limit = float(np.median(shares))
    expected = sum(share > limit for share in shares)
    report = gather(network, tmp_path / "t", most_repetition=limit)
    assert (report.num_records, report.num_rejected) == (5 - expected, expected)
    assert len(read_jacobi_table(tmp_path / "t", network)[0].examples) == 5 - expected
    with pytest.raises(FewstepError, match="a share between 0 and 1, got 2"):
        gather(network, tmp_path / "other", most_repetition=2)
    gather(network, tmp_path / "none", keep=lambda row, output: False)
    with pytest.raises(FewstepError, match="holds no jacobi trajectories, since all were rejected"):
        read_jacobi_table(tmp_path / "none", network)


def test_trajectories_of_another_model_kind_or_window_are_refused(network, store, tmp_path):
    with pytest.raises(FewstepError, match="made by another model"):
        read_jacobi_table(store, tiny_network("autoregressive", head_scale=20, seed=1))
    with pytest.raises(FewstepError, match="holds jacobi trajectories, not diffusion trajectories"):
        TrajectoryStore(store)
    with pytest.raises(FewstepError, match="window is 4 there and 8 here"):
        gather(network, store, window=8)
    teacher = tiny_network("bidirectional")
    distribution = distribution_of(teacher)
    decoder = LanguageModel(teacher).decoder(max_new_tokens=4)
    decoding = decode_with(teacher, decoder, max_new_tokens=4, batch_size=2, distribution=distribution)
    collect(decoding, prompts(2), tmp_path / "d", teacher=teacher_of(teacher), settings={}, distribution=distribution)
    with pytest.raises(FewstepError, match="holds diffusion trajectories, not jacobi trajectories"):
        read_jacobi_table(tmp_path / "d", network)


# The objective


def prepared_for(
    network: Network, table: JacobiTable, seed: int = 3, references: Examples | None = None, **settings: Any
) -> tuple[CLLMObjective, Batch, CLLMBatch]:
    objective = CLLMObjective(network.role, table, 1, references=references, settings=CLLMSettings(**settings))
    batch = batch_of(objective, num_rows=3, row_length=80)
    return objective, batch, objective.prepare(batch, torch.Generator().manual_seed(seed))


def documents_of(batch: Batch, tokens_RT: Tensor) -> dict[int, list[list[int]]]:
    """Example -> the tokens of its segments: prompt, noisy answer, clean answer."""
    packed = batch.packed
    return {
        int(example): [
            tokens_RT[(packed.document_RT == document) & (packed.segment_RT == segment)].tolist()
            for segment in range(3)
        ]
        for document, example in enumerate(batch.examples_N)
    }


def states_of(trajectories: list[JacobiTrajectory], example: int, start: int) -> list[list[int]]:
    return trajectories[example].windows[start // WINDOW].states_PN.tolist()


@pytest.mark.parametrize("goal", ["global", "local"])
def test_the_packed_loss_is_that_of_unpacked_forwards_window_by_window(network, table, goal):
    objective, batch, prepared = prepared_for(network, table, goal=goal)
    trajectories = decoded(network, prompts())
    divergences, likelihoods = [], []
    for example, (prompt, noisy, clean) in documents_of(batch, prepared.inputs.tokens_RT).items():
        assert clean == trajectories[example].output.token_ids
        clean_logits = unpacked_logits(network, prompt + clean)[len(prompt) - 1 : -1]
        likelihoods.append(F.cross_entropy(clean_logits, torch.tensor(clean), reduction="none"))
        for start in range(0, len(clean), WINDOW):
            state, fixed = noisy[start : start + WINDOW], clean[start : start + WINDOW]
            states = states_of(trajectories, example, start)
            assert state in states[:-1]
            goal_tokens = fixed if goal == "global" else states[states.index(state) + 1]
            given = prompt + clean[:start]
            logits, goals = (unpacked_logits(network, given + tokens)[len(given) :] for tokens in (state, goal_tokens))
            differing = [i for i in range(len(state)) if state[i] != goal_tokens[i]]
            for i in range(differing[0] if differing else len(state), len(state) - 1):
                divergences.append(F.kl_div(logits[i].log_softmax(-1), goals[i].softmax(-1), reduction="sum"))
    loss = objective.loss(forward_of(network), prepared)
    assert len(divergences) == prepared.num_noisy > 10
    assert_close(loss.parts["consistency"], torch.stack(divergences).mean(), atol=1e-4, rtol=1e-4)
    assert_close(loss.parts["autoregressive"], torch.cat(likelihoods).mean(), atol=1e-4, rtol=1e-4)
    assert_close(loss.total.detach(), loss.parts["consistency"] + 10 * loss.parts["autoregressive"])


def test_the_goal_of_the_consistency_loss_is_detached(network, table):
    objective, _, prepared = prepared_for(network, table, autoregressive=0, allow_unanchored=True)
    logits: list[Tensor] = []

    def forward(*inputs: Any) -> Tensor:
        logits.append(forward_of(network)(*inputs).detach().requires_grad_())
        return logits[0]

    objective.loss(forward, prepared).total.backward()
    gradient = logits[0].grad
    assert gradient is not None
    assert gradient[: prepared.num_noisy].abs().sum() > 0
    assert gradient[prepared.num_noisy :].abs().sum() == 0


def test_every_state_before_the_fixed_point_is_drawn_and_no_other(network, table):
    trajectories = decoded(network, prompts())
    drawn: set[tuple[int, ...]] = set()
    for seed in range(40):
        _, batch, prepared = prepared_for(network, table, seed=seed)
        drawn.add(tuple(documents_of(batch, prepared.inputs.tokens_RT)[0][1][:WINDOW]))
    assert drawn == {tuple(state) for state in states_of(trajectories, 0, 0)[:-1]}


def test_the_progressive_schedule_takes_the_state_nearest_to_the_cycles_noise(network, table):
    trajectories = decoded(network, prompts())

    def distances(tokens: list[int], fixed: list[int]) -> list[float]:
        """From the noise ratios 1/2 and 1."""
        wrong = float(np.mean([a != b for a, b in zip(tokens, fixed, strict=True)]))
        return [abs(wrong - ratio) for ratio in (0.5, 1.0)]

    seen = set()
    for seed in range(8):
        _, batch, prepared = prepared_for(network, table, seed=seed, noise="progressive", noise_cycle=2)
        for example, (_, noisy, clean) in documents_of(batch, prepared.inputs.tokens_RT).items():
            phases = {0, 1}
            for start in range(0, len(clean), WINDOW):
                fixed = clean[start : start + WINDOW]
                states = [distances(state, fixed) for state in states_of(trajectories, example, start)[:-1]]
                drawn = distances(noisy[start : start + WINDOW], fixed)
                nearest = [drawn[i] <= min(state[i] for state in states) + 1e-6 for i in range(2)]
                phases = {phase for phase in phases if nearest[(start // WINDOW + phase) % 2]}
            assert phases
            seen |= phases
    assert seen == {0, 1}


def test_augmentation_makes_about_half_of_the_wrong_tokens_right(network, table):
    wrong = dict.fromkeys((0.0, 1.0), 0)
    for seed in range(20):
        plain, augmented = (
            documents_of(batch, prepared.inputs.tokens_RT)
            for _, batch, prepared in (prepared_for(network, table, seed=seed, augmented=share) for share in wrong)
        )
        for example, (_, noisy, clean) in plain.items():
            changed = augmented[example][1]
            assert all(new in (old, right) for new, old, right in zip(changed, noisy, clean, strict=True))
            for share, tokens in ((0.0, noisy), (1.0, changed)):
                wrong[share] += sum(token != right for token, right in zip(tokens, clean, strict=True))
    assert 0.4 < wrong[1.0] / wrong[0.0] < 0.6


def test_references_are_documents_of_their_own_and_carry_the_autoregressive_loss(network, store):
    table, references = read_jacobi_table(store, network)
    objective, batch, prepared = prepared_for(network, table, references=references, labels="reference")
    answers = documents_of(batch, prepared.inputs.tokens_RT)
    assert [answers[example][1:] for example in (5, 6)] == [[[], [20, 22, 1]], [[], [20, 24, 1]]]
    assert sorted(prepared.truth_A.tolist()) == sorted([20, 22, 1, 20, 24, 1])
    expected = [
        F.cross_entropy(
            unpacked_logits(network, prompt + answer)[len(prompt) - 1 : -1], torch.tensor(answer), reduction="none"
        )
        for prompt, _, answer in (answers[example] for example in (5, 6))
    ]
    parts = objective.loss(forward_of(network), prepared).parts
    assert_close(parts["autoregressive"], torch.cat(expected).mean(), atol=1e-4, rtol=1e-4)
    assert prepared.num_noisy > 5
    with pytest.raises(FewstepError, match="labels reference needs reference answers"):
        prepared_for(network, table, labels="reference")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"autoregressive": 0}, "a consistency loss alone may collapse; add an autoregressive loss, or force it"),
        ({"autoregressive": 0, "consistency": 0}, "nothing to learn"),
        ({"consistency": -1}, "consistency must be at least 0, got -1"),
        ({"goal": "far"}, "unknown goal 'far'; choose global or local"),
        ({"noise": "some"}, "unknown noise"),
        ({"noise_cycle": 0}, "at least 1"),
        ({"augmented": 2}, "augmented must be at most 1, got 2"),
        ({"augmented": 0.5, "goal": "local"}, "an augmented state has no next state"),
        ({"temperature": 0}, "above 0"),
        ({"label_smoothing": 1}, "below 1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, sentence):
    with pytest.raises(FewstepError, match=sentence):
        CLLMSettings(**settings)


def test_only_causal_networks_are_trained(table):
    role = tiny_network("block_causal").role
    with pytest.raises(FewstepError, match="CLLM trains a causal network, not one of the role block_causal"):
        CLLMObjective(role, table, 1)
    with pytest.raises(FewstepError, match="Medusa heads guess for a causal network"):
        MedusaObjective(role, table.examples, 1)


# Training


def answered(network: Network, rows: list[PromptRow], decoder: Any) -> tuple[list[list[int]], float]:
    """Answers, and tokens per pass."""
    requests = [Request(prompt_ids=list(row.prompt_ids), max_new_tokens=24) for row in rows]
    outputs: list[Output] = decode(network, requests, decoder)
    tokens_per_pass = sum(output.num_tokens for output in outputs) / sum(output.num_forwards for output in outputs)
    return [output.token_ids for output in outputs], tokens_per_pass


def test_a_network_trained_on_its_own_trajectories_answers_the_same_in_fewer_passes(tmp_path):
    network = tiny_network("autoregressive", head_scale=20)
    rows = prompts(24)
    gather(network, tmp_path / "t", rows, window=8, max_new_tokens=24, batch_size=24, shard_size=24)
    decoder = Jacobi(role=network.role, window=8)
    answers, before = answered(network, rows, decoder)
    table, _ = read_jacobi_table(tmp_path / "t", network)
    objective = CLLMObjective(network.role, table, 1, settings=CLLMSettings(autoregressive=1.0))
    settings = replace(SETTINGS, max_steps=200, rows=4, row_length=256, learning_rate=5e-3, save_every=None)
    train(network, objective, settings, tmp_path / "out")
    trained, after = answered(network, rows, decoder)
    assert before < 1.2
    assert after > 1.5 * before
    same = [a == b for old, new in zip(answers, trained, strict=True) for a, b in zip(old, new, strict=False)]
    assert np.mean(same) > 0.95


def test_an_interrupted_run_resumes_and_equals_an_uninterrupted_one(table, tmp_path):
    def run(output: Path, stop: int | None = None) -> dict[str, Tensor]:
        network = tiny_network("autoregressive", head_scale=20)
        objective = CLLMObjective(network.role, table, 1, settings=CLLMSettings(noise="progressive", augmented=0.5))

        def evaluate(_: Network, step: int) -> dict[str, float]:
            if step == stop:
                raise RuntimeError("pulled the plug")
            return {}

        settings = replace(SETTINGS, evaluate_every=1)
        train(network, objective, settings, output, lora=LoRASettings(rank=4, alpha=4.0), evaluate=evaluate)
        return {name: value.clone() for name, value in network.module.state_dict().items()}

    with pytest.raises(RuntimeError, match="plug"):
        run(tmp_path / "a", stop=6)
    resumed, whole = run(tmp_path / "a"), run(tmp_path / "b")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert (tmp_path / "a" / "adapter_config.json").exists()


def test_medusa_learns_what_follows_each_row(network, table):
    objective = MedusaObjective(network.role, table.examples, 1, settings=MedusaSettings(heads=2, decay=0.5))
    batch = batch_of(objective, num_rows=3, row_length=80)
    prepared = objective.prepare(batch, torch.Generator())
    guesses_2V = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))

    def forward(tokens_RT: Tensor, positions_RT: Tensor, layout: Layout, rows_S: Tensor, adapted_RT: None) -> Tensor:
        own_SV = F.one_hot(tokens_RT.flatten()[rows_S], 64).float()
        return own_SV[:, None] + guesses_2V  # a row's logits depend on its own token

    expected = []
    for head in range(2):
        values = []
        for row, output in zip(prompts(), decoded(network, prompts()), strict=True):
            text, context = [*row.prompt_ids, *output.output.token_ids], len(row.prompt_ids)
            for i in range(context - 1, len(text) - 2 - head):
                logits = F.one_hot(torch.tensor(text[i]), 64).float() + guesses_2V[head]
                values.append(F.cross_entropy(logits, torch.tensor(text[i + 2 + head])))
        expected.append(torch.stack(values).mean())
    loss = objective.loss(forward, prepared)
    assert_close(torch.stack(list(loss.parts.values())), torch.stack(expected))
    assert_close(loss.total, 0.5 * expected[0] + 0.25 * expected[1])


def test_trained_heads_save_passes_and_leave_the_network_as_it_was(tmp_path):
    network = tiny_network("autoregressive", head_scale=20)
    own_hash, rows = network_hash(network), prompts(24)
    answers, _ = answered(network, rows, Jacobi(role=network.role))
    examples = Examples.from_ids([row.prompt_ids for row in rows], answers)
    objective = MedusaObjective(network.role, examples, 1, settings=MedusaSettings(heads=2))
    fresh = MedusaHeads.of(network, 2)
    settings = replace(SETTINGS, max_steps=150, rows=4, row_length=256, learning_rate=5e-3, save_every=None)
    _, before = answered(network, rows, Medusa(role=network.role, heads=fresh, window=8))
    train(network, objective, settings, tmp_path / "heads", heads=fresh)
    assert network_hash(network) == own_hash
    heads = load_heads(tmp_path / "heads", network)
    same, after = answered(network, rows, Medusa(role=network.role, heads=heads, window=8))
    assert same == answers
    assert after > 1.5 * before
    assert not (tmp_path / "heads" / "config.json").exists()
    with pytest.raises(FewstepError, match="already holds a model"):
        train(network, objective, settings, tmp_path / "heads", heads=heads)


@pytest.mark.parametrize(
    ("settings", "sentence"), [({"heads": 0}, "heads must be at least 1"), ({"decay": 0.0}, "above 0")]
)
def test_medusa_settings_without_meaning_are_refused(settings, sentence):
    with pytest.raises(FewstepError, match=sentence):
        MedusaSettings(**settings)


# The command line


def test_from_prompts_to_a_faster_model_and_heads_on_the_command_line(network, run: Run, tmp_path):
    model, other, rows = tmp_path / "model", tmp_path / "other", tmp_path / "rows.jsonl"
    save_network(network, model)
    save_network(tiny_network("autoregressive", seed=1), other)
    write_lines(rows, *({"prompt": f"{i} + {i}?", "completion": f"{i + i}."} for i in range(6)))
    collecting = ("collect", "--model", model, "--data", rows, "--max-new-tokens", 12)
    cases = {
        "tokens only; leave out": (*collecting, "--output", tmp_path / "x", "--top", 4),
        "no effect on texts": (
            *collecting,
            *("--output", tmp_path / "x", "--decoder", "lookahead", "--most-repetition", 0.5),
        ),
        "greedy only": (*collecting, "--output", tmp_path / "x", "--temperature", 1),
    }
    for sentence, arguments in cases.items():
        assert sentence in run(*arguments).sentence()
    store, report = tmp_path / "t", tmp_path / "report.json"
    arguments = (*collecting, "--output", store, "--window", 4, "--most-repetition", 1, "--json", report)
    assert run(*arguments).code == 0
    found = json.loads(report.read_text())
    assert (found["num_records"], found["num_rejected"]) == (6, 0)
    short = ("--max-steps", 2, "--rows", 1, "--row-length", 128)
    training = ("train", "cllm", "--trajectories", store, "--model")
    assert run(*training, model, "--output", tmp_path / "out", "--lora", "--lora-rank", 2, *short).code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert load_network(tmp_path / "out").role.jacobi_window == 4
    assert "made by another model" in run(*training, other, "--output", tmp_path / "x", *short).sentence()
    assert (
        "a consistency loss alone may collapse"
        in run(*training, model, "--output", tmp_path / "x", *short, "--autoregressive", 0).sentence()
    )
    assert (
        "--noise-cycle has no effect without --noise progressive"
        in run(*training, model, "--output", tmp_path / "x", *short, "--noise-cycle", 4).sentence()
    )
    heads = ("train", "medusa", "--model", model, "--data", rows, "--heads", 2, "--output", tmp_path / "heads", *short)
    assert run(*heads).code == 0
    assert len(load_heads(tmp_path / "heads", network)) == 2


def test_the_comparison_of_decoders_leaves_out_what_is_missing_and_says_so(tmp_path, capsys):
    compare_decoders = importlib.import_module("compare_decoders")
    causal = tiny_network("autoregressive", head_scale=20, max_positions=1024)
    save_network(causal, tmp_path / "causal")
    save_heads(MedusaHeads.of(causal, 2), tmp_path / "heads", causal)
    given = {
        "folder": tmp_path / "results", "model": str(tmp_path / "causal"), "cllm": str(tmp_path / "causal"),
        "heads": None, "draft": str(tmp_path / "nowhere"), "student": None, "drafter": None,
        "count": 3, "timed": 1, "batch_size": 2, "max_new_tokens": 12, "device": "cpu",
    }  # fmt: skip
    compare_decoders.compare(**given)
    kept = tmp_path / "results" / "answers" / "gsm-symbolic--jacobi--000000.json"
    assert any(text for text in json.loads(kept.read_text())["result"]["texts"])
    made = kept.stat().st_mtime_ns
    compare_decoders.compare(**given | {"heads": str(tmp_path / "heads")})  # answers what is missing
    assert kept.stat().st_mtime_ns == made
    found = json.loads((tmp_path / "results" / "comparison.json").read_text())
    rows = {row["contender"]: row for row in found["rows"]}
    assert set(found["left_out"]) == {
        "speculative", "speculative, block student", "self-speculative, fused", "self-speculative, two-pass",
        "CDLM student",
    }  # fmt: skip
    assert {row["same_answers"] for row in rows.values()} == {1.0}
    assert rows["CLLM"]["num_forwards_mean"] == rows["jacobi"]["num_forwards_mean"]
    heads = sum(parameter.numel() for parameter in MedusaHeads.of(causal, 2).parameters())
    assert {name: row["extra_parameters"] for name, row in rows.items() if row["extra_parameters"]} == {"medusa": heads}
    table = (tmp_path / "results" / "comparison.md").read_text()
    assert "Left out: CDLM student, since --student was not given." in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "results" / "speeds.svg").exists()
    with pytest.raises(FewstepError, match="no model 'nowhere'"):
        compare_decoders.compare(**given | {"model": "nowhere", "folder": tmp_path / "others"})
    assert not (tmp_path / "others").exists()
    with pytest.raises(FewstepError, match="batch_size is 2 there and 3 here"):
        compare_decoders.compare(**given | {"batch_size": 3})
    kept.write_text(kept.read_text().replace('"weights": "', '"weights": "other '))
    with pytest.raises(FewstepError, match=r"jacobi--000000.json keeps a result of other weights"):
        compare_decoders.compare(**given)
