"""The CPU engine: the tokens of the plain path, in which numbers it computes, and when it steps aside."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import block_draft_of, decoder_of, lively, mixed, requests, same, with_random_adapter
from test_stock_architectures import RUN, network_of, stock_module

import fewstep
from fewstep.decode.loop import decode
from fewstep.decode.requests import Record
from fewstep.decode.self_speculative import SelfSpeculative
from fewstep.decode.speculative import Speculative
from fewstep.engine import choice as choices
from fewstep.engine.cpu import CpuNetwork
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.load import save_network
from fewstep.models.network import Network

FUSED = {
    *(name for name in RUN if name.startswith("llama")),
    *("mistral", "qwen2", "qwen2, yarn", "qwen3"),
}
"""Kinds whose layers are the usual ones; every other kind of RUN is refused."""

ROLES = ("block_causal", "bidirectional", "autoregressive")


@pytest.fixture
def has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "has_bfloat16", lambda: True)


@pytest.mark.parametrize("name", RUN)
def test_a_kind_of_layer_is_computed_as_by_its_class_or_refused_with_the_reason(name: str) -> None:
    network = network_of(stock_module(*RUN[name]))
    if name not in FUSED:
        with pytest.raises(FewstepError, match=r"sliding window|have other parts than usual|compute something else"):
            CpuNetwork(network, torch.float32)
        return
    fused = CpuNetwork(network, torch.float32)
    asked = requests(4)
    for one, other in zip(*(decode(net, asked, decoder_of(net)) for net in (network, fused)), strict=True):
        same(one, other)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_tokens_of_mixed_settings_are_those_of_the_plain_path(role: str, batch_size: int) -> None:
    network = lively(role)
    fused = CpuNetwork(network, torch.float32)
    asked = mixed([None], [one.sampling for one in requests(1)])
    both = (decode(net, asked, decoder_of(net), batch_size=batch_size) for net in (network, fused))
    for one, other in zip(*both, strict=True):
        same(one, other)


def test_a_gated_adapter_applies_to_its_rows_alone() -> None:
    network = with_random_adapter(8, base=lively("autoregressive"))
    fused = CpuNetwork(network, torch.float32)
    for net in (network, fused):
        assert net.adapter is not None
    decoder = SelfSpeculative(role=network.role, adapter=network.adapter, cycle="two-pass", window=8)
    asked = requests(4)
    for one, other in zip(*(decode(net, asked, decoder) for net in (network, fused)), strict=True):
        same(one, other)


def test_the_default_engine_rounds_only_what_nobody_asked_for_and_where_the_processor_multiplies_bfloat16(
    tmp_path: Path, has_bfloat16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_network(lively("block_causal"), tmp_path / "student")
    for dtype, expected in (("auto", "bfloat16"), ("float32", "float32")):
        chosen = fewstep.load(tmp_path / "student", dtype=dtype, device="cpu").choice()
        assert (chosen.engine, chosen.dtype, chosen.note) == ("cpu", expected, None)
    lm = fewstep.load(tmp_path / "student", device="cpu")
    assert lm.choice(engine="off").dtype == "float32"
    monkeypatch.setattr(choices, "has_bfloat16", lambda: False)
    assert lm.choice().dtype == "float32"


def test_decoders_that_write_the_text_of_another_never_round_and_their_drafts_may(
    tmp_path: Path, has_bfloat16: None
) -> None:
    target = lively("autoregressive")
    save_network(target, tmp_path / "causal")
    save_network(block_draft_of(target), tmp_path / "draft")
    lm = fewstep.load(tmp_path / "causal", device="cpu")
    settings: dict[str, Any] = {"decoder": "speculative", "draft": str(tmp_path / "draft"), "max_new_tokens": 12}
    assert {lm.choice().dtype, lm.choice(**settings).dtype} == {"float32"}
    prompts = ["what is 2+2?", "a", "x=1, y=2"]
    plain = lm.generate(prompts, max_new_tokens=12, engine="off")
    drafted = lm.generate(prompts, **settings)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert {name: draft.dtype for name, draft in lm.choice(**settings).companions.items()} == {"draft": torch.bfloat16}


def test_bfloat16_answers_are_repeatable_and_mostly_those_of_float32(tmp_path: Path, has_bfloat16: None) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    lm = fewstep.load("gsm-student", device="cpu")
    question = "Tom has 3 boxes of 12 pens and gives away 5 pens. How many pens does he have left?"
    first, again = (lm.generate(question, max_new_tokens=64) for _ in range(2))
    plain = lm.generate(question, max_new_tokens=64, engine="off")
    assert first.token_ids == again.token_ids
    assert lm.choice().dtype == "bfloat16"
    agreeing = sum(one == other for one, other in zip(first.token_ids, plain.token_ids, strict=False))
    assert agreeing > 0.5 * len(plain.token_ids)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"free_memory": lambda device: 1000}, "the engine keeps a copy of the weights, which takes"),
        ({"free_memory": lambda device: None}, None),
    ],
)
def test_without_room_for_a_second_copy_the_plain_path_stays(
    change: dict[str, Any], note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(choices, name, value)
    chosen = LanguageModel(lively("block_causal")).choice()
    assert chosen.engine == ("cpu" if note is None else "off")
    assert (chosen.note or "").startswith(note or "")


def test_what_the_engine_cannot_run_is_answered_by_the_plain_path_and_the_reason_told() -> None:
    network = network_of(stock_module(*RUN["gemma"]))
    lm = LanguageModel(network)
    chosen = lm.choice()
    assert (chosen.engine, chosen.network) == ("off", network)
    assert chosen.note is not None
    assert chosen.note.startswith("the layers of a model ")
    assert (
        lm.generate("2+2", max_new_tokens=4).token_ids == lm.generate("2+2", max_new_tokens=4, engine="off").token_ids
    )
    double = Network(lively("block_causal").module.double(), lively("block_causal").role, network.tokenizer)
    assert LanguageModel(double).choice().note == (
        "on a CPU the engine computes in float32 or bfloat16, and model is in float64"
    )


def test_recorded_rows_are_those_of_the_plain_path() -> None:
    lm = LanguageModel(lively("block_causal"))
    recorded = [
        lm.generate("what?", max_new_tokens=8, record=Record(hidden=True), engine=engine) for engine in ("auto", "off")
    ]
    first, second = (output.hidden_GD for output in recorded)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_a_draft_that_no_engine_runs_leaves_the_plain_path() -> None:
    target = lively("autoregressive")
    draft = block_draft_of(target)
    draft.module.double()
    decoder = Speculative(role=target.role, draft=draft, window=4)
    chosen = choices.Engines(target).choice(replace(decoder), "auto")
    assert (chosen.engine, chosen.note is not None) == ("off", True)


def test_weights_that_were_changed_since_are_those_that_answer() -> None:
    network = lively("block_causal")
    lm = LanguageModel(network)
    before = lm.generate("what is 2+2?", max_new_tokens=12)
    first, again = lm.choice().network, lm.choice().network
    with torch.no_grad():
        for weight in network.module.base_model.parameters():
            weight.mul_(-0.7)
    after = lm.generate("what is 2+2?", max_new_tokens=12)
    assert first is again
    assert lm.choice().network is not first
    assert after.token_ids == lm.generate("what is 2+2?", max_new_tokens=12, engine="off").token_ids
    assert after.token_ids != before.token_ids
