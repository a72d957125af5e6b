"""Importers: folders written here under the families' original names, against plain forwards and plain samplers."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fewstep.decode.loop import decode
from fewstep.decode.policies import DreamSchedule
from fewstep.decode.requests import Record, Request
from fewstep.decode.sampling import Sampling, noise_keys, uniform
from fewstep.engine.language_model import LanguageModel, load
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.models.importers.convert import FAMILIES, import_checkpoint
from fewstep.models.importers.shapes import SHAPES, tiny_tokenizer_for, write_random
from fewstep.models.masks import Layout
from fewstep.models.network import Network
from fewstep.models.roles import Role
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.documents import CLEAN, NOISY, Batch
from fewstep.train.examples import Examples
from fewstep.train.objectives import MaskedDiffusionObjective, Objective
from fewstep.train.stream import BatchStream
from fewstep.train.trajectory_table import TrajectoryTable

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS = 64, 32, 64, 2, 4
HEAD_WIDTH = WIDTH // HEADS
EOS, MASK = 1, 2

# Tiny checkpoints as their families write them


def llama_names(
    num_key_heads: int, *, qkv_bias: bool = False, norms: bool = False, tied: bool = False
) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        rows = {"q": WIDTH, "k": num_key_heads * HEAD_WIDTH, "v": num_key_heads * HEAD_WIDTH}
        for name, num_rows in rows.items():
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (num_rows, WIDTH)
            if qkv_bias:
                shapes[f"{block}.self_attn.{name}_proj.bias"] = (num_rows,)
            if norms and name != "v":
                shapes[f"{block}.self_attn.{name}_norm.weight"] = (HEAD_WIDTH,)
        shapes[f"{block}.self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{block}.mlp.gate_proj.weight"] = shapes[f"{block}.mlp.up_proj.weight"] = (HIDDEN, WIDTH)
        shapes[f"{block}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes[f"{block}.input_layernorm.weight"] = shapes[f"{block}.post_attention_layernorm.weight"] = (WIDTH,)
    return shapes


def llada_names(num_key_heads: int, *, tied: bool = False) -> dict[str, Any]:
    top = "model.transformer"
    shapes: dict[str, tuple[int, ...]] = {f"{top}.wte.weight": (VOCABULARY, WIDTH), f"{top}.ln_f.weight": (WIDTH,)}
    if not tied:
        shapes[f"{top}.ff_out.weight"] = (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        block = f"{top}.blocks.{layer}"
        shapes[f"{block}.q_proj.weight"] = shapes[f"{block}.attn_out.weight"] = (WIDTH, WIDTH)
        shapes[f"{block}.k_proj.weight"] = shapes[f"{block}.v_proj.weight"] = (num_key_heads * HEAD_WIDTH, WIDTH)
        shapes[f"{block}.ff_proj.weight"] = shapes[f"{block}.up_proj.weight"] = (HIDDEN, WIDTH)
        shapes[f"{block}.ff_out.weight"] = (WIDTH, HIDDEN)
        shapes[f"{block}.attn_norm.weight"] = shapes[f"{block}.ff_norm.weight"] = (WIDTH,)
    return shapes


QWEN_CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
LLADA_CONFIG = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"},
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_size": VOCABULARY,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": MASK,
    "max_sequence_length": 128,
    "mlp_hidden_size": HIDDEN,
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "n_layers": LAYERS,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": VOCABULARY,
    "weight_tying": False,
    "eos_token_id": EOS,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Source:
    config: Mapping[str, Any]
    names: Mapping[str, Any]
    generation: Mapping[str, Any]


def own_code(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}


SOURCES = {
    "dream": Source(
        {**QWEN_CONFIG, **own_code("Dream"), "mask_token_id": MASK},
        llama_names(2, qkv_bias=True),
        {"eos_token_id": EOS, "mask_token_id": MASK, "alg": "entropy"},
    ),
    "llada": Source(LLADA_CONFIG, llada_names(HEADS), {"eos_token_id": EOS}),
    "llada grouped": Source({**LLADA_CONFIG, "n_kv_heads": 2}, llada_names(2), {}),
    "llada tied": Source({**LLADA_CONFIG, "weight_tying": True}, llada_names(HEADS, tied=True), {}),
    "sdar": Source(
        {
            **QWEN_CONFIG,
            **own_code("sdar"),
            "head_dim": HEAD_WIDTH,
            "block_size": 4,
            "mask_token_id": MASK,
            "debug": False,
        },
        llama_names(2, norms=True),
        {},
    ),
    "llama": Source({**QWEN_CONFIG, "model_type": "llama"}, llama_names(2), {"eos_token_id": EOS}),
    "llama 3.1": Source(
        {**QWEN_CONFIG, "model_type": "llama", "rope_scaling": LLAMA3_SCALING, "rope_theta": 1e4}, llama_names(2), {}
    ),
    "smollm": Source(
        {**QWEN_CONFIG, "model_type": "llama", "tie_word_embeddings": True}, llama_names(2, tied=True), {}
    ),
    "qwen2": Source({**QWEN_CONFIG, "model_type": "qwen2"}, llama_names(2, qkv_bias=True), {}),
    "qwen3": Source({**QWEN_CONFIG, "model_type": "qwen3", "head_dim": HEAD_WIDTH}, llama_names(2, norms=True), {}),
}
DIFFUSION = ["dream", "llada", "llada grouped"]


def source_tokenizer(model_type: str) -> PreTrainedTokenizerBase:
    """One token a character, in the class of the family's stock tokenizer."""
    return tiny_tokenizer_for({"Dream": "qwen2", "sdar": "qwen3"}.get(model_type, model_type), VOCABULARY)


