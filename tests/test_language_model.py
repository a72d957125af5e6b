"""`LanguageModel` and its settings, as a user calls them."""

import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.networks import lively

import fewstep
from fewstep.decode.decoder import threshold_rule
from fewstep.decode.policies import EvenSplit, FixedCount, Margin, Origin, Threshold
from fewstep.decode.requests import Record
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.models.load import save_network
from fewstep.models.roles import Role

BLOCK_CAUSAL = Role(name="block_causal", block_size=8, mask_token_id=2)
BIDIRECTIONAL = Role(name="bidirectional", block_size=8, mask_token_id=2)
AUTOREGRESSIVE = Role(name="autoregressive")


def model(role: Any = "block_causal") -> LanguageModel:
    return LanguageModel(lively(role))


# Generate


@pytest.mark.parametrize("role", ["autoregressive", "bidirectional", "block_causal"])
def test_the_role_picks_the_decoder(role: Any) -> None:
    lm = model(role)
    out = lm.generate("what is 2+2?", max_new_tokens=10)
    assert out.num_tokens == len(out.token_ids) <= 10
    assert out.tokens_per_forward == out.num_tokens / out.num_forwards
    assert out.seconds > 0
    assert out.text == lm.network.tokenizer.decode(out.token_ids, skip_special_tokens=True)
    assert lm.decoder().name == {"bidirectional": "diffusion", "block_causal": "block"}.get(role, role)


def test_a_list_is_answered_in_order_and_a_conversation_is_one_prompt() -> None:
    lm = model()
    prompts = ["a", "a longer one", "b?"]
    outputs = lm.generate(prompts, max_new_tokens=8, batch_size=2)
    assert [output.token_ids for output in outputs] == [
        lm.generate(prompt, max_new_tokens=8).token_ids for prompt in prompts
    ]
    conversation = [{"role": "user", "content": "a"}]
    assert lm.generate(conversation, max_new_tokens=8).token_ids == outputs[0].token_ids
    assert lm.generate([conversation], max_new_tokens=8)[0].token_ids == outputs[0].token_ids
    assert lm.generate([], max_new_tokens=8) == []


def test_raw_prompts_go_without_the_template() -> None:
    lm = model()
    assert lm.encode("ab") == [3, *lm.encode("ab", raw=True), 4]


def test_announced_outputs_have_their_text() -> None:
    texts: dict[int, str] = {}
    outputs = model().generate(
        ["a", "b"], max_new_tokens=8, on_output=lambda index, out: texts.update({index: out.text})
    )
    assert [texts[0], texts[1]] == [output.text for output in outputs]


def test_records_pass_through() -> None:
    out = model().generate("a", max_new_tokens=8, record=Record(top_k=3))
    assert out.hidden_GD is None
    assert out.top_k is not None
    assert out.top_k.ids_GK.shape == (8, 3)


def test_load_reads_what_was_saved(tmp_path: Any) -> None:
    lm = model()
    save_network(lm.network, tmp_path)
    loaded = fewstep.load(tmp_path, dtype="float32", device="cpu")
    assert loaded.role == lm.role
    assert loaded.generate("ab", max_new_tokens=8).token_ids == lm.generate("ab", max_new_tokens=8).token_ids
    assert fewstep.load(tmp_path, role="bidirectional", device="cpu").decoder().name == "diffusion"


# Stream


@pytest.mark.parametrize("role", ["autoregressive", "bidirectional", "block_causal"])
def test_a_stream_ends_with_the_output_of_generate(role: Any) -> None:
    lm = model(role)
    stream, growing = lm.stream("ab", max_new_tokens=16), [""]
    assert stream.output is None
    for event in stream:
        assert event.text == lm.network.tokenizer.decode([event.token_id])
        growing.append(stream.answer_text())
    assert all(later.startswith(earlier) for earlier, later in pairwise(growing))
    expected = lm.generate("ab", max_new_tokens=16)
    assert stream.output is not None
    assert stream.output.text == expected.text == growing[-1]
    assert stream.output.num_forwards == expected.num_forwards


# Infill


def test_a_gap_is_filled_between_prefix_and_suffix() -> None:
    lm = model("bidirectional")
    out = lm.infill("ab", "yz.", num_tokens=3)
    assert out.text.startswith("ab")
    assert out.text.endswith("yz.")
    assert out.num_tokens == 3
    assert lm.role.mask_token_id not in out.token_ids


