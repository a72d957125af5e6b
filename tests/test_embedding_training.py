"""Training in embedding space: what is noised, the targets of its objectives, and runs on tiny networks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.packed import batch_of
from torch import Tensor
from torch.testing import assert_close

from fewstep.cli.main import main
from fewstep.decode.embedding import EmbeddingSampling, Rows, euler
from fewstep.decode.embedding_generator import EmbeddingSampler, normal_noise
from fewstep.decode.generator import answer
from fewstep.decode.requests import Request
from fewstep.decode.sampling import Sampling
from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.models.embedding_denoiser import EmbeddingDenoiser, to_embedding_space
from fewstep.models.load import save_network
from fewstep.models.masks import Layout, added_to_scores
from fewstep.models.network import Network
from fewstep.models.noise_conditioning import NoisyRows, conditioning_of, noisy_embeddings, noisy_scores
from fewstep.models.tiny import tiny_network
from fewstep.train.documents import CanvasLengths
from fewstep.train.embedding import (
    EmbeddingObjective,
    EmbeddingSettings,
    Prepared,
    TokenCorruption,
    first_weight,
    trained_space,
    warp_by_loss,
)
from fewstep.train.embedding_paths import collect_paths, read_paths
from fewstep.train.examples import Examples
from fewstep.train.settings import TrainSettings
from fewstep.train.trainer import train

PROMPTS = [[3, 10, 11, 4], [3, 12, 13, 14, 15, 4], [3, 9, 4]]
ANSWERS = [[20, 21, 22, 23, 24, 1], [30, 31, 1], [40, 41, 42, 43, 44, 45, 46, 47, 48, 1]]
EXAMPLES = Examples.from_ids(PROMPTS, ANSWERS)
CANVAS = CanvasLengths(block_size=4, weights=(0, 0, 1))


def fresh(**fields: Any) -> Network:
    shape: dict[str, Any] = {"context_attention": "causal", "right_shift_logits": True, "head_scale": 20}
    return to_embedding_space(tiny_network("bidirectional", **shape), **fields)


def objective_of(network: Network, corruption: TokenCorruption | None = None, **settings: Any) -> EmbeddingObjective:
    chosen = EmbeddingSettings(**settings)
    assert network.role.embedding_space is not None
    space = trained_space(network.role.embedding_space, chosen)
    return EmbeddingObjective(
        network.with_role(replace(network.role, embedding_space=space)),
        EXAMPLES,
        num_batches=10,
        settings=chosen,
        corruption=corruption,
        canvas=CANVAS,
    )


def prepared_of(objective: EmbeddingObjective, seed: int = 0) -> Prepared:
    length = 24 + 12 * objective.settings.canvases
    batch = batch_of(objective, range(3), num_rows=3, row_length=length)
    return objective.prepare(batch, torch.Generator().manual_seed(seed))


def forward_of(network: Network, calls: list[NoisyRows]) -> Any:
    """The network as objectives call it, dense and in evaluation mode."""

    def forward(
        tokens_RT: Tensor,
        positions_RT: Tensor,
        layout: Layout,
        rows_S: Tensor,
        adapted_RT: None = None,
        *,
        gradient: bool = True,
        noisy: NoisyRows | None = None,
        weights: str = "own",
    ) -> Tensor:
        assert noisy is not None
        calls.append(noisy)
        module, space = network.module, network.role.embedding_space
        assert space is not None
        hidden = module.base_model(
            inputs_embeds=noisy_embeddings(module, module.get_input_embeddings()(tokens_RT), noisy, space),
            attention_mask=added_to_scores(layout.dense(), torch.float32),
            position_ids=positions_RT,
            use_cache=False,
        ).last_hidden_state
        logits, found = noisy_scores(module, hidden, noisy)
        output = logits if found is None else found
        return output if gradient else output.detach()

    return forward


# Shortcuts


def test_one_step_with_the_mixture_arrives_where_two_half_steps_do() -> None:
    generator = torch.Generator().manual_seed(0)
    unit, x = torch.randn(11, 8, generator=generator), 5 * torch.randn(3, 8, generator=generator)
    first, second = torch.randn(2, 3, 11, generator=generator).softmax(-1)

    def step(x: Tensor, now: float, then: float, probabilities: Tensor) -> Tensor:
        return euler(Rows(x, torch.tensor(now), torch.tensor(then), probabilities @ unit, x), 5.0, 0.0)

    for now, mid, then in ((1.0, 0.7, 0.4), (0.6, 0.5, 0.1), (0.3, 0.1, 0.0)):
        weight = first_weight(torch.tensor(now), torch.tensor(mid), torch.tensor(then))
        mixture = weight * first + (1 - weight) * second
        assert_close(mixture.sum(-1), torch.ones(3))
        assert_close(step(x, now, then, mixture), step(step(x, now, mid, first), mid, then, second))
    assert first_weight(torch.tensor(0.5), torch.tensor(0.2), torch.tensor(0.0)) == 0


def test_the_weights_are_those_of_the_shares_that_are_gone() -> None:
    """Of the noise a first step takes the share a, a second b, both together c: [a (1 - b) p1 + b p2] / c."""
    now, mid, then = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).sort(0, descending=True).values
    a, b, c = 1 - mid / now, 1 - then / mid, 1 - then / now
    assert_close(first_weight(now, mid, then), a * (1 - b) / c)
    assert_close(1 - first_weight(now, mid, then), b / c)


@pytest.mark.parametrize("objective", ["shortcut", "consistency", "distillation"])
def test_the_targets_are_those_of_single_texts(objective: Any) -> None:
    """Of a packed batch, against plain forwards of each text by the module."""
    made = objective_of(fresh(), objective=objective, most_steps=8, data_share=0.3, canvases=2)
    network, prepared, calls = made.network, prepared_of(made, 3), list[NoisyRows]()
    conditioning_of(network.module).ruled_out_V = None  # the module rules tokens out that training does not
    found = made.loss(forward_of(network, calls), prepared)
    model, space = EmbeddingDenoiser(network), made.space
    unit = model.embed(torch.arange(64))
    noise = torch.randn(len(prepared.truth_S), 32, generator=torch.Generator().manual_seed(prepared.noise_seed))
    losses, steps = [], 0
    for number in range(len(prepared.now_U)):
        rows = (prepared.unit_S == number).nonzero()[:, 0]
        truth = prepared.truth_S[rows]
        prompt = PROMPTS[[answer[0] for answer in ANSWERS].index(int(truth[0]))]

        def logits(x: Tensor, time: Tensor, told: Tensor, prompt: list[int] = prompt) -> Tensor:
            ids = torch.tensor([[*prompt, *[2] * len(x)]])
            noisy = torch.cat([torch.zeros(len(prompt), 32), x])[None]
            output = model(ids, timesteps=space.level(time)[None], noisy_embeds=noisy, step_sizes=told[None])
            assert output.logits is not None
            return output.logits[0, len(prompt) :]

        def at(time: Tensor, rows: Tensor = rows, truth: Tensor = truth) -> Tensor:
            return space.noised(unit[truth], space.level(time).expand(len(rows)), noise[rows])

        def moved(x: Tensor, now: Tensor, then: Tensor, probabilities: Tensor) -> Tensor:
            return euler(Rows(x, space.level(now), space.level(then), probabilities @ unit, x), 1.0, 0.0)

        now, mid, then = prepared.now_U[number], prepared.mid_U[number], prepared.then_U[number]
        none, x = torch.tensor(0.0), at(now)
        if prepared.data_U[number]:
            losses.append(torch.nn.functional.cross_entropy(logits(x, now, none), truth, reduction="none"))
            continue
        steps += 1
        if objective == "shortcut":
            told = now - then
            half = told / 2 if told / 2 * 8 > 0.99 else none
            first = logits(x, now, half).softmax(-1)
            second = logits(moved(x, now, mid, first), mid, half).softmax(-1)
            weight = first_weight(space.level(now), space.level(mid), space.level(then))
            target = weight * first + (1 - weight) * second
        else:
            told = now if now * 8 > 0.99 else none
            teacher = logits(x, now, none).softmax(-1)
            ends = torch.nn.functional.one_hot(truth, 64).float() if objective == "consistency" else teacher
            there = at(then) if objective == "consistency" else moved(x, now, then, teacher)
            told_then = then if then * 8 > 0.99 else none
            target = ends if then == 0 else logits(there, then, told_then).softmax(-1)
        student = logits(x, now, told).log_softmax(-1).masked_fill(target == 0, 0.0)
        losses.append((torch.special.xlogy(target, target) - target * student).sum(-1))
    assert 0 < steps < len(prepared.now_U)
    assert_close(found.total, torch.cat(losses).mean(), atol=1e-3, rtol=1e-3)
    assert all(call.guess_SD is None for call in calls)


def test_the_targets_of_another_objective_carry_no_gradient() -> None:
    made, gradients = objective_of(fresh(), objective="shortcut", most_steps=4), []

    def forward(*_: Any, gradient: bool = True, noisy: NoisyRows, **__: Any) -> Tensor:
        gradients.append(gradient)
        return torch.zeros(len(noisy.rows_S), 64, requires_grad=gradient)

    made.loss(forward, prepared_of(made))
    assert gradients == [False, False, True]


def test_the_number_of_levels_rises_from_4_to_the_most() -> None:
    made = objective_of(fresh(), objective="consistency", most_steps=32)
    levels = [made._num_levels(number) for number in range(11)]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (3, 32) or (levels[0], levels[-1]) == (4, 32)


# What is noised


def test_given_tokens_stay_clean_and_are_not_scored() -> None:
    made = objective_of(fresh(), given=1.0)
    prepared, calls = prepared_of(made), list[NoisyRows]()
    assert 0 < prepared.given_S.sum() < len(prepared.given_S)
    made.loss(forward_of(made.network, calls), prepared)
    (noisy,) = calls
    unit = EmbeddingDenoiser(made.network).embed(prepared.truth_S)
    assert torch.equal(noisy.x_SD[prepared.given_S], unit[prepared.given_S])
    assert noisy.level_S[prepared.given_S].max() == 0


def test_wrong_tokens_are_those_that_were_asked_for() -> None:
    for kind in ("masked", "replaced", "shuffled"):
        corruption = TokenCorruption(**{kind: 1.0}, corruption_rate=1.0)
        prepared = prepared_of(objective_of(fresh(), corruption, canvases=3), 5)
        wrong = prepared.shown_S != prepared.truth_S
        if kind == "masked":
            assert not wrong.any()
            assert 0 < prepared.hidden_S.sum() < len(wrong)
            continue
        assert not prepared.hidden_S.any()
        assert 0 < wrong.sum() < len(wrong)
        assert set(prepared.shown_S.tolist()).isdisjoint({2, 60})
        for unit in range(len(prepared.now_U)):
            rows = prepared.unit_S == unit
            if kind == "shuffled":
                assert sorted(prepared.shown_S[rows].tolist()) == sorted(prepared.truth_S[rows].tolist())
    assert (prepared_of(objective_of(fresh())).shown_S == prepared_of(objective_of(fresh())).truth_S).all()


def test_without_its_prompt_a_document_has_masks_in_the_prompts_place() -> None:
    prepared = prepared_of(objective_of(fresh(), without_prompt=1.0))
    assert torch.equal(prepared.inputs.tokens_RT, prepared.without_RT)
    assert int((prepared.inputs.tokens_RT == 2).sum()) == sum(map(len, PROMPTS))


def test_a_batch_is_a_function_of_its_seed() -> None:
    made = objective_of(fresh(), objective="shortcut", canvases=2)
    one, same, other = (prepared_of(made, seed) for seed in (1, 1, 2))
    assert torch.equal(one.now_U, same.now_U)
    assert one.noise_seed == same.noise_seed != other.noise_seed


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"objective": "shortcut", "data_share": 0.0}, "without data the same answer to everything"),
        ({"objective": "shortcut", "most_steps": 24}, "power of two"),
        ({"target": "average"}, r"target has no meaning for denoiser.*; leave it out"),
        ({"target_guidance": 1.0}, "target_guidance has no meaning"),
        ({"objective": "shorcut"}, "did you mean 'shortcut'"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FewstepError, match=sentence):
        EmbeddingSettings(**settings)


def test_objectives_and_predictions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FewstepError, match="mse trains those that predict embeddings"):
        objective_of(fresh(), objective="mse")
    with pytest.raises(FewstepError, match="needs the role embedding"):
        EmbeddingObjective(tiny_network("bidirectional"), EXAMPLES, num_batches=1)
    with pytest.raises(FewstepError, match="shares of the same canvases"):
        TokenCorruption(masked=0.6, replaced=0.6)


# Paths


def test_paths_are_those_that_sampling_goes_and_lead_to_what_it_writes(tmp_path: Path) -> None:
    network = fresh()
    space = network.role.embedding_space
    assert space is not None
    shape: dict[str, Any] = {"steps": 4, "points": 2, "canvas_length": 6, "shard_size": 2, "seed": 3}
    collect_paths(network, PROMPTS, tmp_path / "paths", **shape)
    first = (tmp_path / "paths" / "shard-00000.safetensors").stat().st_mtime_ns
    collect_paths(network, PROMPTS, tmp_path / "paths", **shape)
    assert (tmp_path / "paths" / "shard-00000.safetensors").stat().st_mtime_ns == first
    with pytest.raises(FewstepError, match="points is 2 there and 4 here"):
        collect_paths(network, PROMPTS, tmp_path / "paths", **{**shape, "points": 4})
    with pytest.raises(FewstepError, match="points must divide the 4 steps, got 3; take 2"):
        collect_paths(network, PROMPTS, tmp_path / "others", **{**shape, "points": 3})
    paths = read_paths(tmp_path / "paths")
    assert paths.states_NKGD.shape == (3, 2, 6, 32)
    assert paths.times_K.tolist() == [1, 0.5]
    unit = EmbeddingDenoiser(network).embed(torch.arange(64))
    for i, prompt in enumerate(PROMPTS):
        request = Request(prompt_ids=prompt, max_new_tokens=6, seed=3 + i, sampling=Sampling(temperature=1.0))
        sampler = EmbeddingSampler(network, EmbeddingSampling(steps=4, sampler="euler"), num_slots=1, length=20)
        (output,) = answer(sampler, [request])
        start, end = paths.examples.completion_offsets[i : i + 2]
        assert paths.examples.completion_ids[start:end].tolist() == output.canvas_ids_G.tolist()
        noise = space.noise_scale * normal_noise(3 + i, 0, 6, 32, torch.device("cpu"))
        assert_close(paths.states_NKGD[i, 0].float(), noise, atol=2e-2, rtol=2e-3)
        level = space.level(torch.tensor(0.5))
        assert paths.states_NKGD[i, 1].float().std() < (level * space.noise_scale + unit.std()) * 1.3


def test_points_of_paths_learn_their_end(tmp_path: Path) -> None:
    network = fresh()
    collect_paths(network, PROMPTS, tmp_path / "paths", steps=4, points=2, canvas_length=6)
    paths, settings = read_paths(tmp_path / "paths"), EmbeddingSettings(objective="trajectories", canvases=3)
    assert network.role.embedding_space is not None
    space = trained_space(network.role.embedding_space, settings)
    network = network.with_role(replace(network.role, embedding_space=space))
    made = EmbeddingObjective(network, EXAMPLES, num_batches=1, settings=settings, paths=paths)
    prepared, calls = (
        made.prepare(batch_of(made, range(3), num_rows=3), torch.Generator().manual_seed(2)),
        list[NoisyRows](),
    )
    made.loss(forward_of(network, calls), prepared)
    (noisy,) = calls
    on_path = ~prepared.data_U[prepared.unit_S]
    assert 0 < on_path.sum() < len(on_path)
    points = {tuple(row.tolist()) for row in paths.states_NKGD.flatten(0, 2).float()}
    assert {tuple(row.tolist()) for row in noisy.x_SD[on_path]} <= points
    assert set(noisy.step_S[on_path].tolist()) <= {1.0, 0.5}
    assert set(noisy.step_S[~on_path].tolist()) == {0.0}
    train(made.network, made, QUICK, tmp_path / "out")
    with pytest.raises(FewstepError, match="learns from collected paths"):
        EmbeddingObjective(network, EXAMPLES, num_batches=1, paths=paths)


# Runs

QUICK = TrainSettings(
    max_steps=6, rows=2, row_length=64, learning_rate=3e-3, warmup_steps=2, log_every=2, save_every=3, seed=5
)


@pytest.mark.parametrize(
    ("objective", "target", "fields"),
    [
        ("denoiser", "own", {"self_conditioned": True}),
        ("mse", "own", {"predicts": "embeddings", "rows_from": "noise"}),
        ("consistency", "average", {}),
        ("distillation", "start", {}),
        ("shortcut", "own", {"self_conditioned": True}),
    ],
)
def test_every_objective_trains_and_what_it_leaves_generates(
    objective: Any, target: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    made = objective_of(fresh(**fields), objective=objective, target=target, most_steps=8, canvases=2)
    settings = replace(QUICK, ema_decay=0.9 if target == "average" else None)
    result = train(made.network, made, settings, tmp_path / "out")
    assert result.steps == 6
    assert all(0 < line["loss"] < 100 for line in result.history)
    lm = load(tmp_path / "out", dtype="float32")
    assert lm.role.embedding_space == made.space
    assert lm.generate("hello", max_new_tokens=8, steps=2).num_forwards == 2


def test_training_teaches(tmp_path: Path) -> None:
    made = objective_of(fresh(), canvases=3)
    result = train(made.network, made, replace(QUICK, max_steps=60, save_every=None, row_length=96), tmp_path / "out")
    assert result.history[-1]["cross_entropy"] < result.history[0]["cross_entropy"] / 2
    assert LanguageModel(made.network).generate("hello", max_new_tokens=4).num_forwards == 32


def test_a_run_that_was_interrupted_goes_on_as_one_that_was_not(tmp_path: Path, monkeypatch: Any) -> None:
    def run(folder: str) -> Any:
        made = objective_of(fresh(), objective="consistency", target="average", most_steps=8)
        return train(made.network, made, replace(QUICK, ema_decay=0.9), tmp_path / folder)

    whole = run("whole")
    loss, calls = EmbeddingObjective.loss, [0]

    def failing(self: Any, forward: Any, prepared: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return loss(self, forward, prepared)

    monkeypatch.setattr(EmbeddingObjective, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.setattr(EmbeddingObjective, "loss", loss)
    resumed = run("cut")
    assert [line["loss"] for line in resumed.history] == [line["loss"] for line in whole.history]


def test_the_average_as_target_needs_an_average(tmp_path: Path) -> None:
    made = objective_of(fresh(), objective="consistency", target="average")
    with pytest.raises(FewstepError, match="set ema_decay"):
        train(made.network, made, QUICK, tmp_path / "out")


def test_time_is_warped_by_the_loss_of_the_network() -> None:
    network, told = fresh(), list[float]()
    warp = warp_by_loss(network, EXAMPLES, progress=lambda level, loss: told.append(level))
    assert warp[0] == 0
    assert warp[-1] == 1
    assert list(warp) == sorted(set(warp))
    assert told == sorted(told)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    save_network(tiny_network("bidirectional", context_attention="causal", right_shift_logits=True), folder)
    rows = [{"prompt": f"{i}+{i}", "completion": f"it is {2 * i}"} for i in range(12)]
    (folder.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(rows: Path, model: Path, output: Path, *more: str) -> None:
    words = ["train", "embedding", "--model", model, "--data", rows, "--output", output]
    words += ["--max-steps", 4, "--rows", 2, "--row-length", 96, "--canvas-weights", "[0,0,0,1]", "--log-every", 2]
    main([*map(str, words), *more])


def test_the_command_trains_a_denoiser_and_then_shortcuts(teacher: Path, tmp_path: Path) -> None:
    watched = ["--evaluate-every", "4", "--watch-data", str(teacher.parent / "rows.jsonl"), "--watch-num-prompts", "3"]
    watched += ["--watch-seeds", "3", "--watch-max-new-tokens", "8", "--watch-steps", "2"]
    with pytest.raises(SystemExit) as end:
        command(
            teacher.parent / "rows.jsonl",
            teacher,
            tmp_path / "denoiser",
            "--given",
            "0.1",
            "--warp",
            "loss",
            "--without-prompt",
            "0.1",
            *watched,
        )
    assert not end.value.code
    found = json.loads((tmp_path / "denoiser" / "report.json").read_text())
    assert {"diversity/distinct_answers", "diversity/self_bleu", "health/entropy"} <= found["history"][-1].keys()
    denoiser = load(tmp_path / "denoiser")
    assert denoiser.role.embedding_space is not None
    assert (denoiser.role.embedding_space.most_steps, denoiser.role.embedding_space.guided) == (None, True)
    with pytest.raises(SystemExit) as end:
        command(teacher.parent / "rows.jsonl", tmp_path / "denoiser", tmp_path / "student", "--objective", "shortcut")
    assert not end.value.code
    student = load(tmp_path / "student")
    assert student.role.embedding_space is not None
    assert student.role.embedding_space.most_steps == 32
    assert student.manner().told["steps"] == 4
    assert student.generate("1+1", max_new_tokens=8, guidance=0.5).num_forwards == 4


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--objective", "consistency", "--target", "average"], "set --ema-decay"),
        (["--watch-seeds", "3"], "--watch-seeds has no effect without --watch-data"),
        (["--objective", "shortcut", "--data-share", "0"], "data-share must lie between 0 and 1"),
        (["--canvas-weights", "[1]", "--block-size", "2"], "exceeds the longest canvas of 2"),
        (["--objective", "trajectories"], "learns from --paths; name it"),
    ],
)
def test_the_command_refuses_in_a_sentence(
    teacher: Path, tmp_path: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command(teacher.parent / "rows.jsonl", teacher, tmp_path / "out", *more)
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_network_can_begin_from_scratch(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        command(
            teacher.parent / "rows.jsonl",
            teacher,
            tmp_path / "out",
            "--scratch",
            "--objective",
            "mse",
            "--rows-from",
            "noise",
        )
    assert not end.value.code
    lm = load(tmp_path / "out")
    assert lm.role.embedding_space is not None
    assert lm.role.embedding_space.predicts == "embeddings"
