"""Named shapes with random weights, as folders or in memory: tests, and speed work without a download."""

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2Tokenizer

from fewstep.errors import FewstepError, suggestion
from fewstep.files import write_folder_whole
from fewstep.models.checkpoint_files import CONFIG, VOCABULARIES
from fewstep.models.importers.carried import save_tokenizer
from fewstep.models.importers.convert import expected_shapes, write_config
from fewstep.models.importers.weight_files import Entry, grouped, write_shards
from fewstep.models.load import free_memory, holding, load_tokenizer, open_checkpoint, place_named, read_config
from fewstep.models.names import bundled_names
from fewstep.models.network import Network
from fewstep.models.roles import Role
from fewstep.models.tiny import tiny_tokenizer

LARGEST_SHARD_BYTES = 4_000_000_000
STANDARD_DEVIATION = 0.02
"""Of the matrices, as transformers draws them; norms are one and biases zero."""

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}  # of the tokenizer that goes with the folder
_MASK_TOKEN_ID = 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A stock class with its sizes, and the role it plays."""

    model_type: str
    sizes: Mapping[str, Any]
    role: Role

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(self.model_type, **self.sizes, **_TOKENS)

    def varied(self, **sizes: Any) -> "Shape":
        return Shape(model_type=self.model_type, sizes={**self.sizes, **sizes}, role=self.role)


def _sizes(
    vocabulary: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int],
    positions: int,
    theta: float,
    *,
    epsilon: float = 1e-5,
    tied: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """`heads`: of queries and of keys."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": tied,
        **others,
    }


_TINY = _sizes(64, 32, 64, 2, (4, 2), 512, 10_000.0)
_CAUSAL = Role(name="autoregressive")
_DREAM = Role(name="bidirectional", mask_token_id=_MASK_TOKEN_ID, right_shift_logits=True)
_LLADA = Role(name="bidirectional", mask_token_id=_MASK_TOKEN_ID)
_SDAR = Role(name="block_causal", mask_token_id=_MASK_TOKEN_ID, block_size=4, context_attention="block_causal")
_QWEN_7B = _sizes(152_064, 3584, 18_944, 28, (28, 4), 131_072, 1e6, epsilon=1e-6)
_LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES = {
    "dream-7b": Shape(model_type="qwen2", sizes=_QWEN_7B, role=_DREAM),
    "qwen2.5-7b": Shape(model_type="qwen2", sizes={**_QWEN_7B, "max_position_embeddings": 32_768}, role=_CAUSAL),
    "llada-8b": Shape(
        model_type="llama", sizes=_sizes(126_464, 4096, 12_288, 32, (32, 32), 4096, 500_000.0), role=_LLADA
    ),
    "llama-3.1-8b": Shape(
        model_type="llama",
        sizes=_sizes(128_256, 4096, 14_336, 32, (32, 8), 131_072, 500_000.0, rope_scaling=_LLAMA_31),
        role=_CAUSAL,
    ),
    "smollm2-135m": Shape(
        model_type="llama", sizes=_sizes(49_152, 576, 1536, 30, (9, 3), 8192, 100_000.0, tied=True), role=_CAUSAL
    ),
    "tiny-dream": Shape(model_type="qwen2", sizes=_TINY, role=_DREAM),
    "tiny-llada": Shape(model_type="llama", sizes=_TINY, role=_LLADA).varied(num_key_value_heads=4),
    "tiny-sdar": Shape(model_type="qwen3", sizes=_TINY, role=_SDAR).varied(head_dim=8),
    "tiny-llama": Shape(model_type="llama", sizes=_TINY, role=_CAUSAL),
    "tiny-qwen2": Shape(model_type="qwen2", sizes=_TINY, role=_CAUSAL),
}


def write_random(
    name: str, target: str | Path, *, dtype: str = "bfloat16", seed: int = 0, overwrite: bool = False
) -> int:
    """Write a folder of the shape `name` with random weights and a tokenizer of single characters.

    Returns the number of parameters. A tensor depends on seed and name only. FewstepError for an unknown shape or
    dtype, or if `target` is there and not `overwrite`.
    """
    if name not in SHAPES:
        raise FewstepError(f"unknown shape {name!r}; choose one of {', '.join(SHAPES)}")
    if dtype not in _DTYPES:
        raise FewstepError(f"unknown dtype {dtype!r}; choose one of {', '.join(_DTYPES)}")
    shape = SHAPES[name]
    config = shape.config()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    entries = [
        _random(tensor, sizes, dtype, seed) for tensor, sizes in expected_shapes(config).items() if tensor not in tied
    ]
    with write_folder_whole(target, overwrite=overwrite) as folder:
        write_config(config, shape.role, dtype, folder)
        save_tokenizer(tiny_tokenizer_for(shape.model_type, config.vocab_size), folder)
        write_shards(folder, list(grouped(entries, LARGEST_SHARD_BYTES)))
    return sum(torch.Size(entry.shape).numel() for entry in entries)