def write_source(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """A checkpoint in two shards, with a tokenizer, code that must not run, and a licence."""
    source = SOURCES[kind]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(source.config))
    if source.generation:
        (folder / "generation_config.json").write_text(json.dumps(source.generation))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in source.names.items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if "norm" in name or "ln_f" in name else 0.3 * noise
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    source_tokenizer(str(source.config["model_type"])).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]  # LLaDA's names none, though the token is in the vocabulary
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("modeling_own.py", "tokenization_own.py", "configuration_own.py"):
        (folder / name).write_text("raise SystemExit('code of a checkpoint was run')\n")
    (folder / "LICENSE").write_text("a licence\n")
    return folder


def imported(tmp_path: Path, kind: str) -> Path:
    target = tmp_path / "target"
    import_checkpoint(write_source(tmp_path / "source", kind), target)
    return target


def plain_logits(folder: Path, tokens: list[int]) -> Tensor:
    """The family's own forward on a source folder, [T, V]."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return FAMILIES[config["model_type"]].forward(config, weights.get, torch.tensor(tokens))


@torch.no_grad()
def same(one: Tensor, other: Tensor) -> None:
    """Within 1e-5 of the largest logit; the mask token's is -inf in both or in neither."""
    finite = other.isfinite()
    assert torch.equal(one.isfinite(), finite)
    assert float((one - other)[finite].abs().max()) <= 1e-5 * max(1.0, float(other[finite].abs().max()))


# Import


@pytest.mark.parametrize("kind", SOURCES)
def test_an_imported_folder_has_the_logits_of_the_source_and_loads_with_stock_classes(
    kind: str, tmp_path: Path
) -> None:
    source, target = write_source(tmp_path / "source", kind), tmp_path / "target"
    result = import_checkpoint(source, target, check=True)
    assert result.difference is not None
    assert result.difference < 1e-5
    assert result.num_parameters == sum(torch.Size(shape).numel() for shape in SOURCES[kind].names.values())

    module, report = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=False, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if kind != "sdar":  # whose blocks stock classes cannot see; the check above gives the mask
        tokens = [5, 9, MASK, 30, 41, MASK, 7]
        with torch.no_grad():
            logits = module(torch.tensor([tokens])).logits[0]
        same(logits, plain_logits(source, tokens))


@pytest.mark.parametrize(
    ("kind", "role", "shifted", "context"),
    [
        ("dream", "bidirectional", True, "bidirectional"),
        ("llada", "bidirectional", False, "bidirectional"),
        ("sdar", "block_causal", False, "block_causal"),
        ("qwen2", "autoregressive", False, "bidirectional"),
    ],
)
def test_a_family_gets_its_role(kind: str, role: str, shifted: bool, context: str, tmp_path: Path) -> None:
    found = load(imported(tmp_path, kind)).role
    assert (found.name, found.right_shift_logits, found.context_attention) == (role, shifted, context)
    assert found.mask_token_id == (None if role == "autoregressive" else MASK)
    assert found.block_size == (4 if kind == "sdar" else 32)


@pytest.mark.parametrize("kind", ["dream", "llada"])
def test_tokenizer_template_generation_settings_and_licence_travel(kind: str, tmp_path: Path) -> None:
    target = imported(tmp_path, kind)
    tokenizer = load(target).network.tokenizer
    own = source_tokenizer(str(SOURCES[kind].config["model_type"]))
    assert tokenizer.get_vocab() == own.get_vocab()
    assert tokenizer.encode("a 12  b\n c") == own.encode("a 12  b\n c")
    assert tokenizer.mask_token_id == MASK
    message = [{"role": "user", "content": "2 + 2"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == own.apply_chat_template(message, tokenize=False)
    assert json.loads((target / "generation_config.json").read_text()) == SOURCES[kind].generation
    assert (target / "LICENSE").read_text() == "a licence\n"
    assert not list(target.glob("*.py"))
    assert "auto_map" not in (target / "config.json").read_text() + (target / "tokenizer_config.json").read_text()


def test_a_byte_pair_tokenizer_of_remote_code_becomes_the_stock_one(tmp_path: Path) -> None:
    """Dream ships vocab.json and merges.txt with a class of its own, and no tokenizer.json."""
    source = write_source(tmp_path / "source", "dream")
    (source / "tokenizer.json").unlink()
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {letter: index for index, letter in enumerate(letters)} | {"th": 26, "the": 27, "Ġ": 28}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    added = {"29": "<|endoftext|>", "30": "<|mask|>"}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.DreamTokenizer", None]},
        "added_tokens_decoder": {key: {"content": token, "special": True} for key, token in added.items()},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**config, "mask_token_id": 30, "eos_token_id": 29}))
    import_checkpoint(source, tmp_path / "target")
    tokenizer = load(tmp_path / "target").network.tokenizer
    assert tokenizer.encode("the<|mask|>be") == [27, 30, 1, 4]
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (30, 29)