def test_masks_inside_a_text_are_filled() -> None:
    lm = model("bidirectional")
    out = lm.infill(text="a<mask>c<mask><mask>f")
    filled = lm.network.tokenizer.encode(out.text)
    assert out.num_tokens == 3
    assert out.text[0] == "a"
    assert out.text[-1] == "f"
    assert lm.role.mask_token_id not in filled


def test_infilling_can_answer_a_prompt_and_start_with_the_gap() -> None:
    lm = model("bidirectional")
    out = lm.infill("", "z", num_tokens=2, prompt="what?")
    assert out.num_tokens == 2
    assert len(out.token_ids) == 3
    assert lm.infill("", "z", num_tokens=2).num_tokens == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": "a"}, "num_tokens of at least 1"),
        ({"text": "abc"}, "holds no mask token, which is '<mask>'"),
        ({"text": "a<mask>", "suffix": "b"}, "either a text"),
        ({"prefix": "a", "num_tokens": 2, "max_new_tokens": 3}, "infilling takes no max_new_tokens"),
        ({"prefix": None, "num_tokens": 2}, "prefix must be text, got None"),
        ({"suffix": [1], "num_tokens": 2}, "suffix must be text"),
        ({"prefix": "a", "num_tokens": 2.5}, "num_tokens must be an integer, got 2.5"),
        ({"prefix": "a", "num_tokens": 0}, "num_tokens must be at least 1"),
        ({"prefix": "a", "num_tokens": 1 << 60}, "num_tokens must be at most"),
        ({"text": b"a"}, "text must be text, got b'a'"),
        ({"prompt": 3, "prefix": "a", "num_tokens": 2}, "the prompt must be text"),
    ],
)
def test_an_infill_without_meaning_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        model("bidirectional").infill(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"batch_size": odd}, "batch_size must be an integer") for odd in ("4", 2.5, None, True, [4])),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        *(({"listeners": odd}, "listeners must be a list of functions") for odd in (3, print, [3], None, "ab")),
        ({"record": "hidden"}, "record must be a Record"),
        ({"on_output": 3}, "on_output must be a function"),
    ],
)
def test_an_option_of_another_type_is_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        model().generate("ab", max_new_tokens=4, **options)


