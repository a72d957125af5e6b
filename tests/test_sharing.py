"""What requests of a loop share changes no token: prompts in pieces, keys and values taken over, fixed shapes."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.networks import block_draft_of, decoder_of, disturbed, network, requests, same, with_random_adapter

from fewstep.decode.decoder import Decoder
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.lookahead import Lookahead
from fewstep.decode.loop import Loop, decode
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import Sampling
from fewstep.decode.self_speculative import SelfSpeculative
from fewstep.decode.sharing import Sharing, unit_of_contexts
from fewstep.decode.speculative import Speculative
from fewstep.engine.captured import CapturedLoop
from fewstep.engine.stack import fused
from fewstep.errors import FewstepError
from fewstep.models.network import Network, Plan
from fewstep.models.tiny import tiny_network

LENGTH = 130
CASES = [
    "autoregressive",
    "jacobi",
    "lookahead",
    "speculative",
    "block draft",
    "self-speculative",
    "causal context",
    "block-causal context",
    "shifted",
    "bidirectional context",
    "diffusion",
]


def case(name: str) -> tuple[Network, Decoder]:
    match name:
        case "causal context" | "block-causal context":
            net = network("block_causal", context_attention=name.removesuffix(" context").replace("-", "_"))
        case "bidirectional context":
            net = network("block_causal")
        case "shifted":
            net = network("shifted block_causal")
        case "diffusion":
            net = network("bidirectional")
        case "self-speculative":
            net = with_random_adapter(8)
            assert net.adapter is not None
            return net, SelfSpeculative(role=net.role, adapter=net.adapter, window=4, cycle="fused")
        case _:
            net = network("autoregressive")
    match name:
        case "jacobi":
            return net, Jacobi(role=net.role, window=5)
        case "lookahead":
            return net, Lookahead(role=net.role, window=4)
        case "speculative":
            return net, Speculative(role=net.role, draft=disturbed(network("autoregressive")), window=3)
        case "block draft":
            return net, Speculative(role=net.role, draft=block_draft_of(net, context_attention="causal"), window=3)
    return net, decoder_of(net)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [5 + (7 * seed + 3 * i + i * i) % 50 for i in range(length)]


def asked(*lengths: int, **options: Any) -> list[Request]:
    return [
        Request(prompt_ids=prompt(length, i), max_new_tokens=9 + i, seed=i, **options)
        for i, length in enumerate(lengths)
    ]


def run(loop: Loop, several: list[Request]) -> list[Output]:
    """All at once; their outputs in order."""
    numbers = [loop.submit(request) for request in several]
    outputs: dict[int, Output] = {}
    while loop.busy:
        outputs.update(loop.step())
    assert sorted(loop._free) == list(range(loop.num_slots))
    return [outputs[number] for number in numbers]


def loop_of(net: Network, decoder: Decoder, num_slots: int = 3, **sharing: Any) -> Loop:
    return Loop(net, decoder, num_slots=num_slots, length=LENGTH, sharing=Sharing(**sharing))


def right(net: Network, decoder: Decoder, several: list[Request], outputs: list[Output]) -> None:
    """The tokens of the plain path alone."""
    alone: list[tuple[Request, Output]] = []
    for request, output in zip(several, outputs, strict=True):
        known = next((right for asked, right in alone if asked is request), None)
        alone.append((request, known or decode(net, [request], decoder)[0]))
        same(output, alone[-1][1])


# Prompts in pieces


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_prefilled_in_pieces_gives_the_same_tokens(name: str) -> None:
    net, decoder = case(name)
    several = asked(40, 3, 23, 8, 1)
    if not decoder.traits.greedy_only:
        several[2] = replace(several[2], sampling=Sampling(temperature=0.8))
    loop = loop_of(net, decoder, prefill_rows=7)
    right(net, decoder, several, run(loop, several))


@pytest.mark.parametrize("name", ["autoregressive", "speculative", "causal context", "block-causal context"])
def test_others_go_on_while_a_long_prompt_is_prefilled_in_pieces_of_bounded_size(name: str) -> None:
    net, decoder = case(name)
    short, long = asked(4, 64)
    loop = loop_of(net, decoder, prefill_rows=8)
    first = loop.submit(replace(short, max_new_tokens=60, early_stop=False))
    loop.step()
    (slot,) = loop.live
    second = loop.submit(long)
    rows: list[int] = []
    hidden = Network.hidden

    def noted(self: Network, plan: Plan, cache: Any = None) -> Any:
        rows.append(plan.tokens_RQ.numel())
        return hidden(self, plan, cache)

    rounds = 0
    with mock.patch.object(Network, "hidden", noted):
        while second not in {number for number, _ in loop.events()}:
            before = int(loop.state.num_forwards_R[slot])
            loop.step()
            rounds += 1
            assert loop.live.get(slot) != first or int(loop.state.num_forwards_R[slot]) > before
    assert rounds >= 64 // 8
    assert max(rows) <= 2 * (16 + decoder.traits.pass_length)  # pending rows are rounded up


def test_a_prompt_of_a_bidirectional_context_is_prefilled_in_one_pass() -> None:
    net, decoder = case("bidirectional context")
    assert unit_of_contexts([net]) is None
    loop = loop_of(net, decoder, prefill_rows=8)
    several = asked(30, 20, 3)
    for request in several:
        loop.submit(request)
    loop.step()
    assert len(loop.live) == 1  # it is more than a round prefills, so others wait a round
    loop.step()
    assert len(loop.live) == 2


def test_many_short_prompts_join_over_several_rounds() -> None:
    net, decoder = case("autoregressive")
    loop = loop_of(net, decoder, num_slots=8, prefill_rows=16)
    for request in asked(*[8] * 8):
        loop.submit(replace(request, max_new_tokens=40, early_stop=False))
    for num_live in (2, 4, 6, 8):
        loop.step()
        assert len(loop.live) == num_live


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_a_request_is_cancelled_while_its_prompt_is_prefilled(num_rounds: int) -> None:
    net, decoder = case("autoregressive")
    long, *others = asked(60, 9, 4)
    loop = loop_of(net, decoder, num_slots=2, prefill_rows=8, reuse_prefixes=True)
    number = loop.submit(long)
    for _ in range(num_rounds):
        loop.step()
        assert loop.events() == []
    output = loop.cancel(number)
    assert output is not None
    assert (output.token_ids, output.num_forwards, output.finish_reason) == ([], 0, "cancelled")
    assert not loop.busy
    right(net, decoder, [long, *others], run(loop, [long, *others]))


# Keys and values of earlier requests


def turns(net: Network, decoder: Decoder, count: int = 3) -> list[Request]:
    """A conversation: each prompt is the last one, its answer and some more."""
    ids, made = prompt(17), []
    for i in range(count):
        made.append(Request(prompt_ids=list(ids), max_new_tokens=12, seed=i))
        ids += [*decode(net, made[-1:], decoder)[0].token_ids, *prompt(5, i)]
    return made


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("bidirectional context", "diffusion")])
def test_earlier_turns_of_a_conversation_are_not_prefilled_again(name: str) -> None:
    net, decoder = case(name)
    several = turns(net, decoder)
    loop = loop_of(net, decoder, num_slots=1, reuse_prefixes=True)
    for request in several:
        before = loop.num_reused
        right(net, decoder, [request], run(loop, [request]))
        if request is not several[0]:
            assert loop.num_reused - before >= 16
    prompts = sum(decoder.role.first_block_start(len(request.prompt_ids)) for request in several)
    assert loop.num_prefilled == prompts - loop.num_reused


@pytest.mark.parametrize("name", ["autoregressive", "speculative", "block-causal context"])
def test_an_answer_is_taken_over_where_its_rows_see_what_a_context_sees(name: str) -> None:
    net, decoder = case(name)
    first, second = turns(net, decoder, 2)
    loop = loop_of(net, decoder, num_slots=1, reuse_prefixes=True)
    run(loop, [first])
    run(loop, [second])
    assert loop.num_reused > len(first.prompt_ids)


@pytest.mark.parametrize("name", CASES)
def test_shared_beginnings_give_the_same_tokens_in_any_order(name: str) -> None:
    net, decoder = case(name)
    system = prompt(21, 5)
    several = [
        Request(prompt_ids=[*system, *prompt(n, n)][: n + 21], max_new_tokens=5 + n, seed=n) for n in (4, 1, 7, 4)
    ]
    several.append(replace(several[0], prompt_ids=system[:10]))
    loop = loop_of(net, decoder, num_slots=2, reuse_prefixes=True, prefill_rows=16)
    right(net, decoder, several * 2, run(loop, several * 2))
    if decoder.traits.cached:
        assert loop.num_reused > 0


def test_with_a_bidirectional_context_only_an_identical_one_is_taken_over() -> None:
    net, decoder = case("bidirectional context")
    first, other = asked(20, 20)
    loop = loop_of(net, decoder, reuse_prefixes=True)
    run(loop, [first])
    longer = replace(first, prompt_ids=[*first.prompt_ids, 9])
    right(net, decoder, [other, longer], run(loop, [other, longer]))
    assert loop.num_reused == 0
    again = replace(first, max_new_tokens=17)
    right(net, decoder, [again], run(loop, [again]))
    assert loop.num_reused == 20


def test_a_context_is_taken_over_from_a_request_under_way() -> None:
    net, decoder = case("autoregressive")
    loop = loop_of(net, decoder, num_slots=2, reuse_prefixes=True)
    first = Request(prompt_ids=prompt(20), max_new_tokens=30, early_stop=False)
    number = loop.submit(first)
    loop.step()
    second = Request(prompt_ids=[*prompt(20), 7, 8], max_new_tokens=9)
    outputs: dict[int, Output] = {}
    loop.submit(second)
    while loop.busy:
        outputs.update(loop.step())
    right(net, decoder, [first, second], [outputs[number], outputs[number + 1]])
    assert loop.num_reused == 20


def test_the_slot_that_was_free_for_longest_is_overwritten_first() -> None:
    net, decoder = case("autoregressive")
    loop = loop_of(net, decoder, num_slots=3, reuse_prefixes=True)
    one, two, three, four = asked(20, 21, 22, 23)
    for request in (one, two, three, one, four):  # four takes the slot of two
        run(loop, [request])
    for request, reused in ((one, 19), (three, 21), (four, 22), (two, 0)):
        before = loop.num_reused
        run(loop, [request])
        assert loop.num_reused - before == reused


def test_long_factors_are_not_taken_over_as_short_ones() -> None:
    net, decoder = case("autoregressive")
    loop = loop_of(net, decoder, reuse_prefixes=True)
    assert loop._prefiller is not None
    assert loop._prefiller._prefixes is not None
    loop._prefiller._prefixes._boundaries = [30]
    first, longer = prompt(20), prompt(40)
    run(loop, [Request(prompt_ids=first, max_new_tokens=4)])
    assert loop._prefiller._prefixes.longest(longer, 39) == (-1, 0)
    assert loop._prefiller._prefixes.longest(prompt(30), 29)[1] == 20


# Fixed shapes


@pytest.mark.parametrize("name", ["block-causal context", "shifted", "autoregressive", "speculative", "diffusion"])
def test_strictly_a_request_has_the_same_numbers_in_any_company_in_bfloat16(name: str) -> None:
    """Its probabilities too, to the last bit, whether it is alone, joins midway, or others sample."""
    net, decoder = case(name)
    for one in (net, *decoder.traits.companions.values()):
        one.module.to(torch.bfloat16)
    several = [*asked(3, 40, 14), *requests(4)]
    several[1] = replace(several[1], sampling=Sampling(temperature=0.8))
    expected = [run(loop_of(net, decoder, strict=True, prefill_rows=16), [one])[0] for one in several]
    loop = loop_of(net, decoder, strict=True, prefill_rows=16)
    outputs: dict[int, Output] = {}
    for request in several[::-1]:
        loop.submit(request)
        outputs.update(loop.step())
    while loop.busy:
        outputs.update(loop.step())
    for number, one in enumerate(expected[::-1]):
        same(outputs[number], one)
        assert torch.equal(outputs[number].confidence_G, one.confidence_G)


@pytest.mark.parametrize("name", CASES)
def test_strict_passes_give_the_tokens_of_the_plain_path(name: str) -> None:
    net, decoder = case(name)
    several = asked(9, 2, 30, 5)
    right(net, decoder, several, run(loop_of(net, decoder, strict=True), several))


def test_what_depends_on_others_or_on_time_is_not_strict() -> None:
    net, decoder = case("autoregressive")
    with pytest.raises(FewstepError, match="strict passes do not depend on other requests, of which reuse_prefixes"):
        loop_of(net, decoder, strict=True, reuse_prefixes=True)
    adapted = with_random_adapter(8)
    assert adapted.adapter is not None
    auto = SelfSpeculative(role=adapted.role, adapter=adapted.adapter, window=4, cycle="auto")
    with pytest.raises(FewstepError, match="set the cycle to two-pass or fused"):
        loop_of(adapted, auto, strict=True)
    with pytest.raises(FewstepError, match="prefill_rows must be at least 1"):
        Sharing(prefill_rows=0)


def test_contexts_are_cut_where_every_network_allows_it() -> None:
    causal = tiny_network("autoregressive")
    four, six = (tiny_network(block_size=size, context_attention="block_causal") for size in (4, 6))
    assert unit_of_contexts([causal]) == 1
    assert unit_of_contexts([causal, four, six]) == 12
    assert unit_of_contexts([four, tiny_network()]) is None


# Captured passes


@pytest.mark.parametrize("name", ["autoregressive", "speculative", "block-causal context", "shifted", "jacobi"])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_loop_of_captured_passes_shares_beginnings_and_cuts_prompts_too(name: str, num_slots: int) -> None:
    net, decoder = case(name)
    beginning = prompt(33)
    several = [
        Request(prompt_ids=[*beginning[:length], 7 + length], max_new_tokens=4 + length % 9, seed=length)
        for length in (33, 4, 33, 20, 1, 33)
    ]
    networks = {"target": net, **decoder.traits.companions}
    loop = CapturedLoop(
        net,
        decoder,
        fused={name: fused(each) for name, each in networks.items()},
        num_slots=num_slots,
        length=LENGTH,
        sharing=Sharing(prefill_rows=8, reuse_prefixes=True),
    )
    outputs: dict[int, Output] = {}
    for request in several:
        loop.submit(request)
        outputs.update(loop.step())
    for _ in range(300):
        outputs.update(loop.step())
    right(net, decoder, several, [outputs[number] for number in range(len(several))])
    assert loop.num_reused > 0