def test_bytes_of_the_weights_are_kept(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llada")
    for file in source.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    result = import_checkpoint(source, tmp_path / "target")
    assert result.dtype == "bfloat16"
    weights = {k: v for file in (tmp_path / "target").glob("*.safetensors") for k, v in load_file(file).items()}
    original = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    there = weights["model.layers.1.mlp.gate_proj.weight"]
    assert there.dtype == torch.bfloat16
    assert torch.equal(there, original["model.transformer.blocks.1.ff_proj.weight"])
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_causal_model_can_be_given_a_mask_token(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "qwen2")
    import_checkpoint(source, tmp_path / "target", mask_token="<unused0>")
    lm = load(tmp_path / "target", role="bidirectional")
    mask_id = lm.network.tokenizer.convert_tokens_to_ids("<unused0>")
    assert lm.role.mask_token_id == lm.network.tokenizer.mask_token_id == mask_id
    assert mask_id not in lm.generate("2 + 2", max_new_tokens=8, early_stop=False).token_ids
    with pytest.raises(FewstepError, match="'<hide>' is not in the vocabulary, and the network has no row left"):
        import_checkpoint(source, tmp_path / "other", mask_token="<hide>")
    with pytest.raises(FewstepError, match=rf"config\.json in .* says the mask token is 2, its tokenizer {mask_id}"):
        import_checkpoint(write_source(tmp_path / "llada", "llada"), tmp_path / "other", mask_token="<unused0>")


# Decoding what was imported


def generate(
    lm: LanguageModel, prompt: list[int], max_new_tokens: int, *, seed: int = 0, **settings: Any
) -> tuple[list[int], Tensor]:
    """The whole canvas, and the step that finalised each position."""
    chosen = GenerationSettings.of(early_stop=False, max_new_tokens=max_new_tokens, seed=seed, **settings)
    decoder = lm.decoder(max_new_tokens=max_new_tokens, **settings)
    output = decode(lm.network, [chosen.request(prompt)], decoder)[0]
    return output.canvas_ids_G.tolist(), output.step_G


PROMPT = [5, 17, 33, 40, 21, 9, 12]


def plain_sampler(
    score: Callable[[list[int]], Tensor], num_new: int, *, block: int, steps: int, certainty: Callable[[Tensor], Tensor]
) -> list[int]:
    """LLaDA's published loop: blocks left to right, each step finalises its share of the most certain masks."""
    tokens = [*PROMPT, *[MASK] * num_new]
    per_block = steps // (num_new // block)
    for start in range(len(PROMPT), len(tokens), block):
        for step in range(per_block):
            masks = [p for p in range(start, start + block) if tokens[p] == MASK]
            share = block // per_block + (step < block % per_block)
            probabilities = score(tokens).softmax(-1)
            best = sorted(masks, key=lambda p: -float(certainty(probabilities[p])))[:share]
            for p in best:
                tokens[p] = int(probabilities[p].argmax())
    return tokens[len(PROMPT) :]


def scorer(folder: Path, *, shifted: bool) -> Callable[[list[int]], Tensor]:
    """Logits at each position, from the source folder's own forward."""

    def score(tokens: list[int]) -> Tensor:
        logits = plain_logits(folder, tokens)
        if shifted:
            logits = torch.cat([logits[:1], logits[:-1]])  # Dream: row p - 1 scores position p
        logits[:, MASK] = -torch.inf
        return logits

    return score


CERTAINTIES = {
    "low_confidence": lambda p: p.max(),
    "margin": lambda p: p.topk(2).values[0] - p.topk(2).values[1],
    "entropy": lambda p: -torch.special.entr(p).sum(),
}


@pytest.mark.parametrize("order", CERTAINTIES)
@pytest.mark.parametrize("kind", DIFFUSION)
def test_the_teacher_decodes_as_the_published_loop_does(kind: str, order: str, tmp_path: Path) -> None:
    target = imported(tmp_path, kind)
    score = scorer(tmp_path / "source", shifted=kind == "dream")
    expected = plain_sampler(score, 16, block=8, steps=12, certainty=CERTAINTIES[order])
    found, _ = generate(load(target), PROMPT, 16, block_size=8, steps=12, order=order)
    assert found == expected


DREAM_ORDERS = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}


def race(weights: list[float], noise: list[float]) -> list[int]:
    """Runners as they arrive, each at an exponential time of its rate: a draw by weight, one after the other."""
    times = [-math.log(u) / weight if weight > 0 else math.inf for u, weight in zip(noise, weights, strict=True)]
    return sorted(range(len(times)), key=lambda runner: times[runner])


def plain_dream(
    score: Callable[[list[int]], Tensor],
    num_new: int,
    *,
    alg: str,
    steps: int,
    eps: float,
    alg_temp: float | None,
    temperature: float,
    seed: int,
) -> tuple[list[int], list[int]]:
    """Dream's published loop, but for the confidence of a drawn token, which is untempered: tokens, and their steps.

    Tokens are drawn with the noise of the seed, positions with that of its complement.
    """
    tokens, step_of = [*PROMPT, *[MASK] * num_new], [0] * (len(PROMPT) + num_new)
    times = torch.linspace(1, eps, steps + 1)

    def noise(seed: int, position: int, step: int, count: int) -> list[float]:
        key = noise_keys(torch.tensor([seed]), torch.tensor([[position]]), torch.tensor([step]))
        return uniform(key, count)[0, 0].tolist()

    for step in range(1, steps + 1):
        masks = [p for p, token in enumerate(tokens) if token == MASK]
        share = float(1 - times[step] / times[step - 1]) if step < steps else 1.0
        logits = score(tokens)
        probabilities, drawn, certainty = logits.softmax(-1), {}, {}
        for p in masks:
            drawn[p] = int(logits[p].argmax())
            if temperature > 0:
                weights = (logits[p].double() / temperature).softmax(-1).tolist()
                drawn[p] = race(weights, noise(seed, p, step, VOCABULARY))[0]
            certainty[p] = float(
                probabilities[p, drawn[p]]
                if alg == "maskgit_plus"
                else CERTAINTIES[DREAM_ORDERS[alg]](probabilities[p])
            )
        if alg_temp:
            best = max(certainty.values())
            weights = [math.exp((certainty[p] - best) / alg_temp) for p in masks]
            ranked = [masks[i] for i in race(weights, [noise(~seed, p, step, 1)[0] for p in masks])]
        else:
            ranked = sorted(masks, key=lambda p: -certainty[p])
        for p in ranked[: int(len(masks) * share)]:
            tokens[p], step_of[p] = drawn[p], step
    return tokens[len(PROMPT) :], step_of[len(PROMPT) :]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("alg_temp", [None, 0.0, 0.05, 1.0])
