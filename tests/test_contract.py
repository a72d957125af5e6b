"""What decoders and the loop promise each other: requests of different settings in a batch, and the key of a pass."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.cases import CASES, answered_as_they_join, case, speculative
from helpers.generators import streamed
from helpers.networks import decoder_of, network, requests, same
from torch import Tensor

from fewstep.decode.admission import positions_needed
from fewstep.decode.decoder import Accepted, Decoder, Shape
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.loop import Loop, decode, loop_for, run_pass
from fewstep.decode.policies import EvenSplit, Factor, FixedCount, Margin, Threshold
from fewstep.decode.prompt_lookup import PromptLookup
from fewstep.decode.registry import DECODERS
from fewstep.decode.requests import Output, Record, Request
from fewstep.decode.sampling import Sampling
from fewstep.decode.state import State
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.loops import Loops
from fewstep.errors import FewstepError
from fewstep.models.cache import KVCache
from fewstep.models.network import Network, Scores


def test_every_registered_decoder_has_a_case() -> None:
    """So a new one is tested for all that this file says of them, once it has a case above."""
    assert sorted(CASES) == sorted(DECODERS)


@pytest.mark.parametrize("name", CASES)
def test_each_of_a_mixed_batch_gets_what_it_gets_alone(name: str) -> None:
    net, decoder, asked = case(name)
    loop = Loop(net, decoder, num_slots=3, length=max(positions_needed(decoder, request) for request in asked))
    outputs = answered_as_they_join(loop, asked)
    for number, request in enumerate(asked):
        same(outputs[number], decode(net, [request], decoder)[0])
    assert len({tuple(output.token_ids) for output in outputs.values()}) == len(asked)


@pytest.mark.parametrize("name", CASES)
def test_a_greedy_request_among_sampled_ones_takes_the_most_probable_tokens(name: str) -> None:
    net, decoder, asked = case(name)
    if decoder.traits.greedy_only:
        return
    greedy = replace(asked[2], sampling=Sampling(top_k=3), policy=None)
    expected = decode(net, [replace(greedy, sampling=Sampling())], decoder)[0]
    same(decode(net, [greedy, *asked], decoder)[0], expected)


def test_a_temperature_changes_the_answer_or_is_refused() -> None:
    net = network("autoregressive")
    hot = requests(1, sampling=Sampling(temperature=3.0))
    for decoder in (decoder_of(net), PromptLookup(role=net.role), speculative(net)):
        assert decode(net, hot, decoder)[0].token_ids != decode(net, requests(1), decoder)[0].token_ids
    for decoder in (Jacobi(role=net.role), replace(speculative(net), sampled=False)):
        with pytest.raises(FewstepError, match=f"the {decoder.name} decoder is greedy only"):
            decode(net, hot, decoder)


def test_policies_of_another_kind_are_refused() -> None:
    net = network("bidirectional")
    decoder = decoder_of(net, policy=Threshold())
    for policy in (Margin(), Factor(), EvenSplit()):
        with pytest.raises(FewstepError, match="requests of one batch share a kind of policy, which is Threshold"):
            decode(net, requests(1, policy=policy), decoder)


@pytest.mark.parametrize("role", ["autoregressive", "bidirectional", "block_causal"])
def test_an_answer_ends_at_the_stop_tokens_of_its_request(role: Any) -> None:
    net = network(role)
    free = decode(net, requests(4)[3:], decoder_of(net))[0].token_ids
    end = next(token for i, token in enumerate(free) if i > 2 and token not in free[:i])
    output = decode(net, [replace(requests(4)[3], stop_token_ids=(end,))], decoder_of(net))[0]
    assert output.token_ids == free[: free.index(end) + 1]
    assert output.finish_reason == "stop"
    with pytest.raises(FewstepError, match="a request names at most 4 stop tokens"):
        decode(net, requests(1, stop_token_ids=tuple(range(5))), decoder_of(net))


# The key of a pass


class Watched:
    """Runs passes, and notes the shapes of all their tensors under the pass's own Shape."""

    def __init__(self) -> None:
        self.seen: dict[Shape, list[Any]] = {}
        self.num_passes = 0

    def __call__(
        self,
        networks: Mapping[str, Network],
        decoder: Decoder,
        state: State,
        caches: Mapping[str, KVCache],
        shape: Shape,
    ) -> tuple[Accepted[State], Scores]:
        self.num_passes += 1
        plan = decoder.plan(state, shape)
        sizes = [tensor.shape for tensor in state.tensors().values()]
        sizes += [v.shape for f in fields(plan) if isinstance(v := getattr(plan, f.name), Tensor)]
        sizes += [cache.blocks_RK.shape for cache in caches.values()]
        accepted, scores = run_pass(networks, decoder, state, caches, shape)
        sizes += [tensor.shape for tensor in (scores.logits_RSV, scores.hidden_RSD)]
        sizes += [tensor.shape for tensor in accepted.state.tensors().values()]
        assert self.seen.setdefault(shape, sizes) == sizes
        return accepted, scores


