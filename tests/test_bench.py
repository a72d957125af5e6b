"""`fewstep bench` and what it rests on: floors by hand, what rounds are made of, schedules, figures and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.command import Run
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from fewstep.decode.generator import answer
from fewstep.decode.policies import Scheduled, evenly, scheduled
from fewstep.decode.requests import Request
from fewstep.engine.captured import CapturedLoop
from fewstep.engine.captured_pass import CapturedPass
from fewstep.engine.choice import Engines
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.measure.bandwidth import DeviceRates, measure_device
from fewstep.measure.bench import Variant, busy_time, check_fits, report, run_variants
from fewstep.measure.passes import Watch
from fewstep.measure.prompts import random_prompts, real_prompts
from fewstep.measure.roofline import (
    KINDS,
    Rates,
    Setting,
    Sizes,
    analysed,
    last_batch,
    memory_bound_up_to,
    pass_work,
    pays_up_to,
    tokens_per_second,
)
from fewstep.measure.schedule import AcceptanceSchedule, read_schedule, recorded
from fewstep.models.importers.shapes import SHAPES, random_network
from fewstep.models.tiny import tiny_network

H200 = Rates(bytes_per_second=4.3e12, flops_per_second=790e12)


def sizes_of(name: str) -> Sizes:
    """Of a shape in bfloat16, without memory for it."""
    with torch.device("meta"):
        return Sizes.of(AutoModelForCausalLM.from_config(SHAPES[name].config(), dtype=torch.bfloat16))


DREAM, LLADA = sizes_of("dream-7b"), sizes_of("llada-8b")


# Floors, by hand


def test_a_step_reads_the_weights_with_the_head_and_without_the_embedding_table() -> None:
    hidden, wide, keys, layers, vocabulary = 3584, 18_944, 512, 28, 152_064
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * wide + 2 * hidden + (hidden + 2 * keys)
    assert DREAM.weight_bytes == 2 * (layers * layer + hidden + vocabulary * hidden)
    assert round(DREAM.weight_bytes / 1e9, 2) == 14.14
    assert LLADA.weight_bytes == 14_995_169_280


def test_keys_and_values_of_grouped_heads_are_a_seventh_of_those_of_all_heads() -> None:
    assert DREAM.kv_bytes == 56 * 1024  # 28 layers, 4 heads of 128, two numbers of two bytes
    assert LLADA.kv_bytes == 512 * 1024


def test_a_tied_head_is_read_although_it_is_the_embedding_table() -> None:
    small = sizes_of("smollm2-135m")
    assert small.weight_bytes == 2 * 134_515_008
    assert small.head_flops == 2 * 49_152 * 576
    assert small.row_flops == 2 * (30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536))


def test_the_floor_of_a_denoise_step_is_that_of_the_weights() -> None:
    work = DREAM.forward(rows=32, scored=32, keys=512, pairs=32 * 512)
    assert_close(1000 * work.floor_seconds(H200), 1000 * (14.14e9 + 512 * 57_344) / 4.3e12, rtol=1e-3, atol=0)
    assert work.is_memory_bound(H200)
    assert 0.5 < 1000 * work.flops / H200.flops_per_second < 0.6  # ms of arithmetic for 32 rows


def test_many_rows_have_a_floor_by_arithmetic() -> None:
    work = DREAM.forward(rows=1024, scored=1024, keys=0, pairs=0)
    assert not work.is_memory_bound(H200)
    assert work.floor_seconds(H200) == 1024 * (DREAM.row_flops + DREAM.head_flops) / 790e12


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_has_floors(name: str) -> None:
    assert sizes_of(name).forward(rows=4, scored=4, keys=10, pairs=40).floor_seconds(H200) > 0


# Kinds of decoding over batch sizes

ANSWER = Setting(context=256, canvas=256, block_size=32, tokens_per_pass=16 / 3)


def test_intensity_grows_with_the_rows_of_a_pass() -> None:
    causal, block, full = (
        pass_work(kind, DREAM, ANSWER, 1).intensity  # type: ignore[arg-type]
        for kind in ("causal", "block", "full canvas")
    )
    assert 0.9 < causal < 1.1  # two operations for each number of two bytes
    assert_close(block / causal, 32.0 * 7 / 6, rtol=0.05, atol=0)  # 32 rows, and 32 more in one of six passes
    assert full / block > 10


def test_a_single_block_waits_for_the_memory_and_a_full_canvas_computes() -> None:
    assert memory_bound_up_to("causal", DREAM, ANSWER, H200) is not None
    few = memory_bound_up_to("block", DREAM, ANSWER, H200)
    assert few is not None
    assert 3 <= few <= 8
    assert memory_bound_up_to("full canvas", DREAM, ANSWER, H200) is None


def test_block_decoding_pays_until_the_arithmetic_of_its_rows_is_what_counts() -> None:
    last = pays_up_to("block", DREAM, ANSWER, H200)
    assert last is not None
    assert tokens_per_second("block", DREAM, ANSWER, last, H200) > tokens_per_second(
        "causal", DREAM, ANSWER, last, H200
    )
    after = last + 1
    assert tokens_per_second("block", DREAM, ANSWER, after, H200) <= tokens_per_second(
        "causal", DREAM, ANSWER, after, H200
    )
    few = replace(ANSWER, tokens_per_pass=2)
    fewer = pays_up_to("block", DREAM, few, H200)
    assert fewer is not None
    assert fewer < last


def test_the_last_batch_is_the_one_before_the_first_that_fails() -> None:
    assert last_batch([1, 2, 4, 8], [True, True, False, True]) == 2
    assert last_batch([1, 2], [False, True]) is None


def test_the_analysis_of_a_network_names_where_each_kind_stops() -> None:
    causal, block, full = analysed(DREAM, ANSWER, H200)
    assert (causal.kind, block.kind, full.kind) == KINDS
    assert causal.pays_up_to is None
    assert block.memory_bound_up_to == memory_bound_up_to("block", DREAM, ANSWER, H200)
    assert block.pays_up_to == pays_up_to("block", DREAM, ANSWER, H200)
    assert (block.memory_bound_up_to, block.pays_up_to, full.pays_up_to) == (4, 27, 2)
    assert round(tokens_per_second("block", DREAM, ANSWER, 1, H200), -1) == 1620  # with the commits' rows for nothing


def test_the_rates_of_a_device_are_positive_and_the_faster_bounds() -> None:
    rates = measure_device(torch.device("cpu"), torch.float32, weight_bytes=100_000)
    assert rates.read_bytes <= 100_000
    assert rates.limits.bytes_per_second == max(rates.read_bytes_per_second, rates.copy_bytes_per_second) > 0
    assert rates.limits.flops_per_second > 0


def test_time_that_several_spans_cover_counts_once() -> None:
    assert busy_time([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4
    assert busy_time([]) == 0


# What is finalised by fixed numbers


def test_a_block_is_split_evenly_into_as_few_steps_as_possible() -> None:
    assert evenly(32, 6) == [6, 6, 5, 5, 5, 5]
    assert evenly(4, 4) == [4]
    assert evenly(3, 1) == [1, 1, 1]


def test_a_scheduled_policy_takes_what_is_left_to_the_next_number_of_its_schedule() -> None:
    policy = scheduled([3, 1, 4])
    assert policy.counts == (1, 2, 3, 4, 1, 1, 2, 3)
    certainty = torch.arange(8.0)[None]
    chosen = policy(certainty, torch.ones(1, 8, dtype=torch.bool))
    assert chosen.nonzero()[:, 1].tolist() == [5, 6, 7]
    masked = torch.tensor([[True] * 5 + [False] * 3])
    assert policy(certainty, masked).nonzero()[:, 1].tolist() == [4]
    assert not policy(certainty, torch.zeros(1, 8, dtype=torch.bool)).any()


def test_requests_of_one_batch_follow_schedules_of_their_own() -> None:
    lm = LanguageModel(tiny_network(block_size=4))
    policies = [scheduled([2, 2]), scheduled([1, 3])]
    requests = [
        Request(prompt_ids=[5, 6], max_new_tokens=8, policy=policy, early_stop=False, stop_token_ids=())
        for policy in policies
    ]
    generator = lm.generator(requests, policy=policies[0])
    numbers = {generator.submit(request): request for request in requests}
    while generator.busy:
        for number, output in generator.step():
            steps = output.step_G.tolist()
            counts = [steps.count(step) for step in sorted(set(steps))]
            assert counts == ([2, 2, 2, 2] if numbers[number].policy == policies[0] else [1, 3, 1, 3])


def test_what_is_recorded_is_what_is_replayed() -> None:
    lm = LanguageModel(tiny_network(block_size=4, head_scale=30))
    decoder = lm.decoder(threshold=0.3)
    requests = [Request(prompt_ids=[5, 6, 7 + i], max_new_tokens=16, early_stop=False) for i in range(3)]
    generator = lm.generator(requests, threshold=0.3)
    answered = list(zip(requests, answer(generator, requests), strict=True))
    found = recorded(decoder, answered)
    assert len(found.blocks) == 12
    assert sum(map(len, found.blocks)) == sum(output.num_forwards for _, output in answered)
    assert found.tokens_per_pass == 48 / sum(map(len, found.blocks))
    assert {policy.counts[-1] for policy in found.policies(3)} <= {passes[0] for passes in found.blocks}


def test_a_block_in_which_the_text_ends_is_not_recorded() -> None:
    lm = LanguageModel(tiny_network(block_size=4))
    request = Request(prompt_ids=[5, 6], max_new_tokens=8, early_stop=False, stop_token_ids=())
    (output,) = answer(lm.generator([request]), [request])
    shortened = replace(output, num_tokens=6)
    assert len(recorded(lm.decoder(), [(request, shortened)]).blocks) == 1
    with pytest.raises(FewstepError, match="no answer finalised a whole block of 4 tokens"):
        recorded(lm.decoder(), [(request, replace(output, num_tokens=3))])


def test_few_requests_take_schedules_from_short_to_long() -> None:
    blocks = ((4,), (2, 2), (1, 1, 2), (1, 1, 1, 1))
    policies = AcceptanceSchedule(block_size=4, blocks=blocks).policies(2)
    assert policies == [scheduled((2, 2)), scheduled((1, 1, 1, 1))]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"block_size": 4, "blocks": []}', "at least one block"),
        ('{"block_size": 4, "blocks": [[3]]}', "passes finalise 3"),
        ('{"block_size": 4, "blocks": [[4, 0]]}', "at least 1"),
        ('{"blocks": [[4]]}', "holds no schedule"),
        ("[1]", "holds no schedule"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_damaged_schedule_is_refused_by_name(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(text)
    with pytest.raises(FewstepError, match=sentence) as refused:
        read_schedule(file)
    assert str(file) in str(refused.value)


# Rounds, and what a variant reports


def requests_of(lm: LanguageModel, count: int, length: int, policy: Scheduled | None, new: int = 16) -> list[Request]:
    return [
        Request(prompt_ids=ids, max_new_tokens=new, policy=policy, early_stop=False, stop_token_ids=())
        for ids in random_prompts(lm.network, count, length, seed=0)
    ]


def test_rounds_are_told_apart_with_their_rows_and_keys() -> None:
    lm = LanguageModel(tiny_network(block_size=4))
    policy = scheduled([2, 2])
    (request,) = requests_of(lm, 1, 10, policy, new=8)
    watch = Watch()
    generator = lm.generator([request], listeners=[watch], policy=policy)
    generator.submit(request)
    while generator.busy:
        generator.step()
    rounds = watch.rounds(lm.network, lm.decoder(policy=policy), [request], torch.float32)
    assert [one.kind for one in rounds] == ["prefill", "denoise", "commit", "denoise"]
    assert [one.tokens for one in rounds] == [2, 2, 2, 2]
    sizes = Sizes.of(lm.network.module)
    expected = [(14, 14), (4, 14), (8, 18), (4, 18)]  # rows, and the positions that they see
    for one, (rows, keys) in zip(rounds, expected, strict=True):
        assert list(one.works) == [sizes.forward(rows=rows, scored=4, keys=keys, pairs=rows * keys)]


@pytest.mark.parametrize(
    ("role", "decoder", "kinds"),
    [
        ("autoregressive", "autoregressive", {"prefill", "decode"}),
        ("autoregressive", "lookahead", {"prefill", "decode"}),
        ("autoregressive", "prompt-lookup", {"prefill", "verify"}),
        ("autoregressive", "jacobi", {"prefill", "iterate"}),
        ("bidirectional", "diffusion", {"full"}),
    ],
)
def test_every_decoder_is_measured_round_by_round(role: str, decoder: str, kinds: set[str]) -> None:
    lm = LanguageModel(tiny_network(role))  # type: ignore[arg-type]
    requests = requests_of(lm, 2, 6, None)
    variant = Variant(lm=lm, settings={"decoder": decoder, "max_new_tokens": 16}, batches=[requests], told={})
    run_variants([variant], answers=2)
    rates = DeviceRates(read_bytes=1, read_bytes_per_second=1e9, copy_bytes_per_second=2e9, flops_per_second=1e12)
    figures = report(variant, rates, price_per_hour=3.6)
    assert {row["kind"] for row in figures["steps"]} <= kinds
    assert figures["kind"] in kinds - {"prefill"}
    assert figures["answers"]["n"] == 2
    assert figures["answers"]["num_tokens_mean"] == 32
    assert 0 < figures["answers"]["host_ms_per_answer"] < 2 * figures["answers"]["answer_ms_median"]
    assert_close(figures["answers"]["cost_per_million_tokens"], 1000 / figures["tokens_per_second"])
    for row in figures["steps"]:
        assert_close(row["roofline_share"], row["floor_ms"] / row["step_ms_median"])
        assert row["measured_bandwidth_gb_s"] == 2
        assert row["bytes_read"] >= Sizes.of(lm.network.module).weight_bytes


@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_what_is_to_be_compiled_is_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    told = list[str]()
    monkeypatch.setattr(Engines, "_cpu", lambda engines, decoder: engines._cuda(decoder, compiles=engine == "compiled"))
    monkeypatch.setattr(CapturedPass, "compile", lambda one: told.append("compiled"))
    step = CapturedLoop.step
    monkeypatch.setattr(CapturedLoop, "step", lambda loop: [told.append("step"), step(loop)][1])
    lm = LanguageModel(tiny_network(block_size=4))
    policy = scheduled([4])
    settings = {"policy": policy, "engine": engine}
    variant = Variant(lm=lm, settings=settings, batches=[requests_of(lm, 1, 6, policy, new=12)], told={}, is_fixed=True)
    variant.prepare(2)
    assert ("compiled" in told) == (engine == "compiled")
    assert told[-1] == "step"
    told.clear()
    variant.time(0)
    assert set(told) == {"step"}


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does() -> None:
    lm = LanguageModel(tiny_network())
    (request,) = requests_of(lm, 1, 10, None)
    with pytest.raises(
        FewstepError, match=r"positions at a time take .* and for a pass.* choose a batch size of at most \d+"
    ):
        check_fits(lm, {}, request, 1 << 30)
    check_fits(lm, {}, request, 4)


def test_prompts_have_the_length_that_is_asked_for() -> None:
    lm = LanguageModel(tiny_network())
    random = random_prompts(lm.network, 2, 7, seed=3)
    assert [len(ids) for ids in random] == [7, 7]
    assert random == random_prompts(lm.network, 2, 7, seed=3)
    assert not {0, 1, 2} & {one for ids in random for one in ids}
    real = real_prompts(lm, ["2 + 2", "3"], 3, 12)
    assert [len(ids) for ids in real] == [12, 12, 12]
    assert real[0][-5:] == lm.encode("2 + 2")[-5:]
    assert real[0] == real[2]
    assert real_prompts(lm, ["2 + 2"], 1, None) == [lm.encode("2 + 2")]


# Random networks of a shape


def test_a_random_network_of_a_shape_is_the_same_for_the_same_seed() -> None:
    one, other, third = (random_network("tiny-dream", device="cpu", seed=seed) for seed in (0, 0, 1))
    assert one.role.right_shift_logits
    weights = [network.module.get_output_embeddings().weight for network in (one, other, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_bundled_model_lends_its_shape_role_and_tokenizer() -> None:
    network = random_network("gsm-student", device="cpu", dtype="bfloat16")
    assert (network.role.name, network.role.block_size, network.dtype) == ("block_causal", 32, torch.bfloat16)
    assert network.num_parameters == 9_574_656


def test_an_engine_may_round_random_weights_in_any_role_unless_numbers_were_asked_for() -> None:
    network = random_network("tiny-dream", device="cpu")
    assert network.with_role(network.role.playing("block_causal")).may_round
    assert not random_network("tiny-dream", device="cpu", dtype="float32").may_round


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.models.importers.shapes.free_memory", lambda device: 1_000_000_000)
    with pytest.raises(FewstepError, match=r"dream-7b needs 15\.\d GB .* 1\.0 GB free"):
        random_network("dream-7b", device="cpu", dtype="bfloat16")


# The command

SMALL = ("--shape", "tiny-dream", "--context", "12", "--max-new-tokens", "16", "--block-size", "8", "--answers", "1")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose rates need no second to be measured."""
    rates = DeviceRates(
        read_bytes=1 << 20, read_bytes_per_second=1e10, copy_bytes_per_second=2e10, flops_per_second=1e11
    )
    monkeypatch.setattr("fewstep.measure.bandwidth.measure_device", lambda *place, **sizes: rates)


