"""Stock classes of transformers: the tokens of their own `generate`, or one sentence when they are loaded."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.causal import Causal
from fewstep.decode.generator import answer
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.lookahead import Lookahead
from fewstep.decode.loop import Loop, decode
from fewstep.decode.prompt_lookup import PromptLookup
from fewstep.decode.requests import Record, Request
from fewstep.decode.sharing import Sharing
from fewstep.errors import FewstepError
from fewstep.models import architectures
from fewstep.models.architectures import adjust_logits
from fewstep.models.attention import check_trainable, prepare_attention, training_mask
from fewstep.models.load import load_network
from fewstep.models.masks import Layout
from fewstep.models.medusa import MedusaHeads
from fewstep.models.network import Network
from fewstep.models.roles import Role, RoleName
from fewstep.models.tiny import tiny_tokenizer
from fewstep.train.learner import _PackedForward

CAUSAL = Role(name="autoregressive")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 3,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 8}
GEMMA = {**HEADS, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 4}
QWEN_WINDOW = {**WINDOW, "use_sliding_window": True}
ORIGINAL = {"original_max_position_embeddings": 16}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, **ORIGINAL}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **ORIGINAL},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, **BANDS, **ORIGINAL},
    "longrope": LONG,
}

RUN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    **{f"llama, {name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", WINDOW),
    "mistral, longrope and window": ("mistral", {**WINDOW, "rope_parameters": LONG}),
    "ministral, window": ("ministral", {**HEADS, **WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2, window in the second layer": ("qwen2", {**QWEN_WINDOW, "max_window_layers": 1}),
    "qwen2, window in all layers": ("qwen2", {**QWEN_WINDOW, "max_window_layers": 0}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": ROPES["yarn"]}),
    "qwen3": ("qwen3", HEADS),
    "qwen3, window": ("qwen3", {**HEADS, **QWEN_WINDOW, "max_window_layers": 1}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, window": ("phi3", WINDOW),
    "gemma": ("gemma", HEADS),
    "gemma2, window": ("gemma2", {**GEMMA, **WINDOW}),
    "gemma2, layer types": ("gemma2", {**GEMMA, **WINDOW, "layer_types": ["full_attention", "sliding_attention"]}),
    "gemma2, soft cap": ("gemma2", {**GEMMA, "final_logit_softcapping": 1.0}),
    "gemma3, window": ("gemma3_text", {**GEMMA, **WINDOW}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3, window": ("olmo3", WINDOW),
    "cohere": ("cohere", {"logit_scale": 0.0625}),
    "cohere2, window": ("cohere2", {**WINDOW, "logit_scale": 0.0625}),
    "granite": ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "starcoder2, window": ("starcoder2", WINDOW),
    "stablelm": ("stablelm", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3, window": ("smollm3", {**QWEN_WINDOW, "no_rope_layers": [1, 0]}),
    "helium": ("helium", HEADS),
    "glm": ("glm", HEADS),
    "glm4": ("glm4", HEADS),
    "ernie4_5": ("ernie4_5", HEADS),
    "exaone4, window": ("exaone4", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "nemotron": ("nemotron", {}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
    "persimmon": ("persimmon", {"num_key_value_heads": 4}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, **HEADS, "num_experts": 4}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}
"""Name -> type of the model, and its settings besides SIZES."""

GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 8}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 2}),
    "falcon": ("falcon", {}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2}),
    "mamba": ("mamba", {"state_size": 4}),
    "bert": ("bert", {}),
    "modernbert-decoder": ("modernbert-decoder", {}),
    "deepseek_v3": ("deepseek_v3", {"q_lora_rank": 8, "kv_lora_rank": 8, "n_routed_experts": 4, "n_group": 1}),
    "minimax_m2, window for no layer": ("minimax_m2", {**HEADS, **WINDOW, "num_local_experts": 4}),
    "mistral, window of 1": ("mistral", {"sliding_window": 1}),
    "gemma3, full attention": ("gemma3_text", {**GEMMA, "use_bidirectional_attention": True}),
    "qwen2, chunks": ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}),
    "qwen3_next": ("qwen3_next", {**HEADS, "num_experts": 4}),
}


def stock_module(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    """Random weights, large enough that attention matters."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **settings})).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return module


def network_of(module: PreTrainedModel) -> Network:
    return Network(module, CAUSAL, tiny_tokenizer(), name="a model")


def prompts(*lengths: int) -> list[list[int]]:
    """Text that repeats itself, so that there is something to look up."""
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(5, 60, (4,), generator=generator).tolist() for _ in lengths]
    return [(word * 9)[:length] for word, length in zip(words, lengths, strict=True)]