@pytest.mark.parametrize("steps", [16, 10, 5])
@pytest.mark.parametrize("alg", DREAM_ORDERS)
def test_dream_decodes_as_its_published_sampler_does(
    alg: str, steps: int, alg_temp: float | None, temperature: float, tmp_path: Path
) -> None:
    lm = load(imported(tmp_path, "dream"))
    score = scorer(tmp_path / "source", shifted=True)
    settings: dict[str, Any] = {"alg": alg, "steps": steps, "eps": 1e-3, "temperature": temperature, "seed": 3}
    found, step_G = generate(lm, PROMPT, 16, **settings, alg_temp=alg_temp)
    assert (found, step_G.tolist()) == plain_dream(score, 16, **settings, alg_temp=alg_temp)


@pytest.mark.parametrize("alg", DREAM_ORDERS)
def test_dreams_positions_are_drawn_as_the_temperature_and_the_seed_say(alg: str, tmp_path: Path) -> None:
    lm = load(imported(tmp_path, "dream"))

    def steps(**settings: Any) -> list[int]:
        return generate(lm, PROMPT, 16, alg=alg, steps=16, **settings)[1].tolist()

    assert steps() == steps(alg_temp=0.0) == steps(alg_temp=1e-12) == steps(alg_temp=1e-300, seed=1)
    assert steps(alg_temp=1.0) == steps(alg_temp=1.0) != steps()
    assert steps(alg_temp=1.0) != steps(alg_temp=1.0, seed=1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drawn_positions_do_not_depend_on_companions(temperature: float, tmp_path: Path) -> None:
    lm = load(imported(tmp_path, "dream"))
    prompts = [PROMPT, PROMPT[:2], PROMPT[::-1], [7] * 19, PROMPT]
    sampling = Sampling(temperature=temperature)
    requests = [
        Request(prompt_ids=prompt, max_new_tokens=12, seed=seed, sampling=sampling)
        for seed, prompt in enumerate(prompts)
    ]
    decoder = lm.decoder(alg="entropy", alg_temp=0.5, steps=6, max_new_tokens=12)
    for batch_size in (5, 2):
        for request, output in zip(requests, decode(lm.network, requests, decoder, batch_size=batch_size), strict=True):
            alone = decode(lm.network, [request], decoder)[0]
            assert alone.canvas_ids_G.tolist() == output.canvas_ids_G.tolist()
            assert alone.step_G.tolist() == output.step_G.tolist()


@pytest.mark.parametrize("kind", DIFFUSION)
def test_guidance_is_that_of_the_published_loop(kind: str, tmp_path: Path) -> None:
    """LLaDA: logits of the text with the prompt masked out, and from there 1 + cfg_scale times to the others."""
    target = imported(tmp_path, kind)
    score = scorer(tmp_path / "source", shifted=kind == "dream")

    def guided(tokens: list[int]) -> Tensor:
        with_prompt, without = score(tokens), score([*[MASK] * len(PROMPT), *tokens[len(PROMPT) :]])
        logits = without + (1 + 1.5) * (with_prompt - without)
        logits[:, MASK] = -torch.inf
        return logits

    expected = plain_sampler(guided, 16, block=8, steps=12, certainty=CERTAINTIES["low_confidence"])
    lm = load(target)
    found, _ = generate(lm, PROMPT, 16, block_size=8, steps=12, cfg_scale=1.5)
    assert found == expected
    assert found != generate(lm, PROMPT, 16, block_size=8, steps=12)[0]
    with pytest.raises(FewstepError, match="cfg_scale"):
        lm.generate("2 + 2", max_new_tokens=8, cfg_scale=1.5, record=Record(hidden=True))


def test_a_guided_result_does_not_depend_on_companions(tmp_path: Path) -> None:
    lm = load(imported(tmp_path, "llada"))
    prompts = ["2 + 2", "how many eggs are in the box?", "a"]
    settings: dict[str, Any] = {"max_new_tokens": 12, "block_size": 4, "cfg_scale": 0.5, "early_stop": False}
    together = lm.generate(prompts, **settings)
    for prompt, output in zip(prompts, together, strict=True):
        alone = lm.generate(prompt, **settings)
        assert alone.canvas_ids_G.tolist() == output.canvas_ids_G.tolist()
        assert alone.num_forwards == output.num_forwards == 12


def test_dream_opens_each_mask_with_its_share_of_the_time_left() -> None:
    """Times 1, 0.8, 0.6, 0.4, 0.2: shares 0.2, 0.25, 1/3, and all in the last step."""
    schedule = DreamSchedule(alg="origin", num_steps=4, eps=0.2)
    uniform = torch.tensor([[0.1, 0.66, 0.67, 0.74, 0.76, 0.79, 0.81]])
    masked = torch.ones_like(uniform, dtype=torch.bool)
    counts = [int(schedule(uniform, masked, torch.tensor([[left]])).sum()) for left in (4, 3, 2, 1)]
    assert counts == [1, 3, 5, 7]


def test_names_that_users_of_llada_and_dream_know(tmp_path: Path) -> None:
    lm = load(imported(tmp_path, "llada"))
    ours = lm.generate("2 + 2", max_new_tokens=16, block_size=8, steps=8, order="random", seed=3)
    theirs = lm.generate("2 + 2", gen_length=16, block_length=8, steps=8, remasking="random", seed=3)
    assert ours.token_ids == theirs.token_ids
    assert torch.equal(ours.step_G, theirs.step_G)
    for settings, sentence in [
        ({"gen_length": 8, "max_new_tokens": 8}, "gen_length is another name of max_new_tokens"),
        ({"alg": "entropy", "order": "margin"}, "takes no order"),
        ({"alg": "entropy", "block_length": 8}, "takes no block_size"),
        ({"alg": "maskgit"}, "unknown alg 'maskgit'"),
        ({"alg": "origin", "eps": 1.0}, "eps is the time of the last step"),
        ({"eps": 0.1}, "eps belongs to the policy dream; set alg with it"),
        ({"alg_temp": 0.1}, "alg_temp belongs to the policy dream; set alg with it"),
        ({"alg": "origin", "alg_temp": 0.1}, "takes no alg_temp; leave one of the two out"),
        ({"alg": "entropy", "alg_temp": -0.1}, "alg_temp must be at least 0, got -0.1"),
        ({"alg": "entropy", "alg_temp": float("inf")}, "alg_temp must be a finite number, got inf"),
        ({"alg": "entropy", "alg_temp": float("nan")}, "alg_temp must be a finite number, got nan"),
    ]:
        with pytest.raises(FewstepError, match=sentence):
            lm.generate("2 + 2", **settings)


@pytest.mark.parametrize("kind", DIFFUSION)
def test_recorded_rows_are_those_that_scored_the_tokens(kind: str, tmp_path: Path) -> None:
    lm = load(imported(tmp_path, kind))
    score = scorer(tmp_path / "source", shifted=kind == "dream")
    request = Request(prompt_ids=PROMPT, max_new_tokens=8, early_stop=False)
    output = decode(lm.network, [request], lm.decoder(block_size=8), record=Record(hidden=True))[0]
    assert output.hidden_GD is not None
    rebuilt = lm.network.head(output.hidden_GD)
    for position, step in enumerate(output.step_G.tolist()):
        before = [int(t) if s < step else MASK for t, s in zip(output.canvas_ids_G, output.step_G, strict=True)]
        expected = score([*PROMPT, *before])[len(PROMPT) + position]
        same(rebuilt[position], expected)


def block_causal(network: Network, tokens: list[int], block: int, start: int) -> Tensor:
    """Logits of an uncached forward with the attention written out; blocks count from `start`."""

    def block_of(p: int) -> int:
        return -1 if p < start else (p - start) // block

    every = range(len(tokens))
    visible = torch.tensor([[block_of(k) <= block_of(q) for k in every] for q in every])
    with torch.no_grad():
        return network.module(torch.tensor([tokens]), attention_mask=visible[None, None]).logits[0]


def uncached_blocks(network: Network, num_new: int, *, block: int, start: int, at_least: float) -> list[int]:
    """Block decoding by full forwards: all positions at or above the threshold, else the best one."""
    shifted = network.role.right_shift_logits
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + num_new:
        first = start + (len(tokens) - start) // block * block
        tokens += [MASK] * (first + block - len(tokens))
        while MASK in tokens[len(PROMPT) :]:
            logits = block_causal(network, tokens, block, start)
            if shifted:
                logits = torch.cat([logits[:1], logits[:-1]])
            logits[:, MASK] = -torch.inf
            best = logits.softmax(-1).max(-1)
            masks = [p for p in range(len(PROMPT), len(tokens)) if tokens[p] == MASK]
            # The row before a block does not see it, so its first position is never refined: it is final at once.
            chosen = [p for p in masks if best.values[p] >= at_least or (shifted and (p - start) % block == 0)]
            for p in chosen or [max(masks, key=lambda p: float(best.values[p]))]:
                tokens[p] = int(best.indices[p])
    return tokens[len(PROMPT) : len(PROMPT) + num_new]


@pytest.mark.parametrize("kind", [*DIFFUSION, "sdar"])
def test_cached_block_decoding_equals_uncached_across_block_borders(kind: str, tmp_path: Path) -> None:
    target = imported(tmp_path, kind)
    lm = load(target) if kind == "sdar" else load(target, role="block_causal", block_size=4)
    start = 0 if kind == "sdar" else len(PROMPT)
    found, steps = generate(lm, PROMPT, 14, threshold=0.15)
    assert found[:14] == uncached_blocks(lm.network, 14, block=4, start=start, at_least=0.15)
    assert 4 < int(steps.max()) < len(steps)  # neither a block at once nor one by one


def test_sdar_decodes_as_its_own_forward_says(tmp_path: Path) -> None:
    """Absolute blocks: the first one holds the last tokens of the prompt; one token a pass, the most confident."""
    lm = load(imported(tmp_path, "sdar"))
    score = scorer(tmp_path / "source", shifted=False)
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + 9:
        tokens += [MASK] * (4 - len(tokens) % 4)
        while MASK in tokens[len(PROMPT) :]:
            best = score(tokens).softmax(-1).max(-1)
            p = max(
                (p for p in range(len(PROMPT), len(tokens)) if tokens[p] == MASK), key=lambda p: float(best.values[p])
            )
            tokens[p] = int(best.indices[p])
    found, _ = generate(lm, PROMPT, 9, threshold=1.0)
    assert found == tokens[len(PROMPT) :]


@pytest.mark.parametrize("kind", ["llama", "llama 3.1", "smollm", "qwen2", "qwen3"])
def test_a_causal_import_decodes_like_transformers_generate(kind: str, tmp_path: Path) -> None:
    lm = load(imported(tmp_path, kind))
    stock = lm.network.module.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=EOS)
    output = decode(lm.network, [Request(prompt_ids=PROMPT, max_new_tokens=20)], lm.decoder())[0]
    assert output.token_ids == stock[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_an_imported_sliding_window_is_checked_and_decoded_as_transformers_does(kind: str, tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "source", kind), tmp_path / "target"
    edit_config(source, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    result = import_checkpoint(source, target, check=True)
    assert result.difference is not None
    assert result.difference < 1e-5
    lm = load(target)
    assert lm.network.architecture.sliding_window == 3
    stock = lm.network.module.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=EOS)
    output = decode(lm.network, [Request(prompt_ids=PROMPT, max_new_tokens=20)], lm.decoder())[0]
    assert output.token_ids == stock[0, len(PROMPT) :].tolist()


# Training

DOCUMENTS = [([7, 9, 11, 4], 6), ([3, 8, 4], 4), ([5, 6, 10, 12, 13, 4], 11)]
"""Prompts and lengths of answers: a block in part, exactly one, several; blocks have 4 positions."""


def documents_with_ends() -> Examples:
    """Answers that end with the end-of-text, all their tokens different."""
    firsts = (20, 30, 40)
    answers = [[*range(first, first + length - 1), EOS] for first, (_, length) in zip(firsts, DOCUMENTS, strict=True)]
    return Examples.from_ids([prompt for prompt, _ in DOCUMENTS], answers)


def packed_forwards(network: Network, objective: Objective, seed: int) -> list[tuple[Batch, Tensor, Tensor]]:
    """What an objective's forwards on one batch were given and gave: the batch, tokens [R, T], logits [S, V]."""
    stream = BatchStream(objective, rows=2, row_length=48, seed=seed, process=(0, 1))
    batch, found = stream.next_batch(), []

    def forward(
        tokens_RT: Tensor,
        positions_RT: Tensor,
        layout: Layout,
        rows_S: Tensor,
        adapted_RT: None = None,
        *,
        gradient: bool = True,
    ) -> Tensor:
        logits_RTV = network.module(tokens_RT, attention_mask=layout.dense(), position_ids=positions_RT).logits
        found.append((batch, tokens_RT, logits_RTV.flatten(0, 1)[rows_S]))
        return found[-1][2]

    objective.loss(forward, objective.prepare(batch, torch.Generator().manual_seed(seed)))
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", DIFFUSION)
def test_packed_training_of_an_imported_teacher_scores_what_its_plain_forward_scores(kind: str, tmp_path: Path) -> None:
    network = load(imported(tmp_path, kind), block_size=4).network
    shifted = network.role.right_shift_logits
    objective = MaskedDiffusionObjective(network.role, documents_with_ends(), EOS)
    for seed in range(2):
        ((batch, tokens_RT, logits_SV),) = packed_forwards(network, objective, seed)
        expected = []
        for document in range(len(batch.examples_N)):
            here_RT = batch.packed.document_RT == document
            tokens = tokens_RT[here_RT].tolist()
            logits_TV = plain_logits(tmp_path / "source", tokens)
            expected += [logits_TV[p - shifted] for p, token in enumerate(tokens) if token == MASK]
        same(logits_SV, torch.stack(expected))


def states_of(kind: str, role: Role) -> Objective:
    """Block states from references, or the CDLM states of trajectories that opened each block in some order."""
    examples = documents_with_ends()
    if kind == "references":
        return MaskedDiffusionObjective(role, examples, EOS)
    generator = torch.Generator().manual_seed(3)
    rank_P = torch.cat([torch.randperm(length, generator=generator) + 1 for _, length in DOCUMENTS])
    settings = CDLMSettings(direction="hard", denoising=0.0, untouched=0.3)
    return CDLMObjective(role, TrajectoryTable(examples, rank_P, None), EOS, settings=settings)


@torch.no_grad()
@pytest.mark.parametrize("states", ["references", "trajectories"])
@pytest.mark.parametrize("kind", DIFFUSION)
def test_packed_training_of_an_imported_student_scores_what_uncached_decoding_scores(
    kind: str, states: str, tmp_path: Path
) -> None:
    """Every target of every block; with Dream's shift the first one is scored by the last row before its block."""
    network = load(imported(tmp_path, kind), role="block_causal", block_size=4).network
    shifted = network.role.right_shift_logits
    at_borders = 0
    for seed in range(4):
        for number, (batch, tokens_RT, logits_SV) in enumerate(
            packed_forwards(network, states_of(states, network.role), seed)
        ):
            expected = []
            for document, example in enumerate(batch.examples_N.tolist()):
                prompt, length = DOCUMENTS[example]
                here_RT = batch.packed.document_RT == document
                segment_T, token_T = batch.packed.segment_RT[here_RT], tokens_RT[here_RT]
                noisy, clean = (token_T[segment_T == segment].tolist() for segment in (NOISY, CLEAN))
                for i in range(len(noisy) if states == "references" else length):
                    is_first = shifted and i % 4 == 0
                    # A first position is scored whether it is masked or not, but for the consistency loss's goal.
                    if noisy[i] == MASK or (is_first and number == 0):
                        start = i // 4 * 4
                        sequence = [*prompt, *clean[:start], *noisy[start : start + 4]]
                        logits_TV = block_causal(network, sequence, 4, len(prompt))
                        expected.append(logits_TV[len(prompt) + i - shifted])
                        at_borders += is_first and i > 0
            same(logits_SV, torch.stack(expected))
    assert bool(at_borders) == shifted


# Random weights of named shapes


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("tiny-")])
def test_a_folder_of_random_weights_loads_and_decodes(name: str, tmp_path: Path) -> None:
    num_parameters = write_random(name, tmp_path / "folder", dtype="float32")
    lm = load(tmp_path / "folder")
    assert lm.network.num_parameters == num_parameters
    assert lm.role == SHAPES[name].role
    output = lm.generate("hello", max_new_tokens=8, early_stop=False)
    assert len(output.canvas_ids_G) >= 8


