"""The loop of captured passes against the plain one: the same tokens, passes and events, whatever the decoder.

On a CPU a pass is traced and not captured, and what would be compiled runs as it was traced: the rest is the same code.
"""

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cases import CASES, answered_as_they_join, case
from helpers.networks import decoder_of, network, requests, same
from test_stock_architectures import RUN, network_of, prompts, stock_module

from fewstep.decode.admission import positions_needed
from fewstep.decode.decoder import Decoder
from fewstep.decode.generator import answer
from fewstep.decode.loop import Loop, decode
from fewstep.decode.own_policies import OwnPolicy
from fewstep.decode.prompt_lookup import PromptLookup
from fewstep.decode.requests import Event, Request
from fewstep.engine.captured import CapturedLoop
from fewstep.engine.choice import Engines
from fewstep.engine.language_model import load
from fewstep.engine.stack import fused
from fewstep.errors import FewstepError
from fewstep.models.network import Network


@pytest.fixture(autouse=True)
def _without_a_compiler() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def captured(net: Network, decoder: Decoder, asked: list[Request], *, num_slots: int, **options: Any) -> CapturedLoop:
    networks = {"target": net, **decoder.traits.companions}
    return CapturedLoop(
        net,
        decoder,
        fused={name: fused(each) for name, each in networks.items()},
        num_slots=num_slots,
        length=max(positions_needed(decoder, request) for request in asked),
        **options,
    )


@pytest.mark.parametrize(
    ("name", "num_slots"),
    [*((name, 1) for name in CASES), ("block", 8), ("autoregressive", 8), ("self-speculative", 8)],
)
def test_answers_are_those_of_the_plain_loop(name: str, num_slots: int) -> None:
    net, decoder, asked = case(name)
    asked = asked if num_slots > 1 else asked[:2]
    loop = captured(net, decoder, asked, num_slots=num_slots)
    for output, expected in zip(answer(loop, asked), decode(net, asked, decoder, batch_size=num_slots), strict=True):
        same(output, expected)


@pytest.mark.parametrize("name", CASES)
def test_requests_join_while_others_are_under_way(name: str) -> None:
    net, decoder, asked = case(name)
    asked = asked[:5]
    outputs = answered_as_they_join(captured(net, decoder, asked, num_slots=3), asked)
    for number, request in enumerate(asked):
        same(outputs[number], decode(net, [request], decoder)[0])


@pytest.mark.parametrize("name", ["block", "autoregressive", "self-speculative"])
def test_events_are_those_of_the_plain_loop(name: str) -> None:
    net, decoder, asked = case(name)
    asked = asked[:4]
    length = max(positions_needed(decoder, request) for request in asked)
    plain = told(Loop(net, decoder, num_slots=2, length=length), asked)
    assert told(captured(net, decoder, asked, num_slots=2), asked) == plain


def told(loop: Loop, asked: list[Request]) -> list[list[tuple[int, int, int]]]:
    """Of each request, the events in their order."""
    events: list[list[tuple[int, int, int]]] = [[] for _ in asked]

    def watch(index: int, event: Event) -> bool:
        events[index].append((event.position, event.token_id, event.step))
        return False

    answer(loop, asked, watch=watch)
    return events


def test_a_request_is_cancelled_with_what_is_final_and_its_slot_is_free() -> None:
    net, decoder, asked = case("block")
    loop = captured(net, decoder, asked, num_slots=1)
    first = loop.submit(asked[3])
    for _ in range(3):
        assert not loop.step()
    output = loop.cancel(first)
    whole = decode(net, [asked[3]], decoder)[0]
    assert output is not None
    assert output.finish_reason == "cancelled"
    assert output.token_ids == whole.token_ids[: output.num_tokens]
    (after,) = answer(loop, asked[:1])
    same(after, decode(net, asked[:1], decoder)[0])


def test_a_listener_sees_the_state_after_every_round() -> None:
    net, decoder, asked = case("autoregressive")
    seen = []
    loop = captured(net, decoder, asked[:1], num_slots=1, listeners=[lambda state: seen.append(int(state.front_R[0]))])
    (output,) = answer(loop, asked[:1])
    assert len(seen) == output.num_forwards
    assert seen == sorted(seen)


@pytest.mark.parametrize("name", ["block", "self-speculative"])
def test_compiled_passes_give_the_same_answers(name: str) -> None:
    net, decoder, asked = case(name)
    asked = asked[:4]
    loop = captured(net, decoder, asked, num_slots=2)
    expected = decode(net, asked, decoder, batch_size=2)
    for _ in range(2):
        for output, plain in zip(answer(loop, asked), expected, strict=True):
            same(output, plain)
        loop.compile_passes()
    (again,) = answer(loop, asked[:1])
    same(again, expected[0])


