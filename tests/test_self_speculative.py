"""A gated adapter: clean rows are the base's, texts those of autoregressive decoding, packed drafts decoded ones."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Run
from helpers.generators import streamed
from helpers.networks import with_random_adapter
from helpers.packed import batch_of
from peft import PeftModel
from torch.testing import assert_close

from fewstep.decode.admission import positions_needed
from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.loop import Loop, decode, run_pass
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import Sampling
from fewstep.decode.self_speculative import SelfSpeculative, SelfSpeculativeState
from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.models.load import load_network, save_network, weights_hash
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.train.causal_records import collect_texts, read_texts
from fewstep.train.draft import DraftObjective, DraftSettings
from fewstep.train.examples import Examples
from fewstep.train.lora import LoRASettings, add_gated_lora
from fewstep.train.records import PromptRow
from fewstep.train.settings import TrainSettings
from fewstep.train.trainer import train

BLOCK = 8
PROMPTS = [[3, *range(10 + i, 13 + i + i % 4), 4] for i in range(7)]
REQUESTS = [Request(prompt_ids=ids, max_new_tokens=20 + i, seed=i) for i, ids in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def base() -> Network:
    return tiny_network("autoregressive", head_scale=20)


@pytest.fixture(scope="module")
def own_texts(base: Network) -> list[Output]:
    return decode(base, REQUESTS, Autoregressive(role=base.role))


def self_speculative(network: Network, **settings: object) -> SelfSpeculative:
    assert network.adapter is not None
    return SelfSpeculative(role=network.role, adapter=network.adapter, **settings)  # type: ignore[arg-type]


CYCLES: list[dict[str, object]] = [
    {"cycle": "two-pass", "window": 5},
    {"cycle": "fused", "window": 1, "branches": 1},
    {"cycle": "fused", "window": 5, "branches": 2},
    {"cycle": "fused", "window": 4, "branches": 9},
]


@pytest.mark.parametrize("settings", CYCLES)
@pytest.mark.parametrize("batch_size", [3, 8])
def test_greedy_texts_are_those_of_autoregressive_decoding(
    own_texts: list[Output], settings: dict[str, object], batch_size: int
) -> None:
    network = with_random_adapter(BLOCK)
    outputs = decode(network, REQUESTS, self_speculative(network, **settings), batch_size=batch_size)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in own_texts]


@pytest.mark.parametrize("settings", CYCLES)
def test_sampled_texts_are_those_of_autoregressive_decoding_with_the_same_seed(
    base: Network, settings: dict[str, object]
) -> None:
    network = with_random_adapter(BLOCK)
    samplings = [Sampling(temperature=0.8, top_k=20), Sampling(), Sampling(temperature=1.2)]
    asked = [replace(request, sampling=samplings[i % 3], early_stop=i < 4) for i, request in enumerate(REQUESTS)]
    wanted = decode(base, asked, Autoregressive(role=base.role))
    outputs = decode(network, asked, self_speculative(network, **settings), batch_size=3)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in wanted]


@pytest.mark.parametrize("settings", CYCLES)
def test_a_text_does_not_depend_on_its_companions(settings: dict[str, object]) -> None:
    """Which join and leave while it is under way."""
    network = with_random_adapter(BLOCK)
    decoder = self_speculative(network, **settings)
    loop = Loop(network, decoder, num_slots=3, length=max(positions_needed(decoder, one) for one in REQUESTS))
    together: dict[int, Output] = {}
    for request in REQUESTS:
        loop.submit(request)
        together.update(loop.step())
    while loop.busy:
        together.update(loop.step())
    for number, request in enumerate(REQUESTS):
        alone = decode(network, [request], decoder)[0]
        assert (alone.token_ids, alone.num_forwards) == (together[number].token_ids, together[number].num_forwards)


def test_auto_tries_every_cycle_and_length_and_gives_the_same_texts(own_texts: list[Output]) -> None:
    network = with_random_adapter(BLOCK)
    decoder = self_speculative(network, cycle="auto", window=6)
    assert decoder.lengths == (6, 3, 2)
    tried: set[str] = set()

    def look(networks: Any, decoding: Any, state: Any, caches: Any, shape: Any) -> Any:
        tried.add(shape.kind)
        return run_pass(networks, decoding, state, caches, shape)

    for _ in range(2):
        room = max(positions_needed(decoder, one) for one in REQUESTS)
        loop, outputs = Loop(network, decoder, num_slots=2, length=room, run_pass=look), dict[int, Output]()
        for request in REQUESTS:
            loop.submit(request)
        while loop.busy:
            outputs.update(loop.step())
        assert [outputs[i].token_ids for i in range(len(REQUESTS))] == [output.token_ids for output in own_texts]
    assert {f"fused {m}, {m}" for m in (6, 3, 2)} <= tried
    assert {f"{kind} {m}" for kind in ("draft", "verify") for m in (6, 3, 2)} <= tried
    assert tried <= set(decoder.parts)
    again = self_speculative(network, cycle="auto", window=6)
    assert again.chooser is decoder.chooser, "what has been learnt is kept with the adapter"


def test_sampled_texts_of_auto_are_those_of_autoregressive_decoding(base: Network) -> None:
    network = with_random_adapter(BLOCK)
    asked = [replace(request, sampling=Sampling(temperature=0.9)) for request in REQUESTS]
    wanted = decode(base, asked, Autoregressive(role=base.role))
    for window in (1, 5):
        outputs = decode(network, asked, self_speculative(network, cycle="auto", window=window), batch_size=4)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in wanted]


def test_a_stream_tells_every_token_with_its_pass() -> None:
    network = with_random_adapter(BLOCK)
    for settings in CYCLES:
        told, output = streamed(network, REQUESTS[2], self_speculative(network, **settings))
        assert [event.token_id for event in told] == output.token_ids
        assert [event.step for event in told] == output.step_G[: output.num_tokens].tolist()


def test_without_adapted_rows_logits_are_exactly_the_bases(base: Network) -> None:
    network = with_random_adapter(BLOCK)
    tokens = torch.tensor([[3, 10, 11, 12]])
    assert network.adapter is not None
    with torch.no_grad():
        wanted = base.module(tokens).logits
        assert torch.equal(network.module(tokens).logits, wanted)
        with network.adapter.open_for(torch.tensor([[False, False, False, True]])):
            logits = network.module(tokens).logits
    assert torch.equal(logits[:, :3], wanted[:, :3])
    assert not torch.equal(logits[:, 3], wanted[:, 3])


@pytest.mark.parametrize("divergence", [0.0, 1.0])
def test_packed_drafts_are_those_that_decoding_makes(own_texts: list[Output], divergence: float) -> None:
    """Each mask's logits in the packed forward are those of [clean tokens before the start | masks] alone."""
    network = with_random_adapter(BLOCK)
    adapter = network.adapter
    assert adapter is not None
    examples = Examples.from_ids(PROMPTS, [output.token_ids for output in own_texts])
    settings = DraftSettings(block_size=BLOCK, starts=3, divergence=divergence)
    objective = DraftObjective(network, examples, settings=settings)
    batch = batch_of(objective, num_rows=4, row_length=256)
    prepared = objective.prepare(batch, torch.Generator().manual_seed(0))
    inputs = prepared.inputs
    mask = inputs.layout.dense()
    assert inputs.adapted_RT is not None
    with torch.no_grad(), adapter.open_for(inputs.adapted_RT):
        hidden = network.module.base_model(
            inputs_embeds=adapter.embed(inputs.tokens_RT, inputs.adapted_RT),
            attention_mask=mask,
            position_ids=inputs.positions_RT,
            use_cache=False,
        ).last_hidden_state
    packed_logits = network.head(hidden.flatten(0, 1)[inputs.rows_S])
    compared = 0
    starts_seen = set()
    for unit in range(len(prepared.valid_UB)):
        flat = int(inputs.rows_S[unit * BLOCK])
        document = int(batch.packed.document_RT.flatten()[flat])
        example = int(batch.examples_N[document])
        start = int(inputs.positions_RT.flatten()[flat])
        text = [*PROMPTS[example], *own_texts[example].token_ids]
        starts_seen.add((document, start))
        valid = int(prepared.valid_UB[unit].sum())
        assert prepared.truth_UB[unit, :valid].tolist() == text[start + 1 : start + 1 + valid]
        tokens = torch.tensor([text[:start] + [0] * BLOCK])
        adapted = torch.arange(tokens.shape[1])[None] >= start
        sees = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        sees[start:, start:] = True
        positions = torch.arange(tokens.shape[1])[None].clamp(max=len(text))
        with torch.no_grad(), adapter.open_for(adapted):
            alone = network.module.base_model(
                inputs_embeds=adapter.embed(tokens, adapted),
                attention_mask=sees[None, None],
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state[0, start:]
        assert_close(packed_logits[unit * BLOCK : (unit + 1) * BLOCK], network.head(alone), atol=1e-4, rtol=1e-4)
        if prepared.base_UB is not None:
            with torch.no_grad():
                clean = network.module.base_model(torch.tensor([text])).last_hidden_state[0]
            rows = prepared.base_UB[unit, :valid] + prepared.valid_UB.numel()
            assert_close(packed_logits[rows], network.head(clean[start : start + valid]), atol=1e-4, rtol=1e-4)
        compared += 1
    assert compared == 21
    assert len(starts_seen) == 21  # no two drafts of a document begin at one place: they would see each other


def test_visited_places_come_first(own_texts: list[Output]) -> None:
    network = with_random_adapter(BLOCK)
    examples = Examples.from_ids(PROMPTS, [output.token_ids for output in own_texts])
    visited = torch.zeros(len(examples.completion_ids), dtype=torch.bool)
    visited[examples.completion_offsets[:-1] + 2] = True
    settings = DraftSettings(block_size=BLOCK, starts=1, visited=1.0)
    objective = DraftObjective(network, examples, visited=visited, settings=settings)
    prepared = objective.prepare(batch_of(objective, row_length=256), torch.Generator().manual_seed(0))
    context_RT = torch.tensor([len(ids) for ids in PROMPTS])
    first_rows = prepared.inputs.rows_S[::BLOCK]
    starts = prepared.inputs.positions_RT.flatten()[first_rows]
    assert sorted(starts.tolist()) == sorted((context_RT + 2).tolist())


def test_the_length_of_a_certain_draft_is_all_of_it() -> None:
    network = with_random_adapter(BLOCK)
    examples = Examples.from_ids([[3, 4]], [list(range(10, 40))])
    objective = DraftObjective(network, examples, settings=DraftSettings(block_size=BLOCK, starts=2))
    prepared = objective.prepare(batch_of(objective, num_rows=1, row_length=256), torch.Generator().manual_seed(1))
    logits = torch.nn.functional.one_hot(prepared.truth_UB.flatten(), network.vocab_size) * 100.0
    loss = objective.loss(lambda *inputs, **options: logits, prepared)
    assert_close(loss.parts["accepted"], prepared.valid_UB.sum() / 2)
    assert_close(loss.parts["hard"], torch.tensor(0.0))


SETTINGS = TrainSettings(
    max_steps=120, rows=4, row_length=256, learning_rate=1e-2, warmup_steps=5, log_every=60, save_every=None
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, own_texts: list[Output]) -> Path:
    """A base on disk, and an adapter trained on its texts."""
    home = tmp_path_factory.mktemp("gated")
    save_network(tiny_network("autoregressive", head_scale=20), home / "base")
    network = load_network(home / "base")
    before = weights_hash(network)
    network = add_gated_lora(network, LoRASettings(rank=16, alpha=16), block_size=BLOCK)
    examples = Examples.from_ids(PROMPTS, [output.token_ids for output in own_texts])
    objective = DraftObjective(network, examples, settings=DraftSettings(block_size=BLOCK, starts=4))
    train(network, objective, SETTINGS, home / "draft")
    assert network.adapter is not None
    assert before == network.adapter.base_hash == weights_hash(load_network(home / "base"))
    return home


def test_training_makes_passes_fewer_and_a_folder_that_load_takes(trained: Path, own_texts: list[Output]) -> None:
    lm = load(trained / "draft")
    assert isinstance(lm.decoder(), SelfSpeculative)
    outputs = decode(lm.network, REQUESTS, self_speculative(lm.network, window=BLOCK - 1))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in own_texts]
    random = with_random_adapter(BLOCK)
    untrained = decode(random, REQUESTS, self_speculative(random, window=BLOCK - 1))
    assert sum(o.num_forwards for o in outputs) < 0.75 * sum(o.num_forwards for o in untrained)
    two_pass = decode(lm.network, REQUESTS, self_speculative(lm.network, window=BLOCK - 1, cycle="two-pass"))
    assert [output.token_ids for output in two_pass] == [output.token_ids for output in own_texts]
    assert sum(o.num_forwards for o in outputs) < 0.9 * sum(o.num_forwards for o in two_pass)