CONTRACT = {
    "device", "model", "shape", "dtype", "decoder", "kind", "batch_size", "block_size", "context", "step_ms_median",
    "floor_ms", "roofline_share", "tokens_per_second", "peak_memory_bytes", "measured_bandwidth_gb_s",
}  # fmt: skip


def test_bench_reports_one_variant_as_an_object_with_all_its_kinds_of_steps(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = run("bench", *SMALL, "--tokens-per-step", 3, "--json", file)
    assert done.code == 0, done.err
    assert "denoise" in done.out
    assert "GB/s" in done.out
    found = json.loads(file.read_text())
    assert found.keys() >= CONTRACT
    assert (found["shape"], found["model"], found["decoder"], found["kind"]) == ("tiny-dream", None, "block", "denoise")
    assert [row["kind"] for row in found["steps"]] == ["prefill", "denoise", "commit"]
    for row in found["steps"]:
        assert row.keys() >= CONTRACT
        assert row["step_ms_median"] > 0
        assert_close(row["roofline_share"], row["floor_ms"] / row["step_ms_median"])
    assert found["answers"]["passes_mean"] == 6  # two blocks in three passes each
    assert found["answers"]["num_tokens_mean"] == 16
    assert found["tokens_per_second"] == found["answers"]["tokens_per_second"]


@pytest.mark.usefixtures("measured")
def test_bench_reports_several_variants_as_a_list(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    decoders = ("--decoder", "block,autoregressive,diffusion", "--engine", "auto,off")
    done = run("bench", *SMALL, *decoders, "--json", file)
    assert done.code == 0, done.err
    found = json.loads(file.read_text())
    engines = {one["engine"] for one in found}
    assert len(found) == 3 * len(engines)  # the plain path is measured once, whoever asked for it
    assert {(one["decoder"], one["role"]) for one in found} == {
        ("block", "block_causal"),
        ("autoregressive", "autoregressive"),
        ("diffusion", "bidirectional"),
    }


@pytest.mark.usefixtures("measured")
def test_a_recorded_schedule_is_replayed_by_other_weights(run: Run, tmp_path: Path) -> None:
    schedule, file = tmp_path / "schedule.json", tmp_path / "bench.json"
    done = run("bench", *SMALL, "--tokens-per-step", 4, "--record", schedule)
    assert done.code == 0, done.err
    assert json.loads(schedule.read_text())["blocks"] == [[4, 4], [4, 4]]
    done = run("bench", "--shape", "tiny-llada", *SMALL[2:], "--schedule", schedule, "--json", file)
    assert done.code == 0, done.err
    assert json.loads(file.read_text())["answers"]["passes_mean"] == 4


@pytest.mark.usefixtures("measured")
def test_a_roofline_is_drawn_with_the_measured_points(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = ("--plot", tmp_path / "roofline", "--json", tmp_path / "bench.json")
    done = run("bench", *SMALL, "--decoder", "block,autoregressive", "--batch-size", "1,2", *out)
    assert done.code == 0, done.err
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    drawn = (tmp_path / "roofline.svg").read_text()
    assert "requests at once" in drawn or "<svg" in drawn
    assert "waits for the memory" in done.out
    first = json.loads((tmp_path / "bench.json").read_text())[0]
    assert [one["kind"] for one in first["roofline"]["kinds"]] == ["causal", "block", "full canvas"]
    assert (first["roofline"]["context"], first["roofline"]["canvas"], first["roofline"]["block_size"]) == (12, 16, 8)


@pytest.mark.usefixtures("measured")
def test_bench_of_a_bundled_model_answers_real_prompts_until_they_end(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = run("bench", "--answers", 1, "--max-new-tokens", 32, "--json", file)
    assert done.code == 0, done.err
    found = json.loads(file.read_text())
    assert (found["model"], found["prompts"], found["dtype"]) == ("gsm-student", "real", found["steps"][0]["dtype"])
    assert found["answers"]["num_tokens_mean"] <= 32


@pytest.mark.usefixtures("measured")
def test_bench_writes_a_trace_of_the_first_steps(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert run("bench", *SMALL, "--profile", trace).code == 0
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--model", ""), "no model '', neither a folder nor a bundled name"),
        (("--shape", ""), "unknown shape ''; choose one of"),
        (("--record", "made.json", "--plot", "new/plot", "--json", "/proc/report.json"), "/proc/report.json"),
        (("--shape", "dream7b"), "unknown shape 'dream7b'; did you mean 'dream-7b'?"),
        (("--model", "gsm-student", "--shape", "tiny-dream"), "give one of them"),
        (("--model", "gsm-studnt"), "did you mean 'gsm-student'?"),
        (("--decoder", "blok"), "unknown decoder 'blok'; did you mean 'block'?"),
        (("--engine", "of"), "unknown engine 'of'; did you mean 'off'?"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--batch-size", "a"), "--batch-size is a list of numbers"),
        ((*SMALL, "--batch-size", "16000000"), "choose a batch size of at most"),
        ((*SMALL, "--block-size", "17"), "--block-size 17 is more than the 16 new tokens"),
        ((*SMALL, "--tokens-per-step", "9"), "--tokens-per-step 9 is more than a block has"),
        ((*SMALL, "--context", "600"), "exceeds the 512 positions"),
        (("--tokens-per-step", "2", "--threshold", "0.5"), "threshold lets the network decide"),
        (("--prompts", "random", "--input", "x.jsonl"), "leave one of them out"),
        ((*SMALL, "--decoder", "block,diffusion", "--record", "s.json"), "--record writes the schedule of one variant"),
        ((*SMALL, "--decoder", "autoregressive"), "--block-size has no effect on the decoder autoregressive"),
        (
            ("--model", "gsm-ar", "--tokens-per-step", "2"),
            "--tokens-per-step has no effect",
        ),
        (("--model", "gsm-ar", "--record", "s.json"), "has no blocks to record"),
        (("--model", "gsm-ar", "--decoder", "block"), "a causal model cannot run the block decoder"),
        (("--price-per-hour", "-1"), "--price-per-hour must be at least 0"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in run("bench", *options).sentence()
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_asking_for_one_is_refused(run: Run) -> None:
    assert "no CUDA device is available" in run("bench", *SMALL, "--device", "cuda").sentence()


@pytest.mark.usefixtures("measured")
def test_another_block_size_than_that_of_the_training_is_told_of(run: Run) -> None:
    done = run("bench", "--block-size", 16, "--max-new-tokens", 16, "--answers", 1)
    assert done.code == 0
    assert "was trained with blocks of 32" in done.err