@pytest.mark.parametrize("free_rows", [0, 128])
@pytest.mark.parametrize("name", CASES)
def test_passes_of_equal_shape_have_equal_tensor_shapes(
    name: str, free_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.decode.decoder.FREE_ROWS", free_rows)
    net, decoder, asked = case(name)
    watched = Watched()
    loop = Loop(net, decoder, num_slots=4, length=100, run_pass=watched)
    for request in asked * 2:
        loop.submit(request)
    while loop.busy:
        loop.step()
    assert 1 < len(watched.seen) < watched.num_passes / 2


def test_rows_are_recorded_when_passes_reuse_the_memory_of_the_state() -> None:
    net = network()

    def in_place(*pass_of: Any) -> tuple[Accepted[State], Scores]:
        state = pass_of[2]
        accepted, scores = run_pass(*pass_of)
        for mine, its in zip(state.tensors().values(), accepted.state.tensors().values(), strict=True):
            mine.copy_(its.clone())
        return replace(accepted, state=state), scores

    expected = decode(net, requests(3), decoder_of(net), record=Record(hidden=True), batch_size=1)
    loop = Loop(net, decoder_of(net), num_slots=1, length=100, record=Record(hidden=True), run_pass=in_place)
    for request, wanted in zip(requests(3), expected, strict=True):
        loop.submit(request)
        completed: list[tuple[int, Output]] = []
        while loop.busy:
            completed += loop.step()
        same(completed[0][1], wanted)
        assert wanted.hidden_GD is not None
        assert completed[0][1].hidden_GD is not None
        torch.testing.assert_close(completed[0][1].hidden_GD, wanted.hidden_GD)


# Requests that are given up, what every slot tells, and loops that are kept


@pytest.mark.parametrize("name", CASES)
def test_a_cancelled_request_leaves_the_others_alone_and_its_slot_to_the_next(name: str) -> None:
    net, decoder, asked = case(name)
    loop = Loop(net, decoder, num_slots=2, length=max(positions_needed(decoder, request) for request in asked))
    numbers = [loop.submit(request) for request in asked[:5]]
    outputs = dict(loop.step())
    begun = next(number for number in loop.live.values())
    partial = loop.cancel(begun)
    assert partial is not None
    assert partial.num_forwards == 1
    assert loop.cancel(numbers[4]) is None
    for number in (begun, numbers[4], 99):
        with pytest.raises(FewstepError, match=f"there is no request {number} to cancel"):
            loop.cancel(number)
    while loop.busy:
        outputs.update(loop.step())
    assert sorted(outputs) == sorted(set(numbers) - {begun, numbers[4]})
    for number, output in outputs.items():
        same(output, decode(net, [asked[number]], decoder)[0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_rounds", [1, 2, 4])
def test_a_cancelled_request_has_the_final_tokens_before_its_first_open_position(name: str, num_rounds: int) -> None:
    net, decoder, asked = case(name)
    asked = [replace(request, early_stop=True, max_new_tokens=30) for request in asked]
    loop = Loop(net, decoder, num_slots=8, length=max(positions_needed(decoder, request) for request in asked))
    told: dict[int, dict[int, int]] = {loop.submit(request): {} for request in asked if request.canvas is None}
    for _ in range(num_rounds):
        completed = dict(loop.step())
        for number, event in loop.events():
            told[number][event.position] = event.token_id
        told = {number: final for number, final in told.items() if number not in completed}
    for number in loop.live.values():
        output, final = loop.cancel(number), told[number]
        assert output is not None
        count = next(at for at in range(30) if at not in final)
        assert output.token_ids == [final[at] for at in range(count)]
        assert (output.num_tokens, output.finish_reason) == (count, "cancelled")


def test_a_cancelled_infill_counts_what_was_filled_in_before_the_first_open_position() -> None:
    net = network("bidirectional")
    mask = net.role.mask_token_id
    assert mask is not None
    loop = Loop(net, decoder_of(net, policy=FixedCount()), num_slots=1, length=40)
    number = loop.submit(Request(prompt_ids=[5, 6], canvas=[7, mask, 8, mask, mask, 9, mask]))
    loop.step()
    output = loop.cancel(number)
    assert output is not None
    count = output.step_G.tolist().index(-1)
    assert output.token_ids == output.canvas_ids_G[:count].tolist()
    assert output.num_tokens == sum(step > 0 for step in output.step_G[:count].tolist())
    assert output.finish_reason == "cancelled"


@pytest.mark.parametrize("name", ["block", "diffusion", "speculative"])
def test_events_of_every_slot_are_those_of_its_request_alone(name: str) -> None:
    net, decoder, asked = case(name)
    loop = Loop(net, decoder, num_slots=3, length=max(positions_needed(decoder, request) for request in asked))
    numbers = [loop.submit(request) for request in asked[:5]]
    assert loop.events() == []
    told: dict[int, list[Any]] = {number: [] for number in numbers}
    while loop.busy:
        loop.step()
        for number, event in loop.events():
            told[number].append((event.position, event.token_id, event.step))
    for number in numbers:
        alone = [(event.position, event.token_id, event.step) for event in streamed(net, asked[number], decoder)[0]]
        assert told[number] == alone


def test_a_model_keeps_its_loop_for_calls_that_it_fits() -> None:
    lm, prompts = LanguageModel(network()), ["ab", "what is 2+2?", "no"]
    expected = [LanguageModel(lm.network).generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]
    lm.choice()  # an engine tries itself once, with a cache of its own
    with mock.patch.object(Network, "new_cache", autospec=True, side_effect=Network.new_cache) as new_cache:
        for _ in range(2):
            for prompt, ids in zip(prompts, expected, strict=True):
                assert lm.generate(prompt, max_new_tokens=8).token_ids == ids
                streamed = lm.stream(prompt, max_new_tokens=8, temperature=0.0, seed=4)
                assert len(list(streamed)) == len(ids)
        assert new_cache.call_count == 1
        hot = lm.generate("ab", max_new_tokens=8, temperature=2.0, seed=1).token_ids
        assert new_cache.call_count == 1
        assert hot == LanguageModel(lm.network).generate("ab", max_new_tokens=8, temperature=2.0, seed=1).token_ids
        assert [output.token_ids for output in lm.generate(prompts, max_new_tokens=8)] == expected
        assert next(iter(lm.stream("ab", max_new_tokens=8))).step == 1  # and given up
        assert lm.generate("ab", max_new_tokens=8).token_ids == expected[0]


def test_a_model_answers_by_another_function_that_runs_passes() -> None:
    shapes = []

    def noted(networks: Any, decoder: Any, state: Any, caches: Any, shape: Shape) -> Any:
        shapes.append(shape)
        return run_pass(networks, decoder, state, caches, shape)

    net = network()
    lm = LanguageModel(net, Loops(net, run_pass=noted))
    expected = LanguageModel(net).generate("ab", max_new_tokens=8)
    for _ in range(2):
        same(lm.generate("ab", max_new_tokens=8), expected)
        assert len(shapes) == expected.num_forwards
        shapes.clear()
    asked = [Request(prompt_ids=lm.encode("ab"), max_new_tokens=8)]
    kept = loop_for(net, lm.decoder(), asked)
    assert loop_for(net, lm.decoder(), asked, kept=kept) is kept
    assert loop_for(net, lm.decoder(), asked, kept=kept, run_pass=noted) is not kept


def test_the_contract_is_small() -> None:
    members = {name for name in vars(Decoder) if not name.startswith("_")} | set(Decoder.__annotations__)
    assert len(members) == 10
    assert len(fields(State)) <= 16


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.decode.admission.free_memory", lambda device: 10_000_000)
    net = network("autoregressive")
    asked = requests(2, max_new_tokens=200) * 50
    with pytest.raises(FewstepError, match=r"100 requests of \d+ positions at a time take .* GB free; choose a batch"):
        loop_for(net, decoder_of(net), asked, batch_size=100)
    assert loop_for(net, decoder_of(net), asked, batch_size=2).num_slots == 2


def test_other_blocks_than_in_training_come_with_a_warning() -> None:
    lm = LanguageModel(network())
    with pytest.warns(UserWarning, match="the model was trained in blocks of 4 positions; in blocks of 8 its rows see"):
        lm.decoder(block_size=8)