def test_a_loop_that_compiles_does_so_at_once_and_is_kept_for_those_alone_who_ask_for_it() -> None:
    net, decoder, asked = case("block")
    expected = decode(net, asked[:2], decoder, batch_size=1)
    loop = captured(net, decoder, asked, num_slots=1, compiles=True)
    for output, plain in zip(answer(loop, asked[:2]), expected, strict=True):
        same(output, plain)
    denoising = [one for (shape, _), one in loop._passes.items() if shape.kind != "prefill" and one._num_runs > 1]
    assert denoising
    assert all(one._is_compiled for one in denoising)
    made: dict[str, Any] = {"num_slots": 1, "length": loop.length, "record": None, "companions": None}
    made["run_pass"] = loop._run_pass
    made["fused"] = loop._memory.fused
    assert loop.fits(net, decoder, **made, compiles=True)
    assert not loop.fits(net, decoder, **made, compiles=False)


@pytest.mark.parametrize("reading", ["item", "nonzero"])
def test_a_policy_that_waits_for_the_device_runs_as_it_is_with_a_warning(reading: str) -> None:
    def waits(masked: Any, confidence: Any) -> Any:
        least = 0.5 * confidence.max().item() if reading == "item" else 0.5 + 0 * len(confidence.nonzero())
        return masked & (confidence >= least)

    net = network()
    decoder, asked = decoder_of(net, policy=OwnPolicy(rule=waits)), requests(1)
    with pytest.warns(UserWarning, match="a pass cannot be captured, and runs as it is"):
        (output,) = answer(captured(net, decoder, asked, num_slots=1), asked)
    same(output, decode(net, asked, decoder)[0])


def test_a_policy_that_leaves_what_no_later_pass_scores_has_it_finalised() -> None:
    def best(masked: Any, confidence: Any) -> Any:
        return masked & (confidence >= confidence.amax(1, keepdim=True))

    net = network("shifted block_causal")
    decoder, asked = decoder_of(net, policy=OwnPolicy(rule=best)), requests(2)
    expected = decode(net, asked, decoder)
    assert expected[0].step_G[0] == 1
    for output, plain in zip(answer(captured(net, decoder, asked, num_slots=2), asked), expected, strict=True):
        same(output, plain)


def test_a_policy_that_cannot_be_traced_runs_as_it_is_with_a_warning() -> None:
    def reads_a_number(masked: Any, confidence: Any) -> Any:
        return masked & (confidence >= confidence[masked].max()) if bool(masked.any()) else masked

    net = network()
    decoder, asked = decoder_of(net, policy=OwnPolicy(rule=reads_a_number)), requests(1)
    loop = captured(net, decoder, asked, num_slots=1)
    with pytest.warns(UserWarning, match="a pass cannot be captured, and runs as it is"):
        (output,) = answer(loop, asked)
    same(output, decode(net, asked, decoder)[0])


