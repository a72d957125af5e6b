"""Decoders of causal networks that guess: each equals autoregressive decoding, and counts, stops and refuses as it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.generators import streamed
from helpers.networks import disturbed, network, requests, same, use_as_end_of_text
from torch._subclasses.fake_tensor import FakeTensorMode

import fewstep
from fewstep.cli.main import main
from fewstep.decode.admission import positions_needed
from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.decoder import Decoder, Shape
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.jacobi_windows import jacobi_trajectories
from fewstep.decode.lookahead import NO_TOKEN, Lookahead, LookaheadState, _gathered
from fewstep.decode.loop import Loop, decode, run_pass
from fewstep.decode.medusa import Medusa, _best_paths, _typical
from fewstep.decode.prompt_lookup import PromptLookup, look_up
from fewstep.decode.registry import DECODERS
from fewstep.decode.requests import Output, Record, Request
from fewstep.decode.sampling import Sampling
from fewstep.decode.speculative import Speculative
from fewstep.decode.state import NEVER
from fewstep.decode.tree import ROOT, Tree, along, longest_path, tree_plan
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.medusa import MedusaHeads, load_heads, save_heads
from fewstep.models.network import Network, Scores
from fewstep.models.tiny import tiny_network

LONG = 100
"""New tokens after which random networks repeat themselves, so that guesses come true."""


def causal_network(**options: Any) -> Network:
    net = network("autoregressive", **options)
    use_as_end_of_text(net, 61)
    return net


@pytest.fixture(scope="module")
def net() -> Network:
    return causal_network()


@pytest.fixture(scope="module")
def draft() -> Network:
    """A network that agrees with `net` sometimes: the same one, disturbed."""
    return disturbed(causal_network())


MAKERS: dict[str, Callable[..., Decoder]] = {
    "jacobi": lambda net, draft, **more: Jacobi(role=net.role, window=5, **more),
    "jacobi, one token": lambda net, draft, **more: Jacobi(role=net.role, window=1, **more),
    "jacobi, long windows": lambda net, draft, **more: Jacobi(role=net.role, window=40, **more),
    "jacobi, fixed windows": lambda net, draft, **more: Jacobi(role=net.role, window=5, fixed_windows=True, **more),
    "jacobi from n-grams": lambda net, draft, **more: Jacobi(
        role=net.role, window=6, ngram=2, fixed_windows=True, **more
    ),
    "jacobi from n-grams, sliding": lambda net, draft, **more: Jacobi(role=net.role, window=6, ngram=2, **more),
    "prompt-lookup": lambda net, draft, **more: PromptLookup(role=net.role, **more),
    "speculative": lambda net, draft, **more: Speculative(role=net.role, draft=draft, window=3, **more),
    "lookahead": lambda net, draft, **more: Lookahead(role=net.role, window=4, ngram=3, **more),
    "lookahead, least": lambda net, draft, **more: Lookahead(role=net.role, window=1, ngram=2, **more),
    "medusa": lambda net, draft, **more: Medusa(role=net.role, heads=MedusaHeads.of(net, 3), window=12, **more),
    "medusa, one guess": lambda net, draft, **more: Medusa(
        role=net.role, heads=MedusaHeads.of(net, 1), window=1, **more
    ),
}
SAMPLING = ("prompt-lookup", "speculative")
NOT_HERE = {
    "autoregressive": "it is what the others are compared with",
    "block": "it does not guess: see test_decoders.py",
    "diffusion": "it does not guess: see test_decoders.py",
    "self-speculative": "its network has a gated adapter: see test_self_speculative.py",
}


@pytest.fixture(params=["jacobi", "jacobi from n-grams", "prompt-lookup", "speculative", "lookahead", "medusa"])
def make(request: pytest.FixtureRequest, net: Network, draft: Network) -> Callable[..., Decoder]:
    return lambda **more: MAKERS[request.param](net, draft, **more)


def test_every_registered_decoder_that_guesses_has_a_maker() -> None:
    """So a new one is compared with the autoregressive decoder, once it has a maker above, or a reason beside it."""
    made = {name.split()[0].rstrip(",") for name in MAKERS}
    assert sorted({*made, *NOT_HERE}) == sorted(DECODERS)
    assert made.isdisjoint(NOT_HERE)


# The same tokens


@pytest.mark.parametrize("batch_size", [8, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_every_decoder_equals_the_autoregressive_one(name: str, net: Network, draft: Network, batch_size: int) -> None:
    wanted = decode(net, requests(), Autoregressive(role=net.role))
    outputs = decode(net, requests(), MAKERS[name](net, draft), batch_size=batch_size)
    for one, other in zip(wanted, outputs, strict=True):
        assert other.token_ids == one.token_ids
        assert (other.num_tokens, other.finish_reason) == (one.num_tokens, one.finish_reason)
        assert torch.equal(other.canvas_ids_G, one.canvas_ids_G)
        torch.testing.assert_close(other.confidence_G, one.confidence_G, atol=1e-4, rtol=1e-3)
        assert other.num_forwards <= one.num_forwards


def test_guesses_that_come_true_save_passes(net: Network, draft: Network) -> None:
    """Random networks end up repeating themselves, which all but Jacobi windows and untrained heads can foresee."""
    request = Request(prompt_ids=[5, 6, 7], max_new_tokens=LONG)
    wanted = decode(net, [request], Autoregressive(role=net.role))[0]
    passes = {}
    for name, maker in MAKERS.items():
        output = decode(net, [request], maker(net, draft))[0]
        assert output.token_ids == wanted.token_ids
        passes[name] = output.num_forwards
    for name in ("prompt-lookup", "speculative", "lookahead", "jacobi from n-grams"):
        assert passes[name] < 0.8 * wanted.num_tokens, name
    assert passes["jacobi, one token"] == wanted.num_tokens
    assert passes["jacobi"] <= passes["jacobi, fixed windows"]


def test_a_batch_of_8_equals_each_alone(make: Callable[..., Decoder], net: Network) -> None:
    together = decode(net, requests(), make(), batch_size=8)
    for request, output in zip(requests(), together, strict=True):
        same(output, decode(net, [request], make())[0])


@pytest.mark.parametrize("name", SAMPLING)
def test_sampled_batches_equal_each_alone(name: str, net: Network, draft: Network) -> None:
    decoder, asked = MAKERS[name](net, draft), requests(sampling=Sampling(temperature=0.7, top_k=20))
    for request, output in zip(asked, decode(net, asked, decoder, batch_size=3), strict=True):
        same(output, decode(net, [request], decoder)[0])


def test_a_request_that_joins_late_gets_what_it_gets_early(make: Callable[..., Decoder], net: Network) -> None:
    decoder = make()
    loop = Loop(net, decoder, num_slots=4, length=max(positions_needed(decoder, request) for request in requests()))
    outputs: dict[int, Output] = {}
    for request in requests():
        loop.submit(request)
        for _ in range(2):
            outputs.update(loop.step())
    while loop.busy:
        outputs.update(loop.step())
    for number, request in enumerate(requests()):
        same(outputs[number], decode(net, [request], decoder)[0])


def test_grouping_and_padding_change_nothing(
    make: Callable[..., Decoder], net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decode(net, requests(), make())
    monkeypatch.setattr("fewstep.decode.decoder.FREE_ROWS", 0)
    loop = Loop(net, make(), num_slots=5, length=220)
    numbers = [loop.submit(request) for request in requests()]
    outputs: dict[int, Output] = {}
    while loop.busy:
        outputs.update(loop.step())
    for number, one in zip(numbers, expected, strict=True):
        same(one, outputs[number])


def test_a_result_does_not_depend_on_the_limit(make: Callable[..., Decoder], net: Network) -> None:
    prompt = requests()[3].prompt_ids
    long = decode(net, [Request(prompt_ids=prompt, max_new_tokens=24)], make())[0].token_ids
    for limit in (1, 2, 5, 23):
        output = decode(net, [Request(prompt_ids=prompt, max_new_tokens=limit)], make())[0]
        assert output.token_ids == long[:limit]
        assert len(output.canvas_ids_G) == limit


def test_the_answer_ends_with_the_end_of_text_and_nothing_after_it_is_final() -> None:
    net = causal_network()
    request = Request(prompt_ids=[5, 11, 30], max_new_tokens=30)
    ids = decode(net, [replace(request, early_stop=False)], Autoregressive(role=net.role))[0].canvas_ids_G.tolist()
    use_as_end_of_text(net, next(token for i, token in enumerate(ids) if i >= 5 and token not in ids[:i]))
    wanted = decode(net, [request], Autoregressive(role=net.role))[0]
    assert wanted.finish_reason == "stop"
    for name, maker in MAKERS.items():
        output = decode(net, [request], maker(net, net))[0]
        assert output.token_ids == wanted.token_ids, name
        assert (output.num_tokens, output.finish_reason) == (wanted.num_tokens, "stop")
        assert (output.step_G[: wanted.num_tokens] > 0).all()
        assert (output.step_G[wanted.num_tokens :] == NEVER).all()
        whole = decode(net, [replace(request, early_stop=False)], maker(net, net))[0]
        assert whole.token_ids == wanted.token_ids
        assert whole.canvas_ids_G.tolist() == ids


# Counting, streams, records


def test_streamed_events_equal_the_output(make: Callable[..., Decoder], net: Network) -> None:
    request = requests()[4]
    events, output = streamed(net, request, make())
    same(output, decode(net, [request], make())[0])
    assert [event.position for event in events] == list(range(output.num_tokens))
    assert [event.token_id for event in events] == output.token_ids
    assert [event.step for event in events] == output.step_G.tolist()
    assert events[-1].step == output.num_forwards


def test_a_draft_that_is_the_target_is_always_right(net: Network) -> None:
    decoder = Speculative(role=net.role, draft=net, window=3)
    output = decode(net, [Request(prompt_ids=[5, 6], max_new_tokens=22)], decoder)[0]
    assert output.num_forwards == 6, "four tokens a pass"
    assert output.num_draft_forwards == 18
    sampling = Sampling(temperature=1.5, top_p=0.9)
    output = decode(net, [Request(prompt_ids=[5, 6], max_new_tokens=22, sampling=sampling)], decoder)[0]
    assert output.num_forwards == 6, "p / q is 1"


def test_other_decoders_have_no_draft_passes(net: Network) -> None:
    assert decode(net, requests(1), PromptLookup(role=net.role))[0].num_draft_forwards == 0


@pytest.mark.parametrize("name", ["jacobi", "prompt-lookup", "speculative"])
def test_recorded_rows_rebuild_the_distributions(name: str, net: Network, draft: Network) -> None:
    outputs = decode(net, requests(), MAKERS[name](net, draft), batch_size=3, record=Record(hidden=True))
    for output in outputs:
        assert output.hidden_GD is not None
        with torch.no_grad():
            probabilities = net.head(output.hidden_GD).softmax(-1)
        of_token = probabilities.gather(-1, output.canvas_ids_G[:, None])[:, 0]
        torch.testing.assert_close(of_token, output.confidence_G, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["lookahead", "medusa"])
def test_rows_that_branch_cannot_be_recorded(name: str, net: Network, draft: Network) -> None:
    with pytest.raises(FewstepError, match=f"the {name} decoder cannot record hidden rows"):
        decode(net, requests(1), MAKERS[name](net, draft), record=Record(hidden=True))


# What a step may do


def step_shapes(decoder: Decoder) -> list[Shape]:
    (_, shapes), *_ = decoder.passes(torch.tensor([1, 1]), torch.tensor([30, 30]))
    return list(shapes)


def test_a_step_after_completion_changes_nothing(make: Callable[..., Decoder], net: Network) -> None:
    decoder, request = make(), requests()[3]
    loop = Loop(net, decoder, num_slots=1, length=positions_needed(decoder, request))
    loop.submit(request)
    while loop.busy:
        loop.step()
    networks = {"target": net, **decoder.traits.companions}
    caches = {name: each.new_cache(1, loop.length) for name, each in networks.items()}
    after = loop.state
    with torch.no_grad():
        for shape in step_shapes(decoder):
            accepted, _ = run_pass(networks, decoder, after, caches, shape)
            after = accepted.state
    for name, before in loop.state.tensors().items():
        if name != "drafted_R":
            assert torch.equal(before, after.tensors()[name]), name


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_step_reads_no_value_from_the_device(make: Callable[..., Decoder], net: Network, temperature: float) -> None:
    """On fake tensors, which have shapes and no values, so that any read raises."""
    decoder = make()
    if temperature and decoder.name not in SAMPLING:
        return
    loop = Loop(net, decoder, num_slots=2, length=120)
    loop.submit(requests()[1])
    loop.step()
    networks, shapes = {"target": net, **decoder.traits.companions}, step_shapes(decoder)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        after = loop.state.map(mode.from_tensor)
        caches = {name: each.new_cache(2, loop.length) for name, each in networks.items()}
        for shape in shapes:
            shape = replace(shape, drawing="filtered" if temperature else "greedy")
            accepted, _ = run_pass(networks, decoder, after, caches, shape)
            after = accepted.state
    assert {name: field.shape for name, field in after.tensors().items()} == {
        name: field.shape for name, field in loop.state.tensors().items()
    }


# Sampling


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.8), Sampling(temperature=1.5, top_k=9, top_p=0.9)])
def test_sampled_prompt_lookup_equals_sampled_autoregressive_decoding(net: Network, sampling: Sampling) -> None:
    """The same noise for the same position, so the same tokens, and with them the distribution."""
    wanted = decode(net, requests(sampling=sampling), Autoregressive(role=net.role))
    outputs = decode(net, requests(sampling=sampling), PromptLookup(role=net.role, ngram=1))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in wanted]
    assert sum(output.num_forwards for output in outputs) < sum(output.num_forwards for output in wanted)


# Jacobi


def plain_windows(net: Network, request: Request, first: list[list[int]], size: int) -> list[list[list[int]]]:
    """Jacobi iteration in words of the paper: all tokens of a window replaced at once, by uncached forwards."""
    text, windows = list(request.prompt_ids), []
    for guess in first:
        states = [guess]
        while True:
            with torch.no_grad():
                answers = net.module(torch.tensor([[*text, *states[-1]]])).logits[0].argmax(-1).tolist()
            states.append(answers[len(text) - 1 : len(text) - 1 + len(guess)])
            if states[-1] == states[-2]:
                break
        text += states[-1]
        windows.append(states)
    return windows


@pytest.mark.parametrize("ngram", [None, 2])
def test_trajectories_are_those_of_plain_jacobi_iteration(net: Network, ngram: int | None) -> None:
    size = 6
    decoder = Jacobi(role=net.role, window=size, ngram=ngram, fixed_windows=True)
    announced: dict[int, Any] = {}
    trajectories = jacobi_trajectories(net, requests(), decoder, batch_size=3, on_trajectory=announced.__setitem__)
    assert sorted(announced) == list(range(8))
    for request, trajectory in zip(requests(), trajectories, strict=True):
        same(trajectory.output, decode(net, [request], decoder)[0])
        windows = trajectory.windows
        assert [window.start for window in windows] == list(range(0, request.max_new_tokens, size))
        fixed = torch.cat([window.states_PN[-1] for window in windows]).tolist()
        assert fixed == trajectory.output.token_ids
        assert sum(len(window.states_PN) - 1 for window in windows) == trajectory.output.num_forwards
        plain = plain_windows(net, request, [window.states_PN[0].tolist() for window in windows], size)
        for window, states in zip(windows, plain, strict=True):
            recorded = window.states_PN.tolist()
            # The plain loop needs one more pass to see that nothing changes, unless the last token came last.
            assert recorded == states[: len(recorded)]
            assert states[len(recorded) - 1] == states[-1]
            assert len(recorded) - 1 <= size


def test_a_window_begins_with_tokens_of_the_prompt_that_follow_from_the_seed(net: Network) -> None:
    decoder = Jacobi(role=net.role, window=8)

    def first(seed: int) -> list[int]:
        request = Request(prompt_ids=[20, 21, 22, 23], max_new_tokens=8, seed=seed)
        return jacobi_trajectories(net, [request], decoder)[0].windows[0].states_PN[0].tolist()

    assert first(0) == first(0)
    assert len({tuple(first(seed)) for seed in range(5)}) > 1
    assert set(first(0)) <= {20, 21, 22, 23}


def test_a_trajectory_ends_with_the_answer() -> None:
    net = causal_network()
    request = Request(prompt_ids=[5, 11, 30], max_new_tokens=30)
    ids = decode(net, [request], Autoregressive(role=net.role))[0].token_ids
    use_as_end_of_text(net, next(token for i, token in enumerate(ids) if i >= 9 and token not in ids[:i]))
    trajectory = jacobi_trajectories(net, [request], Jacobi(role=net.role, window=8))[0]
    assert trajectory.output.finish_reason == "stop"
    assert sum(window.states_PN.shape[1] for window in trajectory.windows) == trajectory.output.num_tokens
    assert trajectory.windows[-1].states_PN[-1, -1] == net.eos_token_id
    assert jacobi_trajectories(net, [], Jacobi(role=net.role)) == []


# Prompt lookup


def looked_up(text: list[int], ngram: int, count: int = 4) -> tuple[list[int], bool]:
    tokens = torch.tensor([[*text, 99, 99]])
    guesses, found = look_up(tokens, torch.tensor([len(text)]), ngram, count)
    return guesses[0].tolist(), bool(found[0])


@pytest.mark.parametrize(
    ("text", "ngram", "guesses"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 2, [3, 4, 5, 1]),
        ([1, 2, 3, 9, 2, 4, 9, 1, 2], 2, [3, 9, 2, 4]),  # two tokens match, though one matches later
        ([1, 2, 3, 9, 2, 4, 9, 1, 2], 1, [4, 9, 1, 2]),
        ([7, 5, 6, 7, 8, 6, 7], 1, [8, 6, 7, 8]),  # of equal matches the latest; what runs out is repeated
        ([3, 3], 3, [3, 3, 3, 3]),
    ],
)
def test_the_longest_and_then_latest_match_is_continued(text: list[int], ngram: int, guesses: list[int]) -> None:
    assert looked_up(text, ngram) == (guesses, True)


def test_no_match_is_said() -> None:
    assert not looked_up([1, 2, 3], 3)[1]
    assert not looked_up([1], 3)[1]


# Trees


TREE = Tree((0, 0, 1, 1, 2, 3, 0))


def test_a_tree_knows_its_paths() -> None:
    layout = TREE.on(torch.device("cpu"))
    assert TREE.path(6) == [ROOT, 1, 3, 6]
    assert TREE.depth == 3
    assert layout.depth_N.tolist() == [0, 1, 1, 2, 2, 2, 3, 1]
    assert layout.ancestors_TT[5].tolist() == [True, False, True, False, False, True, False]
    assert layout.paths_NS[3].tolist() == [0, 1, 3, 3]


def test_every_row_of_a_tree_scores_as_its_path_alone(net: Network) -> None:
    decoder = Autoregressive(role=net.role)
    loop = Loop(net, decoder, num_slots=8, length=max(positions_needed(decoder, one) for one in requests()) + 8)
    for request in requests():
        loop.submit(request)
    for _ in range(4):
        loop.step()
    guesses_RT = torch.randint(5, 60, (8, 7), generator=torch.Generator().manual_seed(0))
    every = tuple(range(1, 8))
    plan = tree_plan("tree", loop.state, net.role, width=3, tree=TREE, guesses_RT=guesses_RT, scored=every)
    cache = loop._caches["target"]
    with torch.no_grad():
        for _ in range(2):  # the second time over what the first left in the slots
            scores = net.score(plan, cache)
        for r in range(8):
            text = loop.state.tokens_RL[r, : loop.state.front_R[r]].tolist()
            for node in range(8):
                path = [int(guesses_RT[r, step - 1]) for step in TREE.path(node)[1:]]
                expected = net.module(torch.tensor([text + path])).logits[0, -1]
                torch.testing.assert_close(scores.logits_RSV[r, node], expected, atol=1e-3, rtol=1e-3)


def test_the_longest_right_path_wins() -> None:
    def best(*right: int) -> tuple[list[int], int]:
        right_RT = torch.tensor([[number in right for number in range(1, 8)]])
        path, depth = longest_path(TREE, right_RT)
        return path[0].tolist(), int(depth[0])

    assert best() == ([0, 0, 0, 0], 0)
    assert best(1, 3, 6) == ([0, 1, 3, 6], 3)
    assert best(3, 6, 7) == ([0, 7, 7, 7], 1)  # 3 and 6 follow a wrong one
    assert best(1, 2, 5) == ([0, 2, 5, 5], 2)
    scores = Scores(torch.arange(8.0)[None, :, None], torch.arange(8.0)[None, :, None] * 10)
    assert along(torch.tensor([[0, 2, 5, 5]]), scores).hidden_RSD.flatten().tolist() == [0, 20, 50, 50]


# Lookahead


def test_the_window_of_lookahead_is_a_tree_of_columns_under_the_first_level(net: Network) -> None:
    decoder = Lookahead(role=net.role, window=3, ngram=4)
    tree, chained = decoder.tree, 9
    assert decoder.chains.parents == (0, 1, 2, 0, 4, 5, 0, 7, 8)
    assert tree.num_guesses == chained + 9
    # The third column of the last level: level 0 up to its column, then its own column.
    assert tree.path(chained + 9) == [0, chained + 1, chained + 2, chained + 3, chained + 6, chained + 9]
    assert tree.path(chained + 7) == [0, chained + 1, chained + 4, chained + 7]


def test_new_n_grams_go_into_the_pool_once_and_the_window_moves_on(net: Network) -> None:
    decoder = Lookahead(role=net.role, window=3, ngram=3)
    loop = Loop(net, decoder, num_slots=1, length=60)
    loop.submit(Request(prompt_ids=[5], max_new_tokens=4))
    loop.step()
    state = loop.state
    assert isinstance(state, LookaheadState)
    pool = torch.full_like(state.pool_RPN, NO_TOKEN)
    pool[0, :2] = torch.tensor([[10, 20, 30], [8, 8, 8]])
    state = replace(
        state, branch_RMW=torch.tensor([[[10, 11, 10], [20, 21, 20]]]), pool_RPN=pool, cursor_R=torch.tensor([2])
    )
    after = _gathered(state, torch.tensor([[30, 31, 30]]), torch.tensor([2]))
    kept: list[list[int]] = [ngram for ngram in after.pool_RPN[0].tolist() if ngram[0] != NO_TOKEN]
    assert kept == [[8, 8, 8], [11, 21, 31], [10, 20, 30]], "one of each, where it was last seen"
    assert after.cursor_R.item() == 5
    assert after.branch_RMW[0].tolist() == [[21, 20, 20], [31, 30, 30]], "up a level, and a column further"


def test_n_grams_that_begin_with_the_last_token_are_verified_latest_first(net: Network) -> None:
    decoder = Lookahead(role=net.role, window=2, ngram=3)
    loop = Loop(net, decoder, num_slots=1, length=60)
    loop.submit(Request(prompt_ids=[5, 9], max_new_tokens=4))
    loop.step()
    state = loop.state
    assert isinstance(state, LookaheadState)
    last = int(state.tokens_RL[0, state.front_R[0] - 1])
    pool = torch.full_like(state.pool_RPN, NO_TOKEN)
    pool[0, -1], pool[0, 0], pool[0, 1], pool[0, 2] = (
        torch.tensor(ngram) for ngram in ([last, 40, 41], [last, 42, 43], [last + 1, 44, 45], [last, 46, 47])
    )
    state = replace(state, pool_RPN=pool, cursor_R=torch.tensor([2]))  # place 2 is the oldest
    assert decoder._candidates(state).tolist() == [[42, 43, 40, 41]]


# Medusa


def memoryless_network() -> Network:
    """The next token follows from the last one alone, and every token has a row of its own."""
    net = tiny_network("autoregressive", hidden=64, layers=1, head_scale=20)
    use_as_end_of_text(net, 61)
    with torch.no_grad():
        layer = net.module.base_model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return net


def perfect_heads(net: Network, num_heads: int) -> MedusaHeads:
    """Heads of `memoryless_network` that are always right, solved for."""
    with torch.no_grad():
        rows_VD = net.module.base_model(torch.arange(64)[:, None]).last_hidden_state[:, 0]
        follows_V = net.head(rows_VD).argmax(-1)
        heads, then_V = MedusaHeads.of(net, num_heads), follows_V
        for head in heads.heads:
            then_V = follows_V[then_V]
            head.output.weight.copy_((rows_VD.pinverse() @ torch.eye(64)[then_V]).T)  # type: ignore[union-attr]
    return heads


def test_medusa_takes_all_that_its_heads_foresee() -> None:
    net = memoryless_network()
    request = Request(prompt_ids=[5, 9, 30], max_new_tokens=17)
    wanted = decode(net, [request], Autoregressive(role=net.role))[0]
    decoder = Medusa(role=net.role, heads=perfect_heads(net, 3), window=20)
    output = decode(net, [request], decoder)[0]
    assert output.token_ids == wanted.token_ids
    assert output.step_G.bincount()[1:].tolist() == [1, 4, 4, 4, 4], "the heads speak from the first pass on"


def test_heads_begin_as_the_networks_own(net: Network) -> None:
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    heads = MedusaHeads.of(net, 2)
    with torch.no_grad():
        torch.testing.assert_close(heads(hidden), net.head(hidden)[:, None].expand(-1, 2, -1))
    assert len(heads) == 2


def test_promising_paths_come_first_and_after_what_they_prolong() -> None:
    paths = _best_paths(2, 3, 100)
    assert set(paths) == {(a,) for a in range(3)} | {(a, b) for a in range(3) for b in range(3)}
    assert paths[:2] == ((0,), (0, 0))
    assert all(path[:-1] in ((), *paths[:i]) for i, path in enumerate(paths))
    assert _best_paths(4, 10, 5) == _best_paths(4, 10, 50)[:5]


def test_typical_acceptance_asks_less_where_much_is_possible() -> None:
    uniform, sharp = torch.zeros(4), torch.tensor([5.0, 3.0, 0.0, 0.0])
    logits_RTV = torch.stack([uniform, sharp, sharp])[None]
    # Uniform over four: 0.25 > sqrt(0.3) / 4. Sharp: 0.12, where 0.3 is needed (the entropy asks for 0.34).
    assert _typical(logits_RTV, torch.tensor([[2, 0, 1]]), 0.3).tolist() == [[True, True, False]]


def test_typical_acceptance_is_no_slower_and_may_differ(net: Network) -> None:
    heads = MedusaHeads.of(net, 3)
    strict, typical = (
        decode(net, requests(), Medusa(role=net.role, heads=heads, typical=threshold)) for threshold in (None, 0.01)
    )
    assert sum(o.num_forwards for o in typical) < sum(o.num_forwards for o in strict)
    assert [o.token_ids for o in typical] != [o.token_ids for o in strict]


def test_heads_are_saved_for_their_network_alone(net: Network, tmp_path: Path) -> None:
    heads = MedusaHeads.of(net, 2)
    with torch.no_grad():
        heads.heads[0].residual.weight.fill_(0.5)  # type: ignore[union-attr]
    save_heads(heads, tmp_path / "heads", net)
    loaded = load_heads(tmp_path / "heads", net)
    for name, tensor in heads.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.bfloat16().float())

    with pytest.raises(FewstepError, match="rows of width 32"):
        load_heads(tmp_path / "heads", causal_network(hidden=64))
    with pytest.raises(FewstepError, match="trained for other weights"):
        load_heads(tmp_path / "heads", causal_network(seed=7))
    with pytest.raises(FewstepError, match="no Medusa heads"):
        load_heads(tmp_path, net)
    (tmp_path / "heads" / "medusa.safetensors").write_bytes(b"damaged")
    with pytest.raises(FewstepError, match="cannot load the Medusa heads"):
        load_heads(tmp_path / "heads", net)


# Bad input


def test_greedy_decoders_refuse_to_sample(net: Network) -> None:
    for name in ("jacobi", "lookahead"):
        with pytest.raises(FewstepError, match=f"the {name} decoder is greedy only"):
            LanguageModel(net).decoder(decoder=name, temperature=0.5)
    with pytest.raises(FewstepError, match="greedy only"):
        decode(
            net, requests(1, sampling=Sampling(temperature=1.0)), Medusa(role=net.role, heads=MedusaHeads.of(net, 1))
        )


def test_a_draft_of_another_vocabulary_is_refused(net: Network) -> None:
    other = causal_network(vocab_size=70)
    with pytest.raises(FewstepError, match="another vocabulary"):
        decode(net, requests(1), Speculative(role=net.role, draft=other))
    with pytest.raises(FewstepError, match="a draft model must be causal or block-causal"):
        decode(net, requests(1), Speculative(role=net.role, draft=tiny_network("bidirectional")))
    short = causal_network(max_positions=16)
    with pytest.raises(FewstepError, match="exceed the 16 positions"):
        decode(net, requests(8), Speculative(role=net.role, draft=short))


@pytest.mark.parametrize("kind", [Jacobi, PromptLookup])
def test_guesses_past_the_end_leave_a_dynamic_rotary_embedding_alone(kind: Any) -> None:
    """Its frequencies depend on the largest position of a forward."""
    net = tiny_network("autoregressive", head_scale=20, max_positions=64)
    config = copy.deepcopy(net.module.config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    module = type(net.module)(config)
    module.load_state_dict(net.module.state_dict())
    net = Network(module, net.role, net.tokenizer)
    request = Request(prompt_ids=list(range(5, 29)), max_new_tokens=40, early_stop=False)
    expected = decode(net, [request], Autoregressive(role=net.role))[0]
    assert decode(net, [request], kind(role=net.role))[0].token_ids == expected.token_ids


def test_a_request_that_fits_nowhere_is_refused_before_anything_is_allocated(net: Network) -> None:
    never = mock.patch.object(Network, "new_cache", side_effect=AssertionError)
    with never, pytest.raises(FewstepError, match="exceed the 256 positions"):
        decode(net, [Request(prompt_ids=[5], max_new_tokens=1 << 40)], Jacobi(role=net.role))


def test_a_window_longer_than_the_room_is_refused(net: Network) -> None:
    decoder = Jacobi(role=net.role, window=100)
    assert decode(net, [Request(prompt_ids=[5] * 156, max_new_tokens=2)], decoder)[0].num_tokens == 2
    with pytest.raises(FewstepError, match="guesses 100 positions ahead, and the prompt leaves 99 of the 256"):
        decode(net, [Request(prompt_ids=[5] * 157, max_new_tokens=2)], decoder)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"decoder": "jacobi", "window": 0}, "window must be at least 1"),
        ({"decoder": "lookahead", "ngram": 1}, "ngram must be at least 2"),
        ({"decoder": "speculative"}, "needs a draft"),
        ({"decoder": "medusa"}, "needs heads"),
        ({"decoder": "autoregressive", "window": 4}, "takes no window"),
        ({"decoder": "speculative", "ngram": 4}, "takes no ngram"),
        ({"decoder": "jacobi", "threshold": 0.5}, "takes no threshold"),
        ({"decoder": "speculative", "draft": "gsm-teacher"}, "must be causal or block-causal"),
        ({"decoder": "speculative", "draft": "gsm-ar"}, "another vocabulary"),
        ({"decoder": "medusa", "heads": "nowhere"}, "no Medusa heads in nowhere"),
        ({"decoder": "block"}, "a causal model cannot run the block decoder"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], complaint: str, net: Network) -> None:
    with pytest.raises(FewstepError, match=complaint):
        LanguageModel(net).decoder(**settings)


def test_other_roles_are_refused() -> None:
    student = tiny_network("block_causal")
    with pytest.raises(FewstepError, match="which the jacobi decoder cannot run; it needs autoregressive"):
        decode(student, requests(1), Jacobi(role=student.role))


def test_there_is_no_infilling(net: Network) -> None:
    with pytest.raises(FewstepError, match="the lookahead decoder cannot infill"):
        decode(net, [Request(prompt_ids=[5], canvas=[2])], Lookahead(role=net.role))


# The bundled model, and the command line

QUESTIONS = ["Tom has 3 boxes of 4 apples and eats 2. How many are left?", "A pen costs $2. What do 7 pens cost?"]


@pytest.fixture(scope="module")
def bundled() -> LanguageModel:
    return fewstep.load("gsm-ar", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def plain(bundled: LanguageModel) -> list[Output]:
    return bundled.generate(QUESTIONS, max_new_tokens=40)


@pytest.mark.parametrize("name", ["jacobi", "lookahead", "prompt-lookup", "speculative", "medusa"])
def test_the_bundled_model_gives_the_same_answers_in_fewer_passes(
    name: str, bundled: LanguageModel, plain: list[Output], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"decoder": name, "max_new_tokens": 40}
    if name == "speculative":
        settings["draft"] = "gsm-ar"
    if name == "medusa":
        save_heads(MedusaHeads.of(bundled.network, 2), tmp_path / "heads", bundled.network)
        settings |= {"heads": str(tmp_path / "heads"), "window": 8}
    outputs = bundled.generate(QUESTIONS, **settings)
    assert [output.text for output in outputs] == [output.text for output in plain]
    assert sum(o.num_forwards for o in outputs) < sum(o.num_forwards for o in plain)
    stream = bundled.stream(QUESTIONS[0], **settings)
    assert "".join(event.text for event in stream).replace("<eos>", "").strip() == plain[0].text.strip()


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["generate", *arguments])
    assert not stop.value.code
    return capsys.readouterr().out


def test_iterations_are_shown_as_rows(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "gsm-ar", "--device", "cpu", "--max-new-tokens", "20"]
    shown = printed(capsys, *options, "--decoder", "jacobi", "--window", "8", "--show-iterations", QUESTIONS[1])
    assert shown.endswith("\n\n" + printed(capsys, *options, QUESTIONS[1])), "the answer is the usual one"
    lines = shown.splitlines()
    assert lines[0].startswith("tokens 1 to 8, ")
    assert lines[1].startswith("   0  ")
    assert "[" in lines[1], "guesses at random are wrong"
    last = lines[lines.index(next(line for line in lines if line.startswith("tokens 9"))) - 1]
    assert last.endswith("|"), "the fixed point"
    assert "[" not in last


def test_iterations_are_those_of_jacobi_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    for options, complaint in (
        (["hello"], "add --decoder jacobi"),
        (["--input", "a.jsonl", "--output", "b.jsonl"], "leave out --input"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["generate", "--model", "gsm-ar", "--show-iterations", *options])
        assert stop.value.code == 2
        assert complaint in capsys.readouterr().err
