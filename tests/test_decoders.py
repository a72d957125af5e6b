"""Decoders against plain loops written here, and what must never change a result: batch, padding, time, the cache."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.generators import streamed
from helpers.networks import BLOCK, decoder_of, network, requests, same, use_as_end_of_text
from torch import Tensor

from fewstep.decode.admission import positions_needed
from fewstep.decode.block import Block
from fewstep.decode.decoder import Shape
from fewstep.decode.diffusion import Diffusion
from fewstep.decode.loop import Loop, decode, run_pass
from fewstep.decode.policies import EvenSplit, Factor, FixedCount, Order, Origin, Threshold
from fewstep.decode.requests import Output, Record, Request
from fewstep.decode.sampling import Sampling
from fewstep.decode.state import NEVER, State
from fewstep.errors import FewstepError
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network

TINY = 1e-6
CONTEXTS = ("bidirectional", "causal", "block_causal")
ROLES = ("autoregressive", "bidirectional", "block_causal", "shifted bidirectional", "shifted block_causal")


# The exact cache


def reads(context: str, context_length: int, query: int, key: int) -> bool:
    """Whether a position of the block-causal role reads another, in words of the design."""
    if context == "block_causal":
        return key // BLOCK <= query // BLOCK
    if query < context_length:
        return key <= query if context == "causal" else key < context_length
    return key < context_length or (key - context_length) // BLOCK <= (query - context_length) // BLOCK


def uncached_block_decoding(
    net: Network, prompt: Sequence[int], limit: int, at_least: float, gaps: int | None
) -> tuple[list[int], int]:
    """The canvas and the number of forwards: a full forward over everything for every step, and no early stop."""
    context, mask_id = net.role.context_attention, net.role.mask_token_id
    assert mask_id is not None
    start = len(prompt) // BLOCK * BLOCK if context == "block_causal" else len(prompt)
    tokens, forwards = list(prompt), 0
    while len(tokens) < len(prompt) + limit:
        tokens += [mask_id] * (BLOCK - (len(tokens) - start) % BLOCK)
        while mask_id in tokens[len(prompt) :]:
            every = range(len(tokens))
            visible = torch.tensor([[reads(context, len(prompt), q, k) for k in every] for q in every])
            with torch.no_grad():
                logits = net.module(torch.tensor([tokens]), attention_mask=visible[None, None]).logits[0]
            if net.role.right_shift_logits:
                logits = logits.roll(1, 0)  # row p - 1 scores position p; in front of a block it is a final token's
            logits[:, mask_id] = float("-inf")
            best = logits.softmax(-1).max(-1)
            opened = [p for p in every if p >= len(prompt) and tokens[p] == mask_id]
            # With shifted logits the row before a block does not see it: its first position is settled at once.
            settled = [p for p in opened if net.role.right_shift_logits and (p - start) % BLOCK == 0]
            certain = {*settled, *(p for p in opened if best.values[p] >= at_least)}
            if gaps is not None:
                opened = [p for p in opened if sum(q < p for q in opened if q not in certain) <= gaps]
            sure = [p for p in opened if p in certain]
            for p in sure or [max(opened, key=lambda p: float(best.values[p]))]:
                tokens[p] = int(best.indices[p])
            forwards += 1
    return tokens[len(prompt) :], forwards


@pytest.mark.parametrize(("batch_size", "gaps"), [(8, None), (3, None), (3, 0), (3, 1)])
@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_cached_block_decoding_equals_an_uncached_loop(
    context: Any, shift: bool, batch_size: int, gaps: int | None
) -> None:
    net = network(context_attention=context, right_shift_logits=shift)
    decoder = decoder_of(net, policy=Threshold(at_least=0.3, gaps=gaps))
    outputs = decode(net, requests(early_stop=False), decoder, batch_size=batch_size)
    num_passes = set()
    for request, output in zip(requests(), outputs, strict=True):
        tokens, forwards = uncached_block_decoding(net, request.prompt_ids, request.max_new_tokens, 0.3, gaps)
        assert output.canvas_ids_G.tolist() == tokens
        assert output.num_forwards == forwards, "a fused prefill and fused commits add no pass"
        num_passes.add(forwards / len(tokens))
    assert min(num_passes) < 1, "some steps finalise several tokens, or the test shows little"


@pytest.mark.parametrize("gaps", [None, 1])
@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_uncached_decoder_runs_a_block_causal_model_as_the_cached_one_does(
    context: Any, shift: bool, gaps: int | None
) -> None:
    net = network(context_attention=context, right_shift_logits=shift)
    policy = Threshold(at_least=0.3, gaps=gaps)
    cached, uncached = decoder_of(net, policy=policy), Diffusion(role=net.role, block_size=BLOCK, policy=policy)
    for one, other in zip(decode(net, requests(), cached), decode(net, requests(), uncached), strict=True):
        same(one, other)


def test_a_shift_changes_what_a_block_causal_network_says() -> None:
    plain, shifted = network(context_attention="causal"), network("shifted block_causal")
    for one, other in zip(
        decode(plain, requests(), decoder_of(plain)), decode(shifted, requests(), decoder_of(shifted)), strict=True
    ):
        assert one.token_ids != other.token_ids


def test_autoregressive_decoding_equals_transformers_generate() -> None:
    net = network("autoregressive")
    use_as_end_of_text(net, 61)
    outputs = decode(net, requests(), decoder_of(net), batch_size=3)
    for request, output in zip(requests(), outputs, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        expected = net.module.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=net.eos_token_id,
            pad_token_id=0,
        )
        assert output.token_ids == expected[0, prompt.shape[1] :].tolist()
        assert output.num_forwards == output.num_tokens


# What must never change a result


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("role", ROLES)
def test_a_batch_of_8_equals_each_alone(role: Any, temperature: float) -> None:
    net = network(role)
    asked = requests(sampling=Sampling(temperature=temperature, top_k=None if temperature == 0 else 20))
    decoder = decoder_of(net)
    alone = [decode(net, [request], decoder)[0] for request in asked]
    for batch_size in (8, 3):
        for one, other in zip(alone, decode(net, asked, decoder, batch_size=batch_size), strict=True):
            same(one, other)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("free_rows", [0, 10_000], ids=["one pass per shape", "one pass for all"])
def test_grouping_into_passes_changes_nothing(role: Any, free_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(role)
    expected = decode(net, requests(), decoder_of(net))
    monkeypatch.setattr("fewstep.decode.decoder.FREE_ROWS", free_rows)
    for one, other in zip(expected, decode(net, requests(), decoder_of(net), batch_size=5), strict=True):
        same(one, other)


@pytest.mark.parametrize("role", ROLES)
def test_a_request_that_joins_late_gets_what_it_gets_early(role: Any) -> None:
    net = network(role)
    decoder = decoder_of(net)
    length = max(positions_needed(decoder, request) for request in requests())
    loop = Loop(net, decoder, num_slots=4, length=length)
    outputs: dict[int, Output] = {}
    for request in requests():
        loop.submit(request)
        for _ in range(3):
            outputs.update(loop.step())
    while loop.busy:
        outputs.update(loop.step())
    for number, request in enumerate(requests()):
        same(outputs[number], decode(net, [request], decoder)[0])


@pytest.mark.parametrize("role", ROLES)
def test_padding_changes_nothing(role: Any) -> None:
    net = network(role)
    decoder = decoder_of(net)
    request = requests()[2]
    loop = Loop(net, decoder, num_slots=3, length=200)
    loop.submit(request)
    completed: list[tuple[int, Output]] = []
    while loop.busy:
        completed += loop.step()
    same(completed[0][1], decode(net, [request], decoder)[0])


@pytest.mark.parametrize("role", ROLES)
def test_a_step_after_completion_changes_nothing(role: Any) -> None:
    net = network(role)
    decoder = decoder_of(net)
    request = requests()[3]
    loop = Loop(net, decoder, num_slots=1, length=positions_needed(decoder, request))
    loop.submit(request)
    while loop.busy:
        loop.step()
    caches = {"target": net.new_cache(1, loop.length)} if decoder.traits.cached else {}
    shape = Shape("prefill", 16 if decoder.traits.cached else loop.length)
    with torch.no_grad():
        accepted, _ = run_pass({"target": net}, decoder, loop.state, caches, shape)
    after = accepted.state.tensors()
    for name, before in loop.state.tensors().items():
        assert torch.equal(before, after[name]), name
    assert accepted.chosen_RS is not None
    assert not accepted.chosen_RS.any()


def test_a_cached_result_does_not_depend_on_the_limit() -> None:
    net = network()
    prompt = requests()[3].prompt_ids
    long = decode(net, [Request(prompt_ids=prompt, max_new_tokens=24)], decoder_of(net))[0].token_ids
    for limit in (1, 3, 4, 9, 23):
        output = decode(net, [Request(prompt_ids=prompt, max_new_tokens=limit)], decoder_of(net))[0]
        assert output.token_ids == long[:limit]
        assert len(output.canvas_ids_G) % BLOCK == 0


# Policies, counting, stopping


def test_an_easily_met_threshold_finalises_a_block_per_pass() -> None:
    net = network()
    decoder = decoder_of(net, policy=Threshold(at_least=TINY))
    output = decode(net, [Request(prompt_ids=[5, 6], max_new_tokens=12)], decoder)[0]
    assert output.num_forwards == 3
    assert output.step_G.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert output.tokens_per_forward == 4


def test_one_token_per_pass_when_nothing_is_confident() -> None:
    net = tiny_network("block_causal", block_size=BLOCK)
    output = decode(net, [Request(prompt_ids=[5, 6], max_new_tokens=12)], decoder_of(net, policy=Threshold()))[0]
    assert output.num_forwards == 12
    assert sorted(output.step_G.tolist()) == list(range(1, 13))


def test_exact_ties_finalise_one_token_per_pass() -> None:
    net = tiny_network("block_causal", block_size=BLOCK, head_scale=0)
    output = decode(net, [Request(prompt_ids=[5, 6], max_new_tokens=8)], decoder_of(net))[0]
    assert output.step_G.tolist() == list(range(1, 9))


@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.parametrize("role", ["bidirectional", "block_causal"])
def test_the_mask_token_is_never_emitted(role: Any, temperature: float) -> None:
    net = network(role)
    assert net.role.mask_token_id is not None
    with torch.no_grad():  # rows that would choose the mask token nearly always
        head = net.module.get_output_embeddings().weight
        head[net.role.mask_token_id] = head.abs().max() * 50
        head.abs_()
    for output in decode(net, requests(sampling=Sampling(temperature=temperature)), decoder_of(net)):
        assert net.role.mask_token_id not in output.token_ids


@pytest.mark.parametrize(
    ("steps", "per_step"),
    [
        (None, [1] * 12),
        (12, [1] * 12),
        (3, [4, 4, 4]),
        (4, [2, 2, 4, 4]),  # blocks of 2, 1, 1 steps
        (5, [2, 2, 2, 2, 4]),
        (7, [2, 1, 1, 2, 2, 2, 2]),
        (50, [1] * 12),
    ],
)
def test_steps_are_split_over_blocks_and_tokens_over_steps(steps: int | None, per_step: list[int]) -> None:
    net = network("bidirectional")
    policy = FixedCount() if steps is None else EvenSplit()
    decoder = decoder_of(net, policy=policy, steps=steps)
    output = decode(net, [Request(prompt_ids=[5, 6, 7], max_new_tokens=12, early_stop=False)], decoder)[0]
    assert output.num_forwards == len(per_step)
    assert output.step_G.bincount()[1:].tolist() == per_step
    for earlier, later in ((0, 4), (4, 8)):
        assert output.step_G[earlier : earlier + 4].max() < output.step_G[later : later + 4].min(), "left to right"


def test_fewer_steps_than_blocks_are_refused() -> None:
    net = network("bidirectional")
    with pytest.raises(FewstepError, match="2 steps are fewer than the 3 blocks"):
        decode(net, [Request(prompt_ids=[5], max_new_tokens=12)], decoder_of(net, policy=EvenSplit(), steps=2))


@pytest.mark.parametrize("order", ["low_confidence", "random", "margin", "entropy"])
def test_every_order_fills_the_canvas_one_token_per_step(order: Order) -> None:
    net = network("bidirectional")
    decoder = decoder_of(net, policy=FixedCount(order=order))
    output = decode(net, [Request(prompt_ids=[5], max_new_tokens=8)], decoder)[0]
    assert sorted(output.step_G.tolist()) == list(range(1, 9))


def test_orders_differ_and_the_random_one_follows_the_seed() -> None:
    net = network("bidirectional")

    def steps(order: Order, seed: int = 0) -> list[int]:
        request = Request(prompt_ids=[5, 9], max_new_tokens=16, seed=seed)
        decoder = decoder_of(net, policy=FixedCount(order=order), block_size=16)
        return decode(net, [request], decoder)[0].step_G.tolist()

    assert steps("random") == steps("random")
    assert steps("random") != steps("random", seed=1)
    assert steps("random") != steps("low_confidence")


def test_origin_ends_with_its_steps_and_may_finalise_none_in_one() -> None:
    net = network("bidirectional")
    batch = [Request(prompt_ids=[5], max_new_tokens=8, seed=seed, early_stop=False) for seed in range(20)]
    outputs = decode(net, batch, decoder_of(net, policy=Origin(), steps=8))
    assert all((output.step_G > 0).all() and output.num_forwards <= 8 for output in outputs)
    assert any(0 in output.step_G.bincount()[1:].tolist() for output in outputs)
    assert len({tuple(output.step_G.tolist()) for output in outputs}) > 10


def test_a_threshold_replaces_the_schedule_of_the_teacher() -> None:
    net = network("bidirectional")
    decoder = decoder_of(net, policy=Threshold(at_least=TINY))
    output = decode(net, [Request(prompt_ids=[5], max_new_tokens=12)], decoder)[0]
    assert output.num_forwards == 3


def with_common_end_of_text(role: Any) -> tuple[Network, Request, Output]:
    """A network whose end-of-text is a token that it produces midway, and what it would give if nothing stopped it."""
    net = network(role)
    request = Request(prompt_ids=[5, 11, 30], max_new_tokens=22)
    free = decode(net, [replace(request, early_stop=False)], decoder_of(net))[0]
    ids = free.canvas_ids_G.tolist()
    use_as_end_of_text(net, next(token for i, token in enumerate(ids) if 5 <= i < 15 and token not in ids[:i]))
    return net, request, free


@pytest.mark.parametrize("role", ROLES)
def test_early_stop_cuts_the_answer_and_the_passes(role: Any) -> None:
    net, request, free = with_common_end_of_text(role)
    ids = free.canvas_ids_G.tolist()
    cut = ids.index(net.eos_token_id) + 1

    stopped = decode(net, [request], decoder_of(net))[0]
    assert stopped.token_ids == ids[:cut]
    assert stopped.num_tokens == cut
    assert stopped.finish_reason == "stop"
    assert stopped.num_forwards == int(free.step_G[:cut].max()), "stops in the step that finalises the last token"

    whole = decode(net, [replace(request, early_stop=False)], decoder_of(net))[0]
    assert whole.token_ids == stopped.token_ids
    assert whole.num_forwards == int(free.step_G.max())
    assert (whole.step_G > 0).all()


@pytest.mark.parametrize("role", ROLES)
def test_an_answer_without_end_of_text_has_the_length_asked_for(role: Any) -> None:
    net = network(role)
    use_as_end_of_text(net, 61)
    output = decode(net, [Request(prompt_ids=[5, 6], max_new_tokens=7)], decoder_of(net))[0]
    assert (output.num_tokens, output.finish_reason) == (7, "length")


def test_an_end_of_text_does_not_stop_while_something_before_it_is_open() -> None:
    net = network("bidirectional")
    decoder = decoder_of(net, block_size=8)
    request = Request(prompt_ids=[5, 9, 12], max_new_tokens=8)
    free = decode(net, [replace(request, early_stop=False)], decoder_of(net, block_size=8))[0]
    first = int(free.step_G.argmin())
    assert first > 0, "the first step finalises a later position"
    use_as_end_of_text(net, int(free.canvas_ids_G[first]))
    output = decode(net, [request], decoder)[0]
    end = free.canvas_ids_G.tolist().index(net.eos_token_id)
    assert output.num_forwards == int(free.step_G[: end + 1].max())


@pytest.mark.parametrize("role", ROLES)
def test_sampling_repeats_per_seed_and_differs_between_seeds(role: Any) -> None:
    net = network(role)
    decoder = decoder_of(net)
    request = Request(prompt_ids=[5, 6, 7], max_new_tokens=16, seed=1, sampling=Sampling(temperature=2.0))
    first, again = (decode(net, [request], decoder)[0].token_ids for _ in range(2))
    assert first == again
    assert decode(net, [replace(request, seed=2)], decoder)[0].token_ids != first


def test_other_policies_run_in_the_block_decoder() -> None:
    net = network()
    for policy in (Factor(), FixedCount(num_tokens=3)):
        output = decode(net, [Request(prompt_ids=[5], max_new_tokens=8)], decoder_of(net, policy=policy))[0]
        assert output.num_tokens == 8
    with pytest.raises(FewstepError, match="no step schedule"):
        decoder_of(net, policy=EvenSplit())


# Infilling


def test_infilling_keeps_what_is_given_and_fills_the_rest() -> None:
    net = network("bidirectional")
    mask_id = 2
    canvas = [mask_id, 7, mask_id, mask_id, 9, 10, 11, 12, 13, 14, mask_id]
    output = decode(net, [Request(prompt_ids=[5, 6], canvas=canvas)], decoder_of(net))[0]
    given = [i for i, token in enumerate(canvas) if token != mask_id]
    assert [output.token_ids[i] for i in given] == [canvas[i] for i in given]
    assert mask_id not in output.token_ids
    assert output.num_tokens == output.num_forwards == 4, "the block that is all given takes no pass"
    assert (output.step_G[given] == 0).all()


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_infilling_equals_a_plain_loop_over_full_attention(shift: bool) -> None:
    net = network("bidirectional", right_shift_logits=shift)
    canvas = [2, 7, 2, 2, 9, 10, 2, 12]
    tokens = [5, 6, *canvas]
    while 2 in tokens:
        with torch.no_grad():
            visible = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool)
            logits = net.module(torch.tensor([tokens]), attention_mask=visible).logits[0]
        logits = logits.roll(1, 0) if shift else logits
        logits[:, 2] = float("-inf")
        logits[:-1, net.eos_token_id] = float("-inf")  # the last token is given
        best = logits.softmax(-1).max(-1)
        opened = [p for p, token in enumerate(tokens) if token == 2]
        block = [p for p in opened if (p - 2) // BLOCK == (opened[0] - 2) // BLOCK]
        position = max(block, key=lambda p: float(best.values[p]))
        tokens[position] = int(best.indices[position])
    assert decode(net, [Request(prompt_ids=[5, 6], canvas=canvas)], decoder_of(net))[0].token_ids == tokens[2:]


def test_infilling_ends_no_text_before_what_is_given() -> None:
    net = network("bidirectional")
    with torch.no_grad():  # the end-of-text is by far the most probable token everywhere
        net.module.get_output_embeddings().weight[net.eos_token_id] = 0
        hidden_size = net.module.config.hidden_size
        head = torch.nn.Linear(hidden_size, net.vocab_size)
        head.weight, head.bias.data = net.module.get_output_embeddings().weight, torch.zeros(net.vocab_size)
        head.bias[net.eos_token_id] = 1000.0
        net.module.set_output_embeddings(head)
    canvas = [2, 2, 7, 2, 2]
    output = decode(net, [Request(prompt_ids=[5, 6], canvas=canvas)], decoder_of(net))[0]
    assert net.eos_token_id not in output.token_ids[:2]
    assert output.token_ids[3:] == [net.eos_token_id] * 2
    assert decode(net, [Request(prompt_ids=[5, 6], max_new_tokens=4)], decoder_of(net))[0].num_tokens == 1


def test_infilling_can_begin_with_the_first_token_and_ignores_an_end_of_text() -> None:
    net = network("bidirectional")
    canvas = [2, net.eos_token_id, 2, 8]
    output = decode(net, [Request(prompt_ids=[], canvas=canvas)], decoder_of(net))[0]
    assert len(output.token_ids) == 4
    assert (output.num_tokens, output.num_forwards) == (2, 2)


def test_infilling_and_generating_share_a_batch() -> None:
    net = network("bidirectional")
    mixed = [*requests(3), Request(prompt_ids=[5, 6], canvas=[2, 7, 2, 2, 9, 10, 2])]
    for request, output in zip(mixed, decode(net, mixed, decoder_of(net)), strict=True):
        same(output, decode(net, [request], decoder_of(net))[0])


def test_infilling_is_refused_where_it_has_no_meaning() -> None:
    for role in ("autoregressive", "block_causal"):
        net = network(role)
        with pytest.raises(FewstepError, match="cannot infill"):
            decode(net, [Request(prompt_ids=[5], canvas=[2])], decoder_of(net))
    net = network("bidirectional")
    with pytest.raises(FewstepError, match="nothing to fill in"):
        decode(net, [Request(prompt_ids=[5], canvas=[7])], decoder_of(net))


# Records, listeners, streams


@pytest.mark.parametrize("role", ROLES)
def test_recorded_rows_rebuild_the_distributions(role: Any) -> None:
    net = network(role)
    record = Record(hidden=True, top_k=5)
    outputs = decode(net, requests(), decoder_of(net), batch_size=3, record=record)
    for output in outputs:
        assert output.hidden_GD is not None
        assert output.top_k is not None
        kept = output.step_G > 0
        with torch.no_grad():
            probabilities = net.head(output.hidden_GD).softmax(-1)
        of_token = probabilities.gather(-1, output.canvas_ids_G[:, None])[:, 0]
        torch.testing.assert_close(of_token[kept], output.confidence_G[kept], atol=1e-5, rtol=1e-4)
        if net.role.name != "autoregressive":
            assert torch.equal(output.top_k.ids_GK[kept, 0], output.canvas_ids_G[kept])
        mass = output.top_k.log_probs_GK.exp().sum(-1) + output.top_k.tail_mass_G
        torch.testing.assert_close(mass[kept], torch.ones_like(mass[kept]))


def test_outputs_can_be_trained_on() -> None:
    """Loops run in inference mode, whose tensors autograd refuses."""
    net = network()
    output = decode(net, requests(1), decoder_of(net), record=Record(hidden=True, top_k=3))[0]
    assert output.hidden_GD is not None
    assert output.top_k is not None
    tensors = [output.hidden_GD, output.canvas_ids_G, output.step_G, output.confidence_G]
    for tensor in (*tensors, *vars(output.top_k).values()):
        assert not tensor.is_inference()


def test_nothing_is_recorded_unless_asked_for() -> None:
    net = network()
    output = decode(net, requests(1), decoder_of(net))[0]
    assert output.hidden_GD is None
    assert output.top_k is None


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_a_recorded_row_is_that_of_an_uncached_forward_at_that_step(shift: bool) -> None:
    net = network("bidirectional", right_shift_logits=shift)
    request = Request(prompt_ids=[5, 6, 7], max_new_tokens=8)
    output = decode(net, [request], decoder_of(net), record=Record(hidden=True))[0]
    assert output.hidden_GD is not None
    for position in (1, 6):
        state = torch.where(output.step_G < output.step_G[position], output.canvas_ids_G, 2)
        tokens = torch.cat([torch.tensor(request.prompt_ids), state])[None]
        visible = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
        with torch.no_grad():
            rows = net.module.base_model(tokens, attention_mask=visible).last_hidden_state[0]
        torch.testing.assert_close(output.hidden_GD[position], rows[3 + position - shift], atol=1e-4, rtol=1e-4)


def test_with_shifted_logits_the_clean_row_before_a_block_settles_its_first_position_at_once() -> None:
    net = network("shifted block_causal")
    request = Request(prompt_ids=[5, 6, 7, 8, 9], max_new_tokens=12)
    output = decode(net, [request], decoder_of(net), record=Record(hidden=True))[0]
    assert output.hidden_GD is not None
    several = 0
    for position in (0, 4, 8):
        tokens = [*request.prompt_ids, *output.canvas_ids_G[:position].tolist()]
        every = range(len(tokens))
        visible = torch.tensor([[reads("causal", 5, q, k) for k in every] for q in every])
        with torch.no_grad():
            rows = net.module.base_model(torch.tensor([tokens]), attention_mask=visible[None, None]).last_hidden_state
        torch.testing.assert_close(output.hidden_GD[position], rows[0, -1], atol=1e-4, rtol=1e-4)
        assert output.step_G[position] == output.step_G[position : position + 4].min()
        several += int(output.step_G[position] < output.step_G[position : position + 4].max())
    assert several, "blocks that take several steps, or the test shows little"


def test_a_teacher_whose_context_is_causal_settles_its_first_position_at_once() -> None:
    net = network("shifted bidirectional", context_attention="causal")
    request = Request(prompt_ids=[5, 6, 7], max_new_tokens=8)
    output = decode(net, [request], decoder_of(net))[0]
    assert output.step_G[0] == 1
    assert sorted(output.step_G[output.step_G > 0].tolist()) == list(range(1, output.num_forwards + 1))


@pytest.mark.parametrize("role", ROLES)
def test_streamed_events_equal_the_output(role: Any) -> None:
    net, request, _ = with_common_end_of_text(role)
    events, output = streamed(net, request, decoder_of(net))
    same(output, decode(net, [request], decoder_of(net))[0])
    assert [event.step for event in events] == sorted(event.step for event in events)
    assert len({event.position for event in events}) == len(events)
    by_position = {event.position: event for event in events}
    assert [by_position[i].token_id for i in range(output.num_tokens)] == output.token_ids
    assert [by_position[i].step for i in range(output.num_tokens)] == output.step_G[: output.num_tokens].tolist()


def test_listeners_see_every_round() -> None:
    net = network()
    seen: list[Tensor] = []

    def listen(state: State) -> None:
        seen.append((state.step_RL > 0).sum(1))

    outputs = decode(net, requests(3), decoder_of(net), listeners=[listen])
    assert len(seen) == max(output.num_forwards for output in outputs)
    assert all((later >= earlier).all() for earlier, later in pairwise(seen))


def test_outputs_are_announced_as_they_complete_and_returned_in_order() -> None:
    net = network()
    announced: dict[int, Output] = {}
    outputs = decode(net, requests(), decoder_of(net), batch_size=2, on_output=announced.__setitem__)
    assert sorted(announced) == list(range(8))
    assert list(announced) != sorted(announced), "longest first"
    assert [announced[i] for i in range(8)] == outputs


# Bad input


def test_a_role_that_cannot_run_a_decoder_is_named() -> None:
    net = network("bidirectional")
    with pytest.raises(FewstepError, match="which the block decoder cannot run; it needs block_causal"):
        decode(net, requests(1), Block(role=net.role))


@pytest.mark.parametrize("role", ROLES)
def test_requests_that_cannot_run_are_refused(role: Any) -> None:
    net = network(role, max_positions=32)
    decoder = decoder_of(net)
    with pytest.raises(FewstepError, match="exceed the 32 positions"):
        decode(net, [Request(prompt_ids=[5] * 30, max_new_tokens=8)], decoder)
    with pytest.raises(FewstepError, match="max_new_tokens must be at least 1"):
        decode(net, [Request(prompt_ids=[5], max_new_tokens=0)], decoder)
    with pytest.raises(FewstepError, match="batch_size"):
        decode(net, requests(1), decoder, batch_size=0)
    if role == "bidirectional":
        large = decoder_of(net, block_size=33)
        with pytest.raises(FewstepError, match="block_size 33 exceeds the 32 positions"):
            decode(net, [Request(prompt_ids=[5], max_new_tokens=4)], large)
    if decoder.traits.cached:
        with pytest.raises(FewstepError, match="prompt is empty"):
            decode(net, [Request(prompt_ids=[], max_new_tokens=8)], decoder)
    assert decode(net, [], decoder) == []


def test_open_positions_are_marked_in_a_stopped_output() -> None:
    net, request, _ = with_common_end_of_text("block_causal")
    output = decode(net, [request], decoder_of(net))[0]
    left_open = output.step_G == NEVER
    assert left_open.any()
    assert (output.canvas_ids_G[left_open] == net.role.mask_token_id).all()
