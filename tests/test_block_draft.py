"""A block-causal network drafts for `speculative`: the texts are those of autoregressive decoding, in fewer passes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.generators import streamed
from helpers.networks import block_draft_of

from fewstep.cli.main import main
from fewstep.decode.admission import positions_needed
from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.loop import Loop, decode, run_pass
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import Sampling
from fewstep.decode.speculative import Speculative
from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.models.load import save_network
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.tasks.registry import task_named

REQUESTS = [Request(prompt_ids=[3, *range(10, 12 + i % 5), 4], max_new_tokens=20 + i, seed=i) for i in range(7)]
SAMPLINGS = [Sampling(), Sampling(temperature=0.8), Sampling(temperature=1.2, top_k=20, top_p=0.9)]
MIXED = [replace(one, sampling=SAMPLINGS[i % 3], early_stop=i % 2 == 0) for i, one in enumerate(REQUESTS)]


@pytest.fixture(scope="module")
def target() -> Network:
    return tiny_network("autoregressive", head_scale=20)


def token_ids(outputs: list[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize(
    ("context_attention", "shift", "batch_size", "window"),
    [("bidirectional", False, 3, 6), ("block_causal", True, 8, 3), ("causal", True, 3, 6), ("causal", False, 2, 1)],
)
def test_texts_are_those_of_autoregressive_decoding_with_the_same_seed(
    target: Network, context_attention: Any, shift: bool, batch_size: int, window: int
) -> None:
    draft = block_draft_of(target, head_scale=20, context_attention=context_attention, right_shift_logits=shift)
    wanted = decode(target, MIXED, Autoregressive(role=target.role))
    decoder = Speculative(role=target.role, draft=draft, window=window)
    outputs = decode(target, MIXED, decoder, batch_size=batch_size)
    assert token_ids(outputs) == token_ids(wanted)
    assert [output.finish_reason for output in outputs] == [output.finish_reason for output in wanted]


def test_requests_that_join_and_leave_get_what_they_get_alone(target: Network) -> None:
    decoder = Speculative(
        role=target.role, draft=block_draft_of(target, head_scale=20, right_shift_logits=True), window=5
    )
    loop = Loop(target, decoder, num_slots=3, length=max(positions_needed(decoder, one) for one in MIXED))
    outputs: dict[int, Output] = {}
    for request in MIXED:
        loop.submit(request)
        outputs.update(loop.step())
    while loop.busy:
        outputs.update(loop.step())
    for number, request in enumerate(MIXED):
        alone = decode(target, [request], decoder)[0]
        assert outputs[number].token_ids == alone.token_ids
        assert outputs[number].num_forwards == alone.num_forwards


def test_passes_of_both_networks_count_and_streams_tell_them(target: Network) -> None:
    decoder = Speculative(role=target.role, draft=block_draft_of(target, head_scale=20), window=5)
    told, output = streamed(target, REQUESTS[0], decoder)
    assert (output.num_forwards % 2, output.num_draft_forwards) == (0, 0)
    assert set(output.step_G[: output.num_tokens].tolist()) == set(range(2, output.num_forwards + 1, 2))
    assert [event.token_id for event in told] == output.token_ids
    assert [event.step for event in told] == output.step_G[: output.num_tokens].tolist()
    assert told[-1].step == output.num_forwards


def test_a_draft_sees_the_text_and_its_own_masks_and_scores_each_of_them(target: Network) -> None:
    """The guesses of every cycle are those of one plain forward of [text so far | masks]."""
    for shift in (False, True):
        draft = block_draft_of(target, head_scale=20, context_attention="causal", right_shift_logits=shift)
        decoder, request = Speculative(role=target.role, draft=draft, window=6), REQUESTS[3]
        guessed: list[tuple[list[int], list[int]]] = []

        def look(networks: Any, plan_of: Any, state: Any, caches: Any, shape: Any) -> Any:
            accepted, scores = run_pass(networks, plan_of, state, caches, shape)
            if shape.kind == "draft":
                front = int(state.front_R[0])
                guesses = accepted.state.tokens_RL[0, front : front + 6].tolist()
                guessed.append((state.tokens_RL[0, :front].tolist(), guesses))  # noqa: B023
            return accepted, scores

        loop = Loop(target, decoder, num_slots=1, length=positions_needed(decoder, request), run_pass=look)
        loop.submit(request)
        ends = [len(request.prompt_ids)]
        while loop.busy:
            loop.step()
            ends.append(int(loop.state.front_R[0]))
        room = len(request.prompt_ids) + request.max_new_tokens
        for cycle, (text, guesses) in enumerate(guessed):
            starts = [*ends[: cycle + 1]]
            blocks = [*range(starts[0]), *(max(s for s in starts if s <= p) for p in range(starts[0], len(text)))]
            num_masks = min(6, room - len(text))
            blocks += [len(text)] * num_masks
            sees = torch.tensor(blocks)[None] <= torch.tensor(blocks)[:, None]
            tokens = torch.tensor([text + [2] * num_masks])
            with torch.no_grad():
                hidden = draft.module.base_model(
                    tokens, attention_mask=sees[None, None], position_ids=torch.arange(len(blocks))[None]
                ).last_hidden_state[0]
            first = len(text) - shift
            best = draft.head(hidden[first : first + num_masks]).argmax(-1).tolist()
            assert guesses[:num_masks] == best


def test_the_window_is_the_block_of_the_draft_unless_set(target: Network) -> None:
    draft = block_draft_of(target, head_scale=20, block_size=8)
    assert Speculative(role=target.role, draft=draft).traits.num_guessed == 8
    assert Speculative(role=target.role, draft=target).traits.num_guessed == 4


def test_the_bundled_student_drafts_for_the_causal_model(tmp_path: Path) -> None:
    lm = load("gsm-ar", dtype="float32", device="cpu")
    question = task_named("gsm-symbolic").problems("dev", 1)[0].question
    wanted = lm.generate(question, decoder="autoregressive", max_new_tokens=40)
    report = tmp_path / "report.json"
    options = ["--decoder", "speculative", "--draft", "gsm-student", "--max-new-tokens", "40", "--dtype", "float32"]
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "gsm-ar", *options, "--device", "cpu", "--json", str(report), question])
    assert not ended.value.code
    told = json.loads(report.read_text())
    assert told["num_forwards"] <= wanted.num_tokens / 3
    drafted = lm.generate(question, decoder="speculative", draft="gsm-student", max_new_tokens=40)
    assert drafted.text == wanted.text
    assert drafted.num_forwards == told["num_forwards"]


def test_drafts_that_cannot_be_are_one_sentence(target: Network, tmp_path: Path) -> None:
    short = block_draft_of(target, head_scale=20, max_positions=256)
    short.module.config.max_position_embeddings = 23
    with pytest.raises(FewstepError, match="exceed the 23 positions of"):
        decode(target, REQUESTS[:1], Speculative(role=target.role, draft=short))
    few = replace(REQUESTS[0], max_new_tokens=3)
    with pytest.raises(FewstepError, match="guesses 22 positions ahead, and the prompt leaves 19 of the 23 of"):
        decode(target, [few], Speculative(role=target.role, draft=short, window=22))
    with pytest.raises(FewstepError, match="has the role bidirectional; a draft model must be causal or block-causal"):
        decode(target, REQUESTS[:1], Speculative(role=target.role, draft=tiny_network("bidirectional")))
    save_network(tiny_network("block_causal", vocab_size=70), tmp_path / "other")
    with pytest.raises(FewstepError, match="has another vocabulary than"):
        LanguageModel(target).decoder(decoder="speculative", draft=str(tmp_path / "other"))
