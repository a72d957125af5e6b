"""Networks in embedding space: the module, its samplers, and what answers with them."""

import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fewstep
from fewstep.decode.embedding import (
    SAMPLERS,
    EmbeddingSampling,
    Rows,
    consistency,
    euler,
    grid,
    step_size,
    stochastic,
)
from fewstep.decode.embedding_generator import EmbeddingSampler, normal_noise, sampler_for
from fewstep.decode.generator import answer
from fewstep.decode.requests import Request
from fewstep.decode.sampling import Sampling
from fewstep.engine.embedding_model import EmbeddingModel
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.embedding_denoiser import EmbeddingDenoiser, to_embedding_space
from fewstep.models.embedding_space import EmbeddingSpace, channel_losses, unit_rows, warp_of_losses
from fewstep.models.load import load_network, save_network
from fewstep.models.network import Network
from fewstep.models.noise_conditioning import conditioning_of
from fewstep.models.roles import Role
from fewstep.models.tiny import tiny_network, tiny_tokenizer

PROMPTS = ["what is 2+2?", "a", "hello", "one two three four five six", "x y", "7*8", "abc def", "q"]
NOISED = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_network("embedding", context_attention="causal", right_shift_logits=True, head_scale=30)


@pytest.fixture(scope="module")
def lm(network: Network) -> LanguageModel:
    return LanguageModel(network)


# The space


def test_warped_levels_rise_and_have_an_inverse(network: Network) -> None:
    space = network.role.embedding_space
    assert space is not None
    times = torch.linspace(0, 1, 101)
    levels = space.level(times)
    assert (levels.diff() > 0).all()
    assert_close(space.time(levels), times, atol=1e-4, rtol=0)
    assert levels[[0, -1]].tolist() == [0, 1]


def test_a_loss_that_grows_with_the_level_leaves_time_as_it_is() -> None:
    levels = [i / 20 for i in range(1, 20)]
    warp = warp_of_losses(levels, [3 * level for level in levels])
    assert_close(torch.tensor(warp), torch.linspace(0, 1, len(warp)), atol=0.06, rtol=0)


def test_levels_at_which_nothing_is_lost_get_little_time() -> None:
    levels = [i / 20 for i in range(1, 20)]
    space = EmbeddingSpace(noise_scale=1.0, warp=warp_of_losses(levels, [float(level > 0.5) for level in levels]))
    assert space.time(torch.tensor(0.5)) < 0.1
    assert space.level(torch.tensor(0.5)) > 0.5