def random_network(name: str, *, dtype: str = "auto", device: str = "auto", seed: int = 0) -> Network:
    """A network of the shape `name`, or of the shape of a bundled model or folder, with random weights.

    They are drawn on the device, so that billions take seconds on a GPU. A shape of SHAPES has a tokenizer of single
    characters, a model's shape has the model's. FewstepError for an unknown shape, or one that does not fit.
    """
    numbers, place = place_named(dtype, device)
    config, role, tokenizer = _described(name)
    needed = sum(torch.Size(sizes).numel() for sizes in expected_shapes(config).values()) * numbers.itemsize
    free = free_memory(place)
    if free is not None and needed > free:
        raise FewstepError(
            f"the shape {name} needs {needed / 1e9:.1f} GB for its weights in {str(numbers).removeprefix('torch.')}, "
            f"and {place} has {free / 1e9:.1f} GB free; choose a smaller shape or another device"
        )
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), torch.device(place):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config, dtype=numbers)
    module.generation_config.eos_token_id = None  # the tokenizer alone says what ends an answer
    network = Network(module, role, tokenizer, name=name)
    network.may_round = dtype == "auto"
    return network


def _described(name: str) -> tuple[PreTrainedConfig, Role, PreTrainedTokenizerBase]:
    """What is known of a shape, or of the model whose shape it is. FewstepError for a name that is neither."""
    if name in SHAPES:
        config = SHAPES[name].config()
        return config, SHAPES[name].role, tiny_tokenizer_for(SHAPES[name].model_type, config.vocab_size)
    check_shape(name)
    folders = open_checkpoint(name)
    config = read_config(holding(folders, CONFIG))
    return config, Role.from_config(config), load_tokenizer(holding(folders, *VOCABULARIES))


def check_shape(name: str) -> None:
    """FewstepError with the closest one unless it is a shape, a bundled model or a folder."""
    if name in SHAPES or name in bundled_names() or (name and Path(name).is_dir()):
        return
    raise FewstepError(f"unknown shape {name!r}; {suggestion(name, [*SHAPES, *bundled_names()])}")


def tiny_tokenizer_for(model_type: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Single characters; for Qwen2, whose folders' tokenizers transformers reads as Qwen2's, spelled as it spells."""
    plain = tiny_tokenizer(vocab_size)
    if model_type != "qwen2":
        return plain
    spelling = {" ": "\u0120", "\n": "\u010a"}  # of the byte-level alphabet
    return Qwen2Tokenizer(
        vocab={spelling.get(token, token): index for token, index in plain.get_vocab().items()},
        merges=[],
        unk_token=None,
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        mask_token=plain.mask_token,
        additional_special_tokens=["<answer>"],
        chat_template=plain.chat_template,
    )


def _random(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> Entry:
    """Written from a pool of numbers, from a place on that the name decides: drawing billions would take minutes."""

    def write(stream: IO[bytes]) -> None:
        left = torch.Size(shape).numel()
        if len(shape) == 1:
            constant = torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=getattr(torch, dtype))
            constant.view(torch.uint8).numpy().tofile(stream)
            return
        pool = _pool(dtype, seed)
        start = zlib.crc32(name.encode()) % len(pool)
        while left:
            piece = pool[start : start + left]
            piece.view(torch.uint8).numpy().tofile(stream)
            left -= len(piece)
            start = 0

    return Entry(name=name, dtype=_DTYPES[dtype], shape=shape, write=write)


_POOL_SIZE = 16_777_259
"""A prime, so that the rows of a matrix do not repeat."""


@functools.lru_cache(maxsize=1)
def _pool(dtype: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(_POOL_SIZE).normal_(std=STANDARD_DEVIATION, generator=generator).to(getattr(torch, dtype))