def test_random_weights_follow_from_the_seed(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random("tiny-llama", tmp_path / folder, seed=seed)
    a, b, c = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in "abc")
    assert a == b != c


# Bad input


def edit_config(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(source: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the second shard, and the index with it."""
    file = source / "model-00002-of-00002.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    kept = {name: place for name, place in index["weight_map"].items() if place != file.name}
    (source / "model.safetensors.index.json").write_text(
        json.dumps({**index, "weight_map": kept | dict.fromkeys(weights, file.name)})
    )


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({name: tensor})


IN_SHARD_2 = sorted(SOURCES["llada"].names)[1]
BLOCK_1 = "model.transformer.blocks.1.q_proj.weight"


@pytest.mark.parametrize(
    ("kind", "spoil", "sentence"),
    [
        (
            "llada",
            lambda s: edit_config(s, model_type="mamba"),
            r"config\.json has the model_type 'mamba', which no importer",
        ),
        ("llada", lambda s: (s / "config.json").unlink(), "holds no config.json"),
        (
            "llada",
            lambda s: edit_config(s, block_type="sequential"),
            r"source: config\.json sets block_type to 'sequential'",
        ),
        ("llada", lambda s: edit_config(s, include_qkv_bias=True), "include_qkv_bias"),
        ("dream", lambda s: edit_config(s, use_sliding_window=True), "use_sliding_window"),
        ("qwen2", lambda s: edit_config(s, role="bidirectional"), "has a role|with a role already"),
        ("llama", lambda s: edit_config(s, quantization_config={"bits": 4}), "is quantised"),
        (
            "llada",
            lambda s: (s / "model-00002-of-00002.safetensors").unlink(),
            rf"the shard .*model-00002-of-00002\.safetensors is missing; .* says it holds {re.escape(IN_SHARD_2)}",
        ),
        (
            "llada",
            lambda s: edit_weights(s, drop(IN_SHARD_2)),
            rf"no weight file in .*source holds {re.escape(IN_SHARD_2)}",
        ),
        (
            "llada",
            lambda s: edit_weights(s, put("model.transformer.wpe.weight", torch.zeros(4, 4))),
            r"model-00002-of-00002\.safetensors holds model\.transformer\.wpe\.weight, which fits nowhere",
        ),
        (
            "dream",
            lambda s: edit_weights(s, put("model.layers.2.self_attn.q_proj.weight", torch.zeros(32, 32))),
            r"model\.layers\.2\.self_attn\.q_proj\.weight, which fits nowhere",
        ),
        (
            "llada",
            lambda s: edit_weights(s, put(IN_SHARD_2, torch.zeros(3, 5))),
            rf"{re.escape(IN_SHARD_2)} with the shape \[3, 5\]; config\.json makes it \[",
        ),
        (
            "llada",
            lambda s: edit_weights(
                s, put(IN_SHARD_2, torch.zeros(SOURCES["llada"].names[IN_SHARD_2], dtype=torch.int8))
            ),
            rf"{re.escape(IN_SHARD_2)} as I8",
        ),
        (
            "llada",
            lambda s: (s / "model-00001-of-00002.safetensors").write_bytes(
                (s / "model-00001-of-00002.safetensors").read_bytes()[:-8]
            ),
            r"model-00001-of-00002\.safetensors is no whole safetensors file: it has \d+ bytes",
        ),
        (
            "llada",
            lambda s: (s / "model-00001-of-00002.safetensors").write_bytes(b"<html>"),
            "no whole safetensors file: it has no readable header",
        ),
        (
            "llada",
            lambda s: [(s / "model.safetensors.index.json").unlink(), (s / "pytorch_model.bin").touch()],
            "neither model.safetensors nor .*pytorch_model.bin cannot be read safely",
        ),
        ("llada", lambda s: edit_config(s, mask_token_id=None), "has no mask token: .* set mask_token_id"),
        ("llada", lambda s: edit_config(s, mask_token_id=64), "has no token 64, which config.json calls mask_token_id"),
        ("sdar", lambda s: edit_config(s, block_size=None), "no 'block_size'"),
        ("llada", lambda s: (s / "tokenizer.json").unlink(), "has no tokenizer"),
        ("llada", lambda s: (s / "tokenizer.json").write_text("{}"), r"source/tokenizer\.json cannot be read"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_sentence_and_no_target(
    kind: str, spoil: Callable[[Path], Any], sentence: str, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source", kind)
    spoil(source)
    with pytest.raises(FewstepError, match=sentence):
        import_checkpoint(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failing_check_leaves_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", "llada")
    monkeypatch.setattr("fewstep.models.importers.convert.TOLERANCE", 0.0)
    with pytest.raises(FewstepError, match=r"the check failed: logits .* nothing was written"):
        import_checkpoint(source, tmp_path / "target", check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["q_proj", "ff_proj"])
def test_the_check_notices_a_wrong_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names of the table exchanged: shapes fit, so nothing but the logits can tell."""
    family = FAMILIES["llada"]
    other = {"q_proj": "attn_out", "ff_proj": "up_proj"}[name]
    one, two = (f"model.transformer.blocks.{{}}.{n}.weight" for n in (name, other))
    names = {**family.names, one: family.names[two], two: family.names[one]}
    monkeypatch.setitem(vars(family), "names", names)
    with pytest.raises(FewstepError, match="the check failed"):
        import_checkpoint(write_source(tmp_path / "source", "llada"), tmp_path / "target", check=True)


def test_an_existing_target_is_kept_unless_asked(tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "source", "llama"), tmp_path / "target"
    target.mkdir()
    (target / "note").write_text("mine")
    with pytest.raises(FewstepError, match="is not empty"):
        import_checkpoint(source, target)
    assert (target / "note").read_text() == "mine"
    import_checkpoint(source, target, overwrite=True)
    assert not (target / "note").exists()
    with pytest.raises(FewstepError, match="the same folder"):
        import_checkpoint(source, source, overwrite=True)


# The command


def test_the_command_imports_checks_and_reports(run: Run, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "dream")
    done = run("import", source, tmp_path / "target", "--check", "--json", tmp_path / "report.json")
    assert done.code == 0, done.err
    assert "(Dream) imported into" in done.err
    assert "logits differ by at most" in done.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["family"], report["role"], report["dtype"]) == ("Dream", "bidirectional", "float32")
    assert report["difference"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "target"], "no folder or GGUF file"),
        (["source"], "name the folder to write"),
        (["source", "target", "--dtype", "float32"], "belong to --random-weights"),
        (["source", "target", "--random-weights", "tiny-dream"], "takes one folder to write"),
        (["target", "--random-weights", "tiny-drem"], "unknown shape 'tiny-drem'"),
        (["target", "--random-weights", "tiny-dream", "--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(
    arguments: list[str], sentence: str, run: Run, tmp_path: Path
) -> None:
    write_source(tmp_path / "source", "llama")
    places = {name: str(tmp_path / name) for name in ("source", "target", "nowhere")}
    said = run("import", *(places.get(argument, argument) for argument in arguments)).sentence()
    assert re.search(sentence, said)
    assert not (tmp_path / "target").exists()


# GGUF


def write_gguf(
    path: Path,
    architecture: str,
    *,
    quantisation: str = "F32",
    extra: str | None = None,
    scaling: str | None = None,
    ends: dict[str, int] | None = None,
) -> Path:
    """A tiny causal model as llama.cpp writes it: its names, and for llama its order of query and key rows."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    generator = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    if architecture == "llama":
        writer.add_rope_dimension_count(HEAD_WIDTH)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
    writer.add_vocab_size(VOCABULARY)
    words = ["<pad>", "<eos>", "01", *(chr(code) for code in range(ord("0"), ord("0") + VOCABULARY - 3))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if architecture == "llama" else "qwen2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, *[1] * (VOCABULARY - 2)])
    writer.add_token_merges(["0 1"])
    writer.add_eos_token_id(EOS)
    for name, token_id in (ends or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    writer.add_pad_token_id(0)
    kind = gguf.GGMLQuantizationType[quantisation]

    def add(name: str, *shape: int) -> None:
        tensor = torch.randn(shape, generator=generator) * 0.5 if len(shape) > 1 else torch.ones(shape)
        if len(shape) == 1 or quantisation == "F32":
            writer.add_tensor(name, tensor.numpy())
        elif quantisation == "Q8_1":  # of intermediate results only, so there is nothing that packs or unpacks it
            rows = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor(name, torch.zeros(rows, dtype=torch.uint8).numpy(), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, WIDTH)
    add("output_norm.weight", WIDTH)
    add("output.weight", VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", WIDTH)
        add(f"{block}.ffn_norm.weight", WIDTH)
        for name, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2)):
            add(f"{block}.attn_{name}.weight", rows, WIDTH)
            if architecture == "qwen2":
                add(f"{block}.attn_{name}.bias", rows)
        add(f"{block}.attn_output.weight", WIDTH, WIDTH)
        add(f"{block}.ffn_gate.weight", HIDDEN, WIDTH)
        add(f"{block}.ffn_up.weight", HIDDEN, WIDTH)
        add(f"{block}.ffn_down.weight", WIDTH, HIDDEN)
    if extra is not None:
        add(extra, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("architecture", "quantisation"), [("llama", "F32"), ("llama", "Q8_0"), ("qwen2", "Q4_1")])
def test_a_gguf_file_becomes_a_causal_folder(architecture: str, quantisation: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture, quantisation=quantisation)
    result = import_checkpoint(path, tmp_path / "target", check=True)
    assert result.difference is not None
    assert result.difference < 1e-5
    lm = load(tmp_path / "target")
    assert lm.role.name == "autoregressive"
    output = decode(lm.network, [Request(prompt_ids=PROMPT, max_new_tokens=8)], lm.decoder())[0]
    stock = lm.network.module.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=EOS)
    assert output.token_ids == stock[0, len(PROMPT) :].tolist()


def test_a_gguf_file_may_name_several_end_tokens(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", ends={"eot": 7, "eom": 9, "unknown": 11})
    import_checkpoint(path, tmp_path / "target")
    assert load(tmp_path / "target").network.stop_token_ids == (EOS, 7, 9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architecture": "mamba"}, "has the architecture 'mamba', which no importer knows"),
        ({"quantisation": "Q8_1"}, r"holds token_embd\.weight in the quantisation Q8_1, which cannot be read"),
        ({"extra": "rope_freqs.weight"}, r"holds rope_freqs\.weight, which fits nowhere"),
        ({"scaling": "yarn"}, r"sets llama\.rope\.scaling\.type to 'yarn': its positions are scaled"),
        ({"extra": "blk.2.attn_norm.weight"}, r"holds blk\.2\.attn_norm\.weight, which fits nowhere"),
    ],
)
def test_a_gguf_that_cannot_be_read_is_one_sentence(change: dict[str, str], sentence: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", **{"architecture": "llama", **change})
    with pytest.raises(FewstepError, match=sentence):
        import_checkpoint(path, tmp_path / "target")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_a_damaged_gguf_is_one_sentence(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FewstepError, match="cannot be read as a GGUF file"):
        import_checkpoint(path, tmp_path / "target")
    path.write_bytes(b"<html>")
    with pytest.raises(FewstepError, match="cannot be read as a GGUF file"):
        import_checkpoint(path, tmp_path / "target")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