def test_what_stands_at_the_front_was_drafted_from_the_text_before_it(trained: Path) -> None:
    """Every draft that a pass keeps is that of a plain forward [text before its start | masks], less its front."""
    network = load_network(trained / "draft")
    adapter, window = network.adapter, BLOCK - 1
    assert adapter is not None
    decoder = self_speculative(network, window=window, branches=3)
    seen = {"whole": 0, "cut": 0, "lost": 0}

    def look(networks: Any, decoding: Any, state: Any, caches: Any, shape: Any) -> Any:
        accepted, scores = run_pass(networks, decoding, state, caches, shape)
        after = accepted.state
        assert isinstance(after, SelfSpeculativeState)
        front, drafted = int(after.front_R[0]), int(after.drafted_R[0])
        if after.done_R[0] or drafted == 0:
            seen["lost"] += drafted == 0
            return accepted, scores
        seen["whole" if drafted == window else "cut"] += 1
        start = front - 1 - (window - drafted)
        tokens = torch.cat([after.tokens_RL[0, :start], torch.zeros(window, dtype=torch.long)])[None]
        adapted = torch.arange(tokens.shape[1])[None] >= start
        sees = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        sees[start:, start:] = True
        positions = torch.arange(tokens.shape[1]).clamp(max=int(after.canvas_end_R[0]) - 1)[None]
        with torch.no_grad(), adapter.open_for(adapted):
            rows = network.module.base_model(
                inputs_embeds=adapter.embed(tokens, adapted), attention_mask=sees[None, None], position_ids=positions
            ).last_hidden_state[0, start:]
        best = network.head(rows).argmax(-1)[window - drafted :]
        room = int(after.canvas_end_R[0]) - front
        assert after.tokens_RL[0, front : front + drafted][:room].tolist() == best[:room].tolist()
        return accepted, scores

    for request in REQUESTS[:4]:
        loop = Loop(network, decoder, num_slots=1, length=positions_needed(decoder, request), run_pass=look)
        loop.submit(request)
        while loop.busy:
            loop.step()
    assert seen["whole"] > 10
    assert seen["cut"] + seen["lost"] > 0