def test_a_compiler_that_fails_leaves_the_pass_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("fewstep.engine.captured_pass.compiled", fails)
    net, decoder, asked = case("autoregressive")
    loop = captured(net, decoder, asked[:1], num_slots=1)
    answer(loop, asked[:1])
    with pytest.warns(UserWarning, match="a pass is not compiled, and slower for that: no compiler"):
        loop.compile_passes()
    (output,) = answer(loop, asked[:1])
    same(output, decode(net, asked[:1], decoder)[0])


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this device too, `auto` takes the engine for GPUs."""
    monkeypatch.setattr(Engines, "_cpu", lambda engines, decoder: engines._cuda(decoder, compiles=False))


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", ["gsm-student", "gsm-draft"])
def test_a_bundled_model_answers_and_streams_through_it(name: str) -> None:
    lm, question = load(name, device="cpu", dtype="float32"), "What is 3 + 4?"
    assert lm.choice().engine == "cuda"
    expected = lm.generate(question, max_new_tokens=12, engine="off")
    for _ in range(2):
        same(lm.generate(question, max_new_tokens=12), expected)
    stream = lm.stream(question, max_new_tokens=12)
    ids = {event.position: event.token_id for event in stream}
    assert stream.output is not None
    assert stream.output.token_ids == expected.token_ids == [ids[position] for position in sorted(ids)]


def test_requests_that_stop_early_leave_the_others_and_later_streams_alone() -> None:
    net, decoder, asked = case("autoregressive")
    loop = captured(net, decoder, asked, num_slots=2)
    events: list[tuple[int, int]] = []

    def watch(index: int, event: Event) -> bool:
        events.append((index, event.position))
        return index == 1 and event.position == 2

    outputs = answer(loop, asked[:3], watch=watch)
    assert 3 <= outputs[1].num_tokens <= 5
    for index in (0, 2):
        same(outputs[index], decode(net, [asked[index]], decoder)[0])
        assert [place for which, place in events if which == index] == list(range(outputs[index].num_tokens))
    answer(loop, asked[:2])
    assert told(loop, asked[:2]) == told(Loop(net, decoder, num_slots=2, length=loop.length), asked[:2])


def test_who_asks_late_is_told_of_everything() -> None:
    net, decoder, asked = case("block")
    loop = captured(net, decoder, asked, num_slots=1)
    loop.submit(asked[3])
    for _ in range(3):
        loop.step()
    found = {event.position: event.token_id for _, event in loop.events()}
    whole = decode(net, [asked[3]], decoder)[0]
    ready = [place for place, step in enumerate(whole.step_G.tolist()) if 0 < step <= 3]
    assert found == {place: int(whole.canvas_ids_G[place]) for place in ready}


@pytest.mark.parametrize("name", ["block", "self-speculative", "jacobi"])
def test_passes_of_some_of_the_requests_are_fused_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.engine.captured.FREE_ROWS", 0)
    monkeypatch.setattr("fewstep.decode.decoder.FREE_ROWS", 0)
    net, decoder, asked = case(name)
    loop = captured(net, decoder, asked, num_slots=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = answer(loop, asked)
    assert any(part for _, part in loop._passes)
    for output, expected in zip(outputs, decode(net, asked, decoder), strict=True):
        same(output, expected)


def test_a_loop_that_is_gone_has_given_its_memory_back() -> None:
    net, decoder, asked = case("autoregressive")
    loop = captured(net, decoder, asked[:1], num_slots=1)
    answer(loop, asked[:1])
    keys = weakref.ref(loop._caches["target"].keys)
    gc.disable()
    del loop
    gone = keys() is None
    gc.enable()
    assert gone


SOME_FAMILIES = [
    *("llama, longrope", "mistral, window", "qwen2, window in the second layer", "qwen3", "phi", "phi3"),
    *(
        "gemma2, window",
        "gemma3, window",
        "olmo2",
        "cohere2, window",
        "granite",
        "smollm3",
        "exaone4, window",
        "gpt_neox",
    ),
]


@pytest.mark.parametrize("name", SOME_FAMILIES)
def test_stock_classes_give_the_tokens_of_the_plain_loop(name: str) -> None:
    net = network_of(stock_module(*RUN[name]))
    decoder = PromptLookup(role=net.role)
    asked = [Request(prompt_ids=prompt, max_new_tokens=6) for prompt in prompts(5, 19)]
    loop = captured(net, decoder, asked, num_slots=2)
    for output, expected in zip(answer(loop, asked), decode(net, asked, decoder), strict=True):
        same(output, expected)


def test_a_class_that_cannot_be_fused_is_refused_with_the_reason() -> None:
    net = network_of(stock_module(*RUN["mixtral"]))
    with pytest.raises(FewstepError, match="the layers of a model cannot be fused"):
        fused(net)


def test_parameters_are_in_memory_once() -> None:
    net = network("autoregressive")
    before = {name: parameter.clone() for name, parameter in net.module.named_parameters()}
    first, second = fused(net), fused(net)
    attention: list[Any] = [each.stack.layers[0].self_attn for each in (first, second)]
    assert len({each.q_proj.whole.weight.data_ptr() for each in attention}) == 1
    own = net.module.base_model.layers[0].self_attn
    assert own.q_proj.weight.data_ptr() == attention[0].q_proj.whole.weight.data_ptr()
    assert own.k_proj.weight.data_ptr() == own.q_proj.weight.data_ptr() + own.q_proj.weight.nbytes
    for name, parameter in net.module.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_draft_rows_of_a_small_network_have_weights_of_their_own_which_follow_the_adapter() -> None:
    lm, question = load("gsm-draft", device="cpu", dtype="float32"), "What is 3 + 4?"
    adapter = lm.network.adapter
    assert adapter is not None
    made = fused(lm.network)
    layer: Any = made.stack.layers[0]
    assert made.copies_weights
    assert not [name for name, _ in layer.named_parameters() if "lora" in name]
    before = lm.generate(question, max_new_tokens=24)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    after = lm.generate(question, max_new_tokens=24)
    assert after.token_ids == before.token_ids
    assert after.num_forwards == lm.generate(question, max_new_tokens=24, engine="off").num_forwards
    assert after.num_forwards > before.num_forwards  # the base alone does not draft as well


def test_layers_that_compute_something_else_are_refused() -> None:
    net = network("autoregressive")

    class Odd(torch.nn.Module):
        def __init__(self, linear: torch.nn.Module) -> None:
            super().__init__()
            self.linear, self.num_calls = linear, 0

        def forward(self, x: Any) -> Any:
            self.num_calls += 1
            return self.linear(x) * self.num_calls

    net.module.base_model.layers[0].mlp.down_proj = Odd(net.module.base_model.layers[0].mlp.down_proj)
    with pytest.raises(FewstepError, match="compute something else when they are fused"):
        fused(net)