def test_a_token_seen_through_more_noise_is_less_known() -> None:
    unit = unit_rows(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    losses = channel_losses(unit, EmbeddingSpace.of_width(32), [0.1, 0.4, 0.6, 0.99])
    assert losses == sorted(losses)
    assert losses[0] < 0.01
    assert losses[-1] > 3.5


@pytest.mark.parametrize("warp", [[0, 1, 0.5], [0.1, 1], [0], [0, 0, 1]])
def test_a_warp_must_rise_from_0_to_1(warp: list[float]) -> None:
    with pytest.raises(FewstepError, match=r"rise from 0 to 1.*; leave it out"):
        EmbeddingSpace(noise_scale=1.0, warp=tuple(map(float, warp)))


def test_the_noise_is_normal_and_depends_on_seed_position_and_step_alone() -> None:
    cpu = torch.device("cpu")
    noise = normal_noise(7, 0, 400, 33, cpu)
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert torch.equal(normal_noise(7, 0, 5, 33, cpu), noise[:5])
    for other in (normal_noise(8, 0, 400, 33, cpu), normal_noise(7, 1, 400, 33, cpu)):
        assert abs((other * noise).mean()) < 0.03


# The samplers


def rows_between(level: float, then: float) -> Rows:
    generator = torch.Generator().manual_seed(1)
    x, clean, fresh = (torch.randn(3, 8, generator=generator) for _ in range(3))
    return Rows(x, torch.full((3, 1), level), torch.full((3, 1), then), clean, fresh)


def test_euler_stays_on_the_path_of_a_text_that_is_known() -> None:
    space = EmbeddingSpace(noise_scale=5.0)
    clean, noise = rows_between(0.8, 0.3).clean, rows_between(0.8, 0.3).fresh
    at = {level: space.noised(clean, torch.full((3,), level), noise) for level in (0.8, 0.3)}
    rows = Rows(at[0.8], torch.full((3, 1), 0.8), torch.full((3, 1), 0.3), clean, noise)
    assert_close(euler(rows, 5.0, 0.0), at[0.3])


def test_the_stochastic_sampler_lies_between_euler_and_consistency() -> None:
    rows = rows_between(0.8, 0.3)
    assert_close(stochastic(rows, 5.0, 0.0), euler(rows, 5.0, 0.0))
    assert_close(stochastic(rows, 5.0, 1.0), consistency(rows, 5.0, 0.0))


def test_the_stochastic_sampler_leaves_the_noise_of_the_level() -> None:
    generator = torch.Generator().manual_seed(1)
    noise, fresh = (torch.randn(4000, 4, generator=generator) for _ in range(2))
    nothing = torch.zeros(4000, 4)
    rows = Rows(0.8 * 5 * noise, torch.full((4000, 1), 0.8), torch.full((4000, 1), 0.3), nothing, fresh)
    for churn in (0.0, 0.4, 1.0):
        assert abs(stochastic(rows, 5.0, churn).std() - 0.3 * 5) < 0.03


@pytest.mark.parametrize("name", ["warped", "uniform", "cosine"])
def test_grids_fall_from_pure_noise_to_the_clean_text(network: Network, name: Any) -> None:
    assert network.role.embedding_space is not None
    levels, times = grid(name, network.role.embedding_space, 7)
    assert len(levels) == len(times) == 8
    for values in (levels, times):
        assert_close(values[[0, -1]], torch.tensor([1.0, 0.0]))
        assert (values.diff() < 0).all()


def test_a_network_is_given_the_step_that_it_was_trained_to_take() -> None:
    space = EmbeddingSpace(noise_scale=1.0, most_steps=8)
    now, then = torch.tensor([1.0, 0.5, 0.1]), torch.tensor([0.5, 0.4, 0.0])
    assert step_size("euler", space, now, then).tolist() == [0, 0, 0]
    assert_close(step_size("shortcut", space, now, then), torch.tensor([0.5, 0.0, 0.0]))
    assert_close(step_size("consistency", space, now, then), torch.tensor([1.0, 0.5, 0.0]))
    unaware = replace(space, most_steps=None)
    assert step_size("shortcut", unaware, now, then).tolist() == [0, 0, 0]


# The module


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and attention mask of two texts of different lengths."""
    ids = torch.tensor([[3, 10, 11, 4, 20, 21, 22, 1], [3, 10, 4, 20, 21, 1, 0, 0]])
    labels = ids.clone()
    labels[0, :4] = labels[1, :3] = labels[1, 6:] = -100
    return ids, labels, (torch.arange(8) < torch.tensor([[8], [6]])).long()


def make(kind: str) -> Network:
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    classes: dict[str, Any] = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    }
    module, config = classes[kind]
    return Network(module(config(**sizes)), Role(name="autoregressive"), tiny_tokenizer(), name=kind)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_families_denoise_and_come_back_from_their_folder(kind: str, tmp_path: Path) -> None:
    model = EmbeddingModel(to_embedding_space(make(kind)))
    ids, labels, mask = batch()
    steps = torch.tensor([0.5, 1.0])

    def loss(of: EmbeddingDenoiser) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        found = of(ids, labels, steps, attention_mask=mask, generator=generator).loss
        assert found is not None
        return found

    loss(model).backward()
    learnt = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.abs().sum() > 0}
    assert {"module.noise.own.weight", "module.noise.raw.weight", "module.noise.time_embedding.2.weight"} <= learnt
    model.save_pretrained(tmp_path / "model")
    again = EmbeddingModel.from_pretrained(tmp_path / "model")
    assert_close(loss(again), loss(model))
    prompt = [3, 10, 11, 4]
    assert torch.equal(again.generate(prompt, max_new_tokens=9), model.generate(prompt, max_new_tokens=9))
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # a plain folder, of which the class takes its part


@pytest.mark.parametrize("role", ["autoregressive", "bidirectional", "block_causal"])
@pytest.mark.parametrize("shifted", [False, True])
def test_every_role_becomes_a_network_in_embedding_space(role: Any, shifted: bool) -> None:
    source = tiny_network(role, right_shift_logits=shifted)
    made = to_embedding_space(source)
    assert made.role.name == "embedding"
    assert made.role.right_shift_logits == (shifted or role == "autoregressive")
    assert len(LanguageModel(made).generate("hello", max_new_tokens=5, steps=2).canvas_ids_G) == 5


@pytest.mark.parametrize("attention", ["bidirectional", "causal", "block_causal"])
def test_a_fresh_network_reads_pure_noise_as_its_masks(attention: Any) -> None:
    """So a masked-diffusion network begins with what it has learnt."""
    source = tiny_network("bidirectional", context_attention=attention, right_shift_logits=True, head_scale=30)
    made = to_embedding_space(source)
    ids = torch.tensor([[3, 10, 11, 4, 2, 2, 2]])
    noise = torch.zeros(1, 7, 32)
    logits = EmbeddingDenoiser(made)(ids, timesteps=torch.ones(1), noisy_embeds=noise).logits
    embedded = source.module.get_input_embeddings()(ids)
    assert logits is not None
    part, table = conditioning_of(made.module), source.module.get_input_embeddings().weight
    kept = torch.ones(64, dtype=torch.bool)
    kept[made.never_drawn] = False
    doubt = float(kept.sum().log() / torch.tensor(64.0).log())
    embedded[0, 4:] = (1 - doubt) * table[kept].mean(0) + doubt * table[2]
    blocks = made.role.blocks(torch.arange(7)[None], torch.tensor([[4]]))
    mask = torch.where(blocks[:, None, None] <= blocks[:, None, :, None], 0.0, float("-inf"))
    hidden = source.module.base_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=torch.arange(7)[None], use_cache=False
    ).last_hidden_state
    expected = part.without_ruled_out(source.module.get_output_embeddings()(hidden))
    assert doubt > 0.95
    assert_close(logits[:, 4:], expected[:, 3:-1], atol=1e-4, rtol=1e-4)


def test_prompts_and_other_texts_of_a_batch_change_nothing(network: Network) -> None:
    model = EmbeddingDenoiser(network)
    ids, labels, mask = batch()
    noisy = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0.5, 0.7])
    together = model(ids, labels, steps, attention_mask=mask, noisy_embeds=noisy).logits
    alone = model(ids[1:, :6], labels[1:, :6], steps[1:], noisy_embeds=noisy[1:, :6]).logits
    assert together is not None
    assert alone is not None
    assert_close(together[1, 3:6], alone[0, 3:], atol=1e-4, rtol=1e-4)


def test_given_positions_stay_clean(network: Network) -> None:
    model = EmbeddingDenoiser(network)
    ids, labels, _ = batch()
    noisy = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    labels[0, 5] = -100  # in the middle of the canvas
    shown = noisy.clone()
    shown[0, 5] = model.embed(ids[0, 5])
    one = model(ids[:1], labels[:1], torch.tensor([[0.6] * 8]), noisy_embeds=shown).logits
    levels = torch.full((1, 8), 0.6)
    levels[0, 5] = 0
    other = model(ids[:1], labels[:1], levels, noisy_embeds=shown).logits
    assert one is not None
    assert torch.equal(one, other)


def test_what_a_module_cannot_take_is_refused(network: Network) -> None:
    model = EmbeddingDenoiser(network)
    ids, labels, _ = batch()
    with pytest.raises(FewstepError, match=r"noise levels in \[0, 1\]"):
        model(ids, labels, torch.tensor([0.5, 1.5]))
    with pytest.raises(FewstepError, match="position to denoise"):
        model(ids, torch.full_like(labels, -100))
    with pytest.raises(FewstepError, match="give labels, to which noise is added, or noisy_embeds"):
        model(torch.full_like(ids, 2))
    with pytest.raises(FewstepError, match="make it a network in embedding space first"):
        EmbeddingDenoiser(tiny_network("bidirectional"))
    with pytest.raises(FewstepError, match="self-conditioned"):
        to_embedding_space(network, self_conditioned=False)


def test_the_role_of_another_network_is_refused_and_in_another_role_the_conditioning_stays_away(
    network: Network, tmp_path: Path
) -> None:
    save_network(network, tmp_path / "own")
    teacher = load_network(tmp_path / "own", role="bidirectional")
    assert not hasattr(teacher.module, "noise")
    save_network(teacher, tmp_path / "teacher")
    assert load_network(tmp_path / "teacher").role.embedding_space is None
    with pytest.raises(FewstepError, match="fewstep train embedding"):
        load_network(tmp_path / "teacher", role="embedding")


# What answers


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_text_is_the_same_alone_and_in_a_batch_of_8(lm: LanguageModel, sampler: str, guidance: float) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "sampler": sampler, "steps": 3, "seed": 3, "guidance": guidance}
    alone = [lm.generate(prompt, **settings) for prompt in PROMPTS]
    for batch_size in (8, 3):
        together = lm.generate(PROMPTS, batch_size=batch_size, **settings)
        assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert {output.num_forwards for output in alone} == {3}


def test_requests_of_one_batch_have_seeds_lengths_and_canvases_of_their_own(network: Network) -> None:
    requests = [
        Request(prompt_ids=[3, 10 + i, 4], max_new_tokens=5 + 3 * i, seed=i, sampling=NOISED, stop_token_ids=())
        for i in range(5)
    ]
    requests.append(Request(prompt_ids=[3], canvas=[2, 20, 2, 2, 21], seed=9, sampling=NOISED))

    def answers(chosen: list[Request]) -> list[list[int]]:
        sampler = EmbeddingSampler(network, EmbeddingSampling(steps=4), num_slots=len(chosen), length=60)
        return [output.token_ids for output in answer(sampler, chosen)]

    together = answers(requests)
    assert together == [answers([request])[0] for request in requests]
    assert [len(ids) for ids in together] == [5, 8, 11, 14, 17, 5]
    reseeded = [replace(request, seed=100) for request in requests[:5]]
    assert answers(reseeded) != together[:5]


def test_the_pass_of_the_sampler_is_that_of_the_module(network: Network) -> None:
    """The first pass carries the prompt; later ones read it from the cache."""
    prompt, length = [3, 10, 11, 12, 4], 6
    model = EmbeddingDenoiser(network)
    sampler = EmbeddingSampler(network, EmbeddingSampling(steps=3, sampler="euler"), num_slots=2, length=40)
    sampler.submit(Request(prompt_ids=prompt, max_new_tokens=length, sampling=NOISED, stop_token_ids=()))
    ids = torch.tensor([[*prompt, *[2] * length]])
    space, part = model.space, conditioning_of(network.module)
    guess, part.guess = part.guess, None
    try:
        x = space.noise_scale * normal_noise(0, 0, length, 32, torch.device("cpu"))
        levels, _ = grid("warped", space, 3)
        for level, then in pairwise(levels):
            noisy = torch.cat([torch.zeros(len(prompt), 32), x])[None]
            logits = model(ids, timesteps=level[None], noisy_embeds=noisy).logits
            assert logits is not None
            found = logits[0, len(prompt) :]
            completed = sampler.step()
            told = completed[0][1].token_ids if completed else [e.token_id for e in sampler.provisional()[0][1]]
            assert told == found.argmax(-1).tolist()
            x = euler(Rows(x, level, then, found.softmax(-1) @ model.embed(torch.arange(64)), x), 1.0, 0.0)
    finally:
        part.guess = guess


def test_an_answer_ends_with_the_first_end_token(network: Network) -> None:
    request = Request(prompt_ids=[3, 10, 4], max_new_tokens=16, sampling=NOISED, stop_token_ids=())

    def output(request: Request) -> Any:
        return answer(EmbeddingSampler(network, EmbeddingSampling(), num_slots=1, length=40), [request])[0]

    whole = output(request)
    end = whole.token_ids[4]
    cut = output(replace(request, stop_token_ids=(end,)))
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert (whole.finish_reason, cut.finish_reason) == ("length", "stop")
    assert cut.canvas_ids_G.tolist() == whole.canvas_ids_G.tolist()


@pytest.mark.parametrize("steps", [1, 5])
def test_given_positions_never_change(lm: LanguageModel, steps: int) -> None:
    tokenizer = lm.network.tokenizer
    for text in ("<mask><mask>b 1<mask>c", "a b<mask><mask> + <mask>"):
        pattern = tokenizer.encode(text, add_special_tokens=False)
        for prompt, lead in (("hello", []), (None, pattern[: pattern.index(2)])):  # without a prompt, it is the lead
            filled = lm.infill(text=text, prompt=prompt, steps=steps)
            found = [*lead, *filled.token_ids]
            assert 2 not in found
            assert [2 if asked == 2 else one for asked, one in zip(pattern, found, strict=True)] == pattern
            assert filled.text == tokenizer.decode(found)
            assert filled.num_tokens == pattern.count(2)
    between = lm.infill("what ", " or else", num_tokens=4, prompt="hello", steps=steps)
    assert between.text.startswith("what ")
    assert between.text.endswith(" or else")


def test_a_stream_tells_of_the_text_as_it_stands_and_then_of_the_final_one(lm: LanguageModel) -> None:
    stream = lm.stream("hello", max_new_tokens=6, steps=3, seed=4)
    texts, finals = [], []
    for event in stream:
        texts.append((event.step, stream.provisional_text()))
        if event.final:
            finals.append(event.token_id)
        else:
            assert stream.answer_text() == ""
    assert stream.output is not None
    assert finals == stream.output.token_ids
    assert {step for step, _ in texts} == {1, 2, 3}
    assert stream.provisional_text() == stream.answer_text() == stream.output.text
    assert stream.output.token_ids == lm.generate("hello", max_new_tokens=6, steps=3, seed=4).token_ids


def test_a_request_can_be_given_up(network: Network) -> None:
    sampler = EmbeddingSampler(network, EmbeddingSampling(steps=3), num_slots=1, length=40)
    first, second = (sampler.submit(Request(prompt_ids=[3], max_new_tokens=4, sampling=NOISED)) for _ in range(2))
    sampler.step()
    cancelled = sampler.cancel(first)
    assert cancelled is not None
    assert (cancelled.token_ids, cancelled.finish_reason, cancelled.num_forwards) == ([], "cancelled", 1)
    assert sampler.cancel(second) is None
    assert not sampler.busy
    with pytest.raises(FewstepError, match="no request 0 to cancel"):
        sampler.cancel(first)


def test_what_does_not_fit_in_the_free_memory_is_refused(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(prompt_ids=[3], max_new_tokens=4, sampling=NOISED)] * 8
    for free, advice in ((50_000, "choose a batch size of at most"), (1_000, "not even one fits")):
        monkeypatch.setattr("fewstep.decode.admission.free_memory", lambda _, free=free: free)
        with pytest.raises(FewstepError, match=f"8 requests .* for their keys and values.*{advice}"):
            sampler_for(network, EmbeddingSampling(), requests)


def test_temperature_scales_the_noise_and_0_takes_none(lm: LanguageModel) -> None:
    def texts(**settings: Any) -> set[str]:
        return {lm.generate("hello", max_new_tokens=12, steps=1, seed=seed, **settings).text for seed in range(4)}

    assert len(texts(temperature=0)) == 1
    assert len(texts()) > 1
    assert texts() == texts(temperature=1.0)


def test_generate_in_the_manner_of_transformers_gives_the_same_tokens(network: Network, lm: LanguageModel) -> None:
    model = EmbeddingModel(network)
    prompts = [lm.encode(prompt) for prompt in PROMPTS[:3]]
    longest = max(map(len, prompts))
    left = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    found = model.generate(left, attention_mask=mask, num_inference_steps=2, max_new_tokens=7, seed=[5, 6, 7])
    for seed, row, prompt in zip((5, 6, 7), found.tolist(), prompts, strict=True):
        expected = LanguageModel(network).generate(PROMPTS[seed - 5], max_new_tokens=7, steps=2, seed=seed).token_ids
        assert row[: len(prompt) + len(expected)] == [*prompt, *expected]
        assert set(row[len(prompt) + len(expected) :]) <= {0}
    assert model.generate(prompts[0], max_new_tokens=7).shape[0] == 1


def test_more_steps_than_those_of_the_training_are_allowed_and_said(network: Network, lm: LanguageModel) -> None:
    with pytest.warns(UserWarning, match="33 steps are more than the 32 that the model was trained to take"):
        assert lm.generate("a", max_new_tokens=3, steps=33).num_forwards == 33
    with pytest.warns(UserWarning, match="more than the 32"):
        EmbeddingModel(network).generate([3, 4], max_new_tokens=3, num_inference_steps=40)


def test_a_network_that_was_not_trained_for_one_step_says_so(network: Network) -> None:
    untrained = to_embedding_space(tiny_network("bidirectional"))
    with pytest.warns(UserWarning, match="not trained to take long steps, and 1 is few for it; take about 32"):
        EmbeddingModel(untrained).generate([3, 4], max_new_tokens=3)
    with pytest.warns(UserWarning, match="and 3 are few for it"):
        LanguageModel(untrained).generate("a", max_new_tokens=3, steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LanguageModel(untrained).generate("a", max_new_tokens=3).num_forwards == 32
        EmbeddingModel(network).generate([3, 4], max_new_tokens=3)  # it was trained to take long steps


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"sampler": "eular"}, "did you mean 'euler'"),
        ({"decoder": "block"}, "without a decoder; leave out block"),
        ({"threshold": 0.9}, "takes no threshold; only .*block"),
        ({"top_k": 5}, "leave out top_k"),
        ({"churn": 0.5}, "churn belongs to the sampler stochastic"),
        ({"max_new_tokens": 300}, "exceed the 256 positions of tiny-embedding; shorten"),
        ({"max_new_tokens": 30, "canvas_length": 20}, "exceeds the canvas of 20"),
        ({"guidance": -1}, "at least 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(lm: LanguageModel, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FewstepError, match=sentence):
        lm.generate("hello", **settings)


def test_settings_of_embedding_space_are_refused_by_decoders() -> None:
    with pytest.raises(FewstepError, match="takes no sampler; only a model of the role embedding can"):
        LanguageModel(tiny_network()).generate("a", sampler="euler")


def test_what_needs_a_decoder_refuses_such_a_model(lm: LanguageModel) -> None:
    with pytest.raises(FewstepError, match="makes whole texts from noise and answers without a decoder"):
        lm.decoder()


def test_guidance_needs_a_model_that_was_trained_for_it() -> None:
    lm = LanguageModel(to_embedding_space(tiny_network("bidirectional")))
    with pytest.raises(FewstepError, match="trained without its prompts"):
        lm.generate("a", guidance=1.0)


def test_a_canvas_may_be_longer_than_the_answer(lm: LanguageModel) -> None:
    output = lm.generate("hello", max_new_tokens=5, canvas_length=9, steps=2)
    assert len(output.canvas_ids_G) == 9
    assert len(output.token_ids) <= 5


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the engine multiplies with oneDNN")
def test_the_engine_gives_the_texts_of_the_plain_path(lm: LanguageModel) -> None:
    assert (lm.manner().engine, lm.manner(engine="off").engine) == ("cpu", "off")
    for steps in (1, 4):
        fast, plain = (
            lm.generate(PROMPTS, max_new_tokens=12, steps=steps, engine=engine) for engine in ("auto", "off")
        )
        assert [output.token_ids for output in fast] == [output.token_ids for output in plain]


def test_a_folder_is_loaded_by_name(network: Network, tmp_path: Path) -> None:
    save_network(network, tmp_path / "model")
    lm = fewstep.load(tmp_path / "model", dtype="float32")
    assert lm.role.name == "embedding"
    assert lm.generate("a", max_new_tokens=6).text == LanguageModel(network).generate("a", max_new_tokens=6).text


def test_weights_that_do_not_fit_their_config_are_refused(network: Network, tmp_path: Path) -> None:
    plain = network.with_role(replace(network.role, embedding_space=replace(_space(network), noise_scale=1.0)))
    save_network(plain, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"self_conditioned": true', '"self_conditioned": false'))
    with pytest.raises(FewstepError, match=r"first noise\.guess\.weight"):
        load_network(tmp_path / "model")
    path.write_text(path.read_text().replace('"noise_scale"', '"noise"'))
    with pytest.raises(FewstepError, match=r"embedding_space must hold .*config\.json"):
        load_network(tmp_path / "model")


def _space(network: Network) -> EmbeddingSpace:
    assert network.role.embedding_space is not None
    return network.role.embedding_space