def test_training_goes_on_from_a_folder_and_leaves_the_base_alone(trained: Path, own_texts: list[Output]) -> None:
    network = load_network(trained / "draft")
    examples = Examples.from_ids(PROMPTS, [output.token_ids for output in own_texts])
    objective = DraftObjective(network, examples, settings=DraftSettings(block_size=BLOCK, starts=4))
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    network.name = str(trained / "base")
    train(network, objective, replace(SETTINGS, max_steps=2), trained / "again")
    for name, value in network.module.state_dict().items():
        assert torch.equal(value, before[name]) != ("lora_" in name), name
    assert load_network(trained / "again").adapter is not None


def test_loading_an_adapter_silences_no_other_warning(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_pretrained = PeftModel.from_pretrained

    def warning(*given: object, **options: object) -> object:
        warnings.warn("about this adapter", stacklevel=2)
        return from_pretrained(*given, **options)

    monkeypatch.setattr(PeftModel, "from_pretrained", warning)
    with pytest.warns(UserWarning, match="about this adapter"):
        load_network(trained / "draft")


def test_an_adapter_of_other_weights_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "home")
    save_network(tiny_network("autoregressive", head_scale=20, seed=1), tmp_path / "home" / "base")
    with pytest.raises(FewstepError, match="belongs to other weights than its base has"):
        load_network(tmp_path / "home" / "draft")
    with pytest.raises(FewstepError, match="belongs to other weights than its base has"):
        load_network(tmp_path / "home" / "draft", dtype="float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_fits_its_base_in_any_numbers(trained: Path, dtype: str) -> None:
    """float16 rounds the base's weights otherwise than the hash does that the adapter names."""
    assert load_network(trained / "draft", dtype=dtype).adapter is not None
    other = LanguageModel(load_network(trained / "base", dtype=dtype)).with_adapter(trained / "draft")
    assert other.network.adapter is not None


@pytest.mark.parametrize(("kept", "sentence"), [(0, "but no .*; copy the file beside it"), (50, "safetensors")])
def test_weights_of_an_adapter_that_are_missing_or_cut_off_are_one_sentence(
    trained: Path, tmp_path: Path, kept: int, sentence: str
) -> None:
    shutil.copytree(trained, tmp_path / "home")
    weights = tmp_path / "home" / "draft" / "adapter_model.safetensors"
    left = weights.read_bytes()[:kept]
    weights.unlink()
    if left:
        weights.write_bytes(left)
    with pytest.raises(FewstepError, match=sentence) as refused:
        load_network(tmp_path / "home" / "draft")
    assert "base" not in str(refused.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("settings", [5, {}, {"mask_token_id": "2", "block_size": 8, "base_hash": "x"}])
def test_a_damaged_description_is_one_sentence(trained: Path, tmp_path: Path, settings: object) -> None:
    shutil.copytree(trained, tmp_path / "home")
    config = tmp_path / "home" / "draft" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "gated_adapter": settings}))
    with pytest.raises(FewstepError, match="gated_adapter"):
        load_network(tmp_path / "home" / "draft")