def answers_of_transformers(module: PreTrainedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Each prompt alone."""
    return [
        module.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def answers(network: Network, prompts: list[list[int]], count: int, decoder: Causal) -> list[list[int]]:
    """All prompts in one batch."""
    requests = [Request(prompt_ids=prompt, max_new_tokens=count) for prompt in prompts]
    return [output.token_ids for output in decode(network, requests, decoder)]


@pytest.mark.parametrize("name", RUN)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    module = stock_module(*RUN[name])
    given = prompts(5, 14, 20)  # a window is shorter; the rotary factors of longrope change at 16
    expected = answers_of_transformers(deepcopy(module), given, 8)
    network = network_of(module)
    for decoder in (Autoregressive(role=CAUSAL), PromptLookup(role=CAUSAL), Jacobi(role=CAUSAL, window=6)):
        assert answers(network, given, 8, decoder) == expected, decoder.name


@pytest.mark.parametrize(
    "name", ["llama, longrope", "mistral, window", "gemma2, window", "qwen2, window in all layers"]
)
def test_guesses_that_branch_are_verified_within_the_window(name: str) -> None:
    network, given = network_of(stock_module(*RUN[name])), prompts(5, 14, 20)
    expected = answers(network, given, 12, Autoregressive(role=CAUSAL))
    assert answers(network, given, 12, Lookahead(role=CAUSAL, window=3, ngram=3)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True}])
def test_what_is_known_of_a_plain_llama_is_what_is_measured(settings: dict[str, Any], dtype: torch.dtype) -> None:
    module = stock_module("llama", settings).to(dtype)
    assert architectures.is_plain(module)
    with torch.no_grad():
        assert architectures._measure(module) == architectures.PLAIN


def test_bundled_networks_are_plain_llamas() -> None:
    assert architectures.is_plain(load_network("gsm-student", device="cpu").module)


UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "another class": ("mistral", {"sliding_window": None}),
    "rotary factors": ("llama", {"rope_parameters": ROPES["llama3"]}),
    "a rotary base of its own": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "a window": ("llama", WINDOW),
    "a setting that it does not know": ("llama", {"attention_shape": "round"}),
    "biases": ("llama", {"attention_bias": True}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_class_or_setting_that_is_not_known_is_measured(name: str) -> None:
    assert not architectures.is_plain(stock_module(*UNUSUAL[name]))


def test_a_plain_llama_whose_sizes_do_not_fit_each_other_is_refused() -> None:
    with pytest.raises(FewstepError, match="a LlamaForCausalLM, which fewstep cannot run"):
        network_of(stock_module("llama", {"num_key_value_heads": 3}))


@pytest.mark.parametrize("part", ["layers.0.mlp.up_proj", "layers.0.self_attn.v_proj", "norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_plain_llama_with_numbers_that_are_none_is_refused(part: str, value: float) -> None:
    module = stock_module("llama", {})
    module.base_model.get_submodule(part).weight.data[0] = value
    with pytest.raises(FewstepError, match="its rows depend on rows that the mask excludes"):
        network_of(module)


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_cannot_be_run_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(FewstepError, match=r"a model is a .*, which fewstep cannot run: .*; choose a decoder-only"):
        network_of(stock_module(*REFUSED[name]))


CHANGED = ["gemma2, window", "gemma2, soft cap", "granite", "cohere2, window", "mistral, window"]


@pytest.mark.parametrize("name", [*CHANGED, "qwen2, window in the second layer", "mixtral"])
def test_packed_training_rows_have_the_logits_of_transformers(name: str) -> None:
    module = stock_module(*RUN[name])
    texts = prompts(11, 7)
    expected = torch.cat([module(torch.tensor([text])).logits[0] for text in texts])
    network = network_of(module)
    check_trainable(network, compiled=False)
    prepare_attention(module, compiled=False)
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    documents = torch.tensor([number for number, text in enumerate(texts) for _ in text])[None]
    layout = Layout(documents, positions, torch.zeros_like(documents, dtype=torch.bool))
    packed = _PackedForward(module, network.role, None, scales_logits=network.architecture.scales_logits)
    mask = training_mask(network, layout, positions, compiled=False)
    logits = packed(torch.tensor([[token for text in texts for token in text]]), positions, mask, torch.arange(18))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_what_training_cannot_apply_is_refused_in_one_sentence() -> None:
    longrope, sliding = (network_of(stock_module(*RUN[name])) for name in ("llama, longrope", "mistral, window"))
    with pytest.raises(FewstepError, match="depend on the length of a text"):
        check_trainable(longrope, compiled=False)
    with pytest.raises(FewstepError, match="train it without --compiled"):
        check_trainable(sliding, compiled=True)


@pytest.mark.parametrize("name", CHANGED)
def test_confidences_and_recorded_distributions_are_those_of_transformers(name: str) -> None:
    module = stock_module(*RUN[name])
    (prompt,) = prompts(9)
    network = network_of(module)
    request = Request(prompt_ids=prompt, max_new_tokens=4)
    (output,) = decode(network, [request], Autoregressive(role=CAUSAL), record=Record(hidden=True, top_k=3))
    with torch.no_grad():
        logits = module(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    count = len(output.token_ids)
    assert output.hidden_GD is not None
    assert output.top_k is not None
    torch.testing.assert_close(output.confidence_G[:count], expected.max(-1).values.exp(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.top_k.log_probs_GK[:count], expected.topk(3).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network.head(output.hidden_GD)[:count], logits, atol=1e-4, rtol=1e-4)


def test_medusa_heads_begin_as_the_networks_own_logits_in_training_too() -> None:
    network = network_of(stock_module(*RUN["granite"]))
    heads, rows = MedusaHeads.of(network, 2), torch.randn(3, 32)
    own = network.head(rows)
    torch.testing.assert_close(adjust_logits(network.module, heads(rows)), own[:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("name", ["mistral, window", "llama, longrope"])
@pytest.mark.parametrize("role", ["bidirectional", "block_causal"])
def test_what_is_defined_for_causal_attention_alone_is_refused_in_other_roles(name: str, role: RoleName) -> None:
    other = Role(name=role, mask_token_id=2)
    with pytest.raises(FewstepError, match=f"is defined for the role autoregressive, not for {role}"):
        network_of(stock_module(*RUN[name])).with_role(other)


def test_a_window_that_no_text_outgrows_costs_nothing_and_serves_every_role() -> None:
    network = network_of(stock_module("mistral", {"sliding_window": 64}))
    assert network.architecture.sliding_window is None
    assert network.with_role(Role(name="bidirectional", mask_token_id=2)).role.name == "bidirectional"


def test_phi3_computes_its_keys_again_past_the_boundary_so_requests_that_cross_it_are_refused() -> None:
    module = stock_module("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16})
    given = prompts(5, 20)
    expected = answers_of_transformers(deepcopy(module), given, 8)
    network = network_of(module)
    assert answers(network, given, 8, Autoregressive(role=CAUSAL)) == expected
    with pytest.raises(FewstepError, match=r"cross the 16 positions .* ask for at most 2 new tokens"):
        answers(network, prompts(14), 8, Autoregressive(role=CAUSAL))


def test_dynamic_factors_never_come_into_play() -> None:
    """They would past the last position, where no request may go; padding may."""
    network = network_of(stock_module(*RUN["llama, dynamic"])).with_role(Role(name="bidirectional", mask_token_id=2))
    rotary = network.module.base_model.rotary_emb
    before = rotary.inv_freq.clone()
    rotary(torch.zeros(1), torch.tensor([[3, 500]]))
    assert torch.equal(rotary.inv_freq, before)


@pytest.mark.parametrize("name", ["gemma2, window", "cohere2, window", "phi3, window"])
def test_a_folder_is_loaded_as_its_class_computes_it(name: str, tmp_path: Path) -> None:
    module = stock_module(*RUN[name])
    module.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    given = prompts(9)
    expected = answers_of_transformers(module, given, 8)
    assert answers(load_network(tmp_path), given, 8, Autoregressive(role=CAUSAL)) == expected


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("Dream", "a Dream checkpoint as it is published.* run `fewstep import .* NEW_FOLDER`"),
        ("llada", "a llada checkpoint as it is published.* run `fewstep import .* NEW_FOLDER`"),
        ("SDAR", "a sdar checkpoint as it is published.* run `fewstep import .* NEW_FOLDER`"),
        ("own-model", "of the family 'own-model', whose code is not in transformers.*`fewstep import` reads"),
    ],
)
def test_a_family_that_is_not_in_transformers_is_told_of_fewstep_import(
    model_type: str, sentence: str, tmp_path: Path
) -> None:
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": auto_map}))
    with pytest.raises(FewstepError, match=sentence):
        load_network(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["llama, dynamic", "mistral, longrope and window", "phi3, window", "gemma2, window", "smollm3", "qwen3_moe", "phi"],
)
def test_prompts_in_pieces_and_common_beginnings_give_the_same_tokens(name: str) -> None:
    kind, settings = RUN[name]
    net = network_of(stock_module(kind, settings))
    several = [
        Request(prompt_ids=[5 + i * i % 50 for i in range(13)] + [7 + count] * count, max_new_tokens=8)
        for count in (8, 6, 7, 2, 1)
    ]
    for decoder in (Autoregressive(role=CAUSAL), Lookahead(role=CAUSAL, window=3)):
        sharing = Sharing(prefill_rows=5, reuse_prefixes=True)
        loop = Loop(net, decoder, num_slots=2, length=60, sharing=sharing)
        for output, one in zip(answer(loop, several), several, strict=True):
            assert output.token_ids == decode(net, [one], decoder)[0].token_ids
        assert loop.num_reused > 0