def test_only_the_bidirectional_role_infills() -> None:
    with pytest.raises(FewstepError, match="role block_causal, which cannot infill"):
        model().infill("a", "b", num_tokens=1)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"treshold": 0.9}, "unknown setting 'treshold'; did you mean 'threshold'"),
        ({"decoder": "blok"}, "unknown decoder 'blok'; did you mean 'block'"),
        ({"order": "orign"}, "unknown order 'orign'; did you mean 'origin'"),
        ({"threshold": 1.5}, "probability in"),
        ({"threshold": 0}, "probability in"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"threshold": 0.9, "steps": 8}, "threshold replaces steps"),
        ({"policy": Margin(), "threshold": 0.9}, "policy replaces"),
        ({"policy": Margin(), "gaps": 1}, "policy replaces threshold, gaps, steps and order"),
        ({"gaps": -1}, "gaps must be at least 0, got -1"),
        ({"alg": "origin", "gaps": 1}, "takes no gaps"),
        ({"seed": 1 << 63}, "seed must be at most 9223372036854775807, got 9223372036854775808"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        GenerationSettings.of(**settings)


@pytest.mark.parametrize(("threshold", "gaps"), [(1.5, None), (0.0, 1), (0.9, -1), (1.0, -2)])
def test_settings_refuse_a_threshold_and_gaps_in_the_words_of_the_policy(threshold: float, gaps: int | None) -> None:
    with pytest.raises(FewstepError) as by_policy:
        Threshold(at_least=threshold, gaps=gaps)
    with pytest.raises(FewstepError, match=f"^{re.escape(str(by_policy.value))}$"):
        GenerationSettings.of(threshold=threshold, gaps=gaps)


@pytest.mark.parametrize(
    ("role", "settings", "message"),
    [
        (BLOCK_CAUSAL, {"steps": 8}, "the block decoder takes no steps; only diffusion can"),
        (AUTOREGRESSIVE, {"threshold": 0.5}, "the autoregressive decoder takes no threshold"),
        (AUTOREGRESSIVE, {"gaps": 1}, "the autoregressive decoder takes no gaps; only diffusion and block can"),
        (BIDIRECTIONAL, {"gaps": 1}, "gaps belongs to the policy threshold; set threshold with it"),
        (BIDIRECTIONAL, {"gaps": 1, "steps": 8}, "gaps belongs to the policy threshold; set threshold with it"),
        (
            AUTOREGRESSIVE,
            {"window": 8},
            "takes no window; only jacobi, lookahead, speculative, self-speculative, prompt-lookup and medusa",
        ),
        (AUTOREGRESSIVE, {"decoder": "block"}, "a causal model cannot run the block decoder"),
        (AUTOREGRESSIVE, {"decoder": "diffusion"}, "a causal model cannot run the diffusion decoder"),
    ],
)
def test_a_setting_the_decoder_does_not_take_is_refused(role: Role, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        GenerationSettings.of(**settings).decoder_for(role)


@pytest.mark.parametrize(
    ("role", "settings", "policy"),
    [
        (BLOCK_CAUSAL, {}, Threshold(at_least=0.9)),
        (BLOCK_CAUSAL, {"threshold": 0.5}, Threshold(at_least=0.5)),
        (replace(BLOCK_CAUSAL, threshold=0.97), {}, Threshold(at_least=0.97)),
        (replace(BLOCK_CAUSAL, gaps=2), {}, Threshold(gaps=2)),
        (replace(BLOCK_CAUSAL, gaps=2), {"threshold": 0.5}, Threshold(at_least=0.5, gaps=2)),
        (replace(BLOCK_CAUSAL, gaps=2), {"gaps": 0}, Threshold(gaps=0)),
        (BLOCK_CAUSAL, {"gaps": 1}, Threshold(gaps=1)),
        (BLOCK_CAUSAL, {"policy": Margin()}, Margin()),
        (replace(BLOCK_CAUSAL, gaps=2), {"policy": Margin()}, Margin()),
        (BIDIRECTIONAL, {}, FixedCount(num_tokens=1)),
        (BIDIRECTIONAL, {"order": "margin"}, FixedCount(num_tokens=1, order="margin")),
        (BIDIRECTIONAL, {"steps": 16, "order": "entropy"}, EvenSplit(order="entropy")),
        (BIDIRECTIONAL, {"order": "origin"}, Origin()),
        (BIDIRECTIONAL, {"threshold": 0.7}, Threshold(at_least=0.7)),
        (BIDIRECTIONAL, {"threshold": 0.7, "gaps": 3}, Threshold(at_least=0.7, gaps=3)),
        (BLOCK_CAUSAL, {"decoder": "diffusion", "threshold": 0.7}, Threshold(at_least=0.7)),
        (replace(BLOCK_CAUSAL, gaps=2), {"decoder": "diffusion", "threshold": 0.7}, Threshold(at_least=0.7, gaps=2)),
    ],
)
def test_settings_make_the_policy(role: Role, settings: dict[str, Any], policy: Any) -> None:
    assert GenerationSettings.of(**settings).decoder_for(role).policy == policy


@pytest.mark.parametrize(
    ("role", "settings", "rule"),
    [
        (BLOCK_CAUSAL, {}, (0.9, None, BLOCK_CAUSAL.block_size)),
        (replace(BLOCK_CAUSAL, threshold=0.97, gaps=2, block_size=6), {}, (0.97, 2, 6)),
        (replace(BLOCK_CAUSAL, threshold=0.97, gaps=2), {"threshold": 0.5, "gaps": 0, "block_size": 8}, (0.5, 0, 8)),
        (BLOCK_CAUSAL, {"policy": Margin()}, (None, None, BLOCK_CAUSAL.block_size)),
        (replace(BIDIRECTIONAL, block_size=16), {}, (None, None, 16)),
        (BIDIRECTIONAL, {"threshold": 0.7, "block_size": 2}, (0.7, None, 2)),
        (AUTOREGRESSIVE, {}, (None, None, None)),
        (AUTOREGRESSIVE, {"decoder": "jacobi"}, (None, None, None)),
    ],
)
def test_the_threshold_rule_is_the_one_that_decodes(
    role: Role, settings: dict[str, Any], rule: tuple[Any, ...]
) -> None:
    told = threshold_rule(GenerationSettings.of(**settings).decoder_for(role))
    assert told == dict(zip(("threshold", "gaps", "block_size"), rule, strict=True))


def test_a_network_trained_on_jacobi_windows_is_decoded_in_them() -> None:
    role = replace(AUTOREGRESSIVE, jacobi_window=6)
    decoder = GenerationSettings().decoder_for(role)
    assert (decoder.name, decoder.traits.num_guessed) == ("jacobi", 6)
    assert GenerationSettings.of(window=9).decoder_for(role).traits.num_guessed == 9
    assert GenerationSettings(decoder="autoregressive").decoder_for(role).name == "autoregressive"
    assert GenerationSettings(temperature=0.7).decoder_for(role).name == "autoregressive"
    refusal = (
        "the jacobi decoder is greedy only; leave out the temperature, or sample with the decoder autoregressive, "
    )
    for settings in ({"decoder": "jacobi"}, {"window": 8}, {"ngram": 2}, {"fixed_windows": True}):
        with pytest.raises(FewstepError, match=f"^{refusal}prompt-lookup or speculative$"):
            GenerationSettings.of(temperature=0.7, **settings).decoder_for(role)
    with pytest.raises(FewstepError, match="jacobi_window must be at least 1, got 0"):
        replace(AUTOREGRESSIVE, jacobi_window=0)
    with pytest.raises(FewstepError, match="jacobi_window counts tokens of an autoregressive network's windows"):
        replace(BLOCK_CAUSAL, jacobi_window=6)


def test_gaps_belong_to_the_block_causal_role() -> None:
    role = replace(BLOCK_CAUSAL, threshold=0.97, gaps=2)
    assert Role.from_config(SimpleNamespace(**role.to_config())) == role
    assert Role.from_config(SimpleNamespace(**BLOCK_CAUSAL.to_config())).gaps is None
    assert role.playing("block_causal") == role
    assert role.playing("bidirectional").gaps is role.playing("autoregressive").gaps is None
    for other in (BIDIRECTIONAL, AUTOREGRESSIVE):
        with pytest.raises(FewstepError, match="gaps counts positions left open in a block_causal network's blocks"):
            replace(other, gaps=2)
    with pytest.raises(FewstepError, match="gaps must be at least 0, got -1"):
        replace(BLOCK_CAUSAL, gaps=-1)


def test_the_block_size_is_the_roles_unless_set() -> None:
    for role in (BLOCK_CAUSAL, BIDIRECTIONAL):
        assert GenerationSettings().decoder_for(role).block_size == 8
        assert GenerationSettings.of(block_size=4).decoder_for(role).block_size == 4


# Bad input


@pytest.mark.parametrize(("prompt", "raw"), [("", False), ("  \n", False), ("", True), ([], False)])
def test_an_empty_prompt_is_refused(prompt: Any, raw: bool) -> None:
    lm = model()
    with pytest.raises(FewstepError, match="prompt is empty"):
        lm.generate([prompt], raw=raw, max_new_tokens=4)


@pytest.mark.parametrize("prompt", [None, 7])
def test_what_is_no_text_is_refused(prompt: Any) -> None:
    with pytest.raises(FewstepError, match="a prompt is a text or a list of messages, got"):
        model().generate(prompt)


def test_an_output_shows_its_text_and_not_its_tensors() -> None:
    shown = repr(model().generate("abc", max_new_tokens=4))
    assert "token_ids" in shown
    assert "tensor" not in shown


def test_a_prompt_longer_than_the_models_positions_is_refused() -> None:
    with pytest.raises(FewstepError, match="exceed the 256 positions"):
        model().generate("a" * 300, max_new_tokens=4)


def test_a_canvas_shorter_than_the_answer_is_refused() -> None:
    with pytest.raises(FewstepError, match="exceeds the canvas"):
        model("bidirectional").generate("a", max_new_tokens=9, canvas_length=8)


def test_the_canvas_is_an_input_of_the_teacher() -> None:
    out = model("bidirectional").generate("a", max_new_tokens=9, canvas_length=32, early_stop=False)
    assert out.canvas_ids_G.shape == (32,)
    assert out.num_forwards == 32
    assert out.num_tokens <= 9