def test_a_gated_adapter_is_not_merged_and_plays_no_other_role(trained: Path, run: Run, tmp_path: Path) -> None:
    assert "its gate would be lost" in run("merge", trained / "draft", "--output", tmp_path / "merged").sentence()
    assert not (tmp_path / "merged").exists()
    with pytest.raises(FewstepError, match="it cannot play block_causal"):
        load_network(trained / "draft", role="block_causal")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"cycle": "one"}, "unknown cycle .one.; choose two-pass, fused or auto"),
        ({"branches": 0}, "branches must be at least 1, got 0"),
        ({"cycle": "two-pass", "branches": 2}, "branches belong to fused passes"),
        ({"window": 3000, "cycle": "fused"}, "would draft 2 times 3000 tokens in every pass"),
        ({"window": 250}, "guesses 251 positions ahead, and the prompt leaves"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(settings: dict[str, object], complaint: str) -> None:
    network = with_random_adapter(BLOCK)
    with pytest.raises(FewstepError, match=complaint):
        decode(network, REQUESTS[-1:], LanguageModel(network).decoder(decoder="self-speculative", **settings))


def test_a_model_without_an_adapter_cannot_run_the_decoder(base: Network) -> None:
    with pytest.raises(FewstepError, match="needs a model with a gated adapter"):
        LanguageModel(base).decoder(decoder="self-speculative")


def test_texts_are_collected_read_and_trained_on(trained: Path, run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": i, "prompt": f"{i} + {i}"}) + "\n" for i in range(6)))
    base = str(trained / "base")
    collected = ["collect", "--model", base, "--data", str(rows), "--output", str(tmp_path / "texts")]
    told = run(*collected, "--decoder", "autoregressive", "--max-new-tokens", "12")
    assert told.code == 0
    assert "texts, 0 rejected" in told.err
    network = load_network(base)
    texts, visited = read_texts(tmp_path / "texts", network)
    assert (len(texts), visited) == (6, None)
    options = ["--lora-rank", "4", "--block-size", "4", "--max-steps", "2", "--rows", "1", "--row-length", "256"]
    trains = ["train", "draft", "--model", base, "--texts", str(tmp_path / "texts"), "--output", str(tmp_path / "d")]
    assert run(*trains, *options).code == 0
    assert load(tmp_path / "d").generate("1 + 1", max_new_tokens=5).num_tokens > 0


def test_sampled_texts_depend_on_the_seed_of_their_row_alone(base: Network, tmp_path: Path) -> None:
    rows = [PromptRow(f"p{i}", ids) for i, ids in enumerate(PROMPTS)]
    decoder, options = Autoregressive(role=base.role), {"max_new_tokens": 9, "settings": {}, "shard_size": 3}
    for folder, size in (("a", 2), ("b", 7)):
        sampling = Sampling(temperature=1.0)
        collect_texts(base, rows, tmp_path / folder, decoder, sampling=sampling, batch_size=size, **options)
    first, second = (read_texts(tmp_path / folder, base)[0] for folder in ("a", "b"))
    assert torch.equal(first.completion_ids, second.completion_ids)


def test_texts_decoded_with_the_adapter_are_the_bases_and_say_where_drafts_began(
    trained: Path, own_texts: list[Output], tmp_path: Path
) -> None:
    network, base = load_network(trained / "draft"), load_network(trained / "base")
    rows = [PromptRow(f"p{i}", ids) for i, ids in enumerate(PROMPTS)]
    decoder = self_speculative(network, window=BLOCK - 1)
    collect_texts(network, rows, tmp_path / "t", decoder, max_new_tokens=20, batch_size=7, settings={}, shard_size=3)
    texts, visited = read_texts(tmp_path / "t", base)  # the base reads them as its own
    answers = [ids.tolist() for ids in texts.completion_ids.split(texts.completion_offsets.diff().tolist())]
    assert answers == [output.token_ids[:20] for output in own_texts]
    assert visited is not None
    starts = visited.split(texts.completion_offsets.diff().tolist())
    assert all(marks[0] for marks in starts)  # the first pass drafts from the first token
    assert 7 < int(visited.sum()) < len(visited) / 2  # a cycle is a draft and what it accepted
