"""GGUF files of causal models, read by transformers; weights are written in float32, as they are once unpacked.

llama.cpp keeps the layouts of the original networks but for one thing: in the architecture `llama` it turns the pairs
(2f, 2f + 1) of a head instead of (f, f + E/2), and permutes the rows of the query and key weights accordingly.

Axes as in `plain`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from fewstep.errors import FewstepError
from fewstep.models.importers import plain
from fewstep.models.importers.weight_files import Entry, grouped, write_shards

ARCHITECTURES = ("llama", "qwen2", "qwen3")
LARGEST_SHARD_BYTES = 4_000_000_000

_LAYER_TENSORS = {
    *("attn_norm.weight", "attn_output.weight", "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight"),
    *("ffn_down.weight", "attn_q_norm.weight", "attn_k_norm.weight"),
    *(f"attn_{name}.{kind}" for name in "qkv" for kind in ("weight", "bias")),
}
_OTHER_TENSORS = {"token_embd.weight", "output_norm.weight", "output.weight"}


@dataclass(frozen=True, kw_only=True)
class GGUFModel:
    """What a file says, its weights not read yet."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    end_tokens: list[int]
    num_parameters: int


def read(path: Path) -> GGUFModel:
    """FewstepError if the file is damaged, of an unknown architecture or quantisation, or holds a foreign tensor."""
    # Asked for first, since transformers reports their absence in its own words.
    import accelerate  # noqa: F401
    from gguf import dequantize

    tensors, fields = _open(path)
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise FewstepError(
            f"{path} has the architecture {architecture!r}, which no importer knows; "
            f"known are {', '.join(ARCHITECTURES)}"
        )
    for setting in ("rope.scaling.type", "rope.scale_linear"):
        scaling = fields.get(f"{architecture}.{setting}", "none")
        if scaling not in ("none", 1.0):
            raise FewstepError(
                f"{path} sets {architecture}.{setting} to {scaling!r}: its positions are scaled, which transformers "
                "does not read from GGUF files; import the original folder"
            )
    if fields.get(f"{architecture}.attention.sliding_window"):
        raise FewstepError(
            f"{path} sets {architecture}.attention.sliding_window, which transformers does not read from GGUF files; "
            "import the original folder"
        )
    readable = set()
    for name, tensor in tensors.items():
        if not _known(name, fields.get(f"{architecture}.block_count", 0)):
            raise FewstepError(
                f"{path} holds {name}, which fits nowhere in a {architecture} network of stock transformers"
            )
        if tensor.tensor_type not in readable:
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except (NotImplementedError, ValueError) as error:  # no reader, or data it does not fit
                raise FewstepError(
                    f"{path} holds {name} in the quantisation {tensor.tensor_type.name}, which cannot be read; "
                    "choose a file in another one, such as Q8_0"
                ) from error
            readable.add(tensor.tensor_type)
    with _reading(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, config=config)
    for foreign in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, foreign):
            delattr(config, foreign)
    if fields.get("tokenizer.ggml.pre") == "smollm":
        # transformers leaves it at GPT-2's splitting, which joins the spaces before a number otherwise.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ends = _end_tokens(fields, len(tokenizer))
    if tokenizer.eos_token_id is None and ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.eos_token_id is None:
        raise FewstepError(f"{path} names no end-of-text token (tokenizer.ggml.eos_token_id)")
    return GGUFModel(
        config=config,
        tokenizer=tokenizer,
        end_tokens=list(dict.fromkeys([tokenizer.eos_token_id, *ends])),
        num_parameters=sum(torch.Size(tensor.shape.tolist()).numel() for tensor in tensors.values()),
    )


def _end_tokens(fields: Mapping[str, Any], num_tokens: int) -> list[int]:
    """Ends of the text, of a turn and of a message, each of which ends an answer."""
    named = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return [int(token_id) for token_id in named if token_id is not None and 0 <= token_id < num_tokens]


def _known(name: str, num_layers: int) -> bool:
    """Whether stock transformers has a place for the tensor; what it does not know it leaves out in silence."""
    layer = re.match(r"blk\.(\d+)\.(.*)", name)
    if layer is None:
        return name in _OTHER_TENSORS
    return int(layer[1]) < num_layers and layer[2] in _LAYER_TENSORS


def write_weights(path: Path, folder: Path) -> None:
    """The stock network's tensors, in float32."""
    with _reading(path):
        module, report = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            key = sorted(map(str, report[kind]))[0]
            raise FewstepError(
                f"the weights in {path} do not fit its own settings: {kind.replace('_', ' ')}, first {key}"
            )
    tied = {"lm_head.weight"} if module.config.tie_word_embeddings else set()
    entries = [in_memory(name, tensor) for name, tensor in module.state_dict().items() if name not in tied]
    write_shards(folder, list(grouped(entries, LARGEST_SHARD_BYTES)))


def in_memory(name: str, tensor: Tensor) -> Entry:
    """A float32 tensor to write."""

    def write(stream: IO[bytes]) -> None:
        tensor.detach().contiguous().numpy().tofile(stream)

    return Entry(name=name, dtype="F32", shape=tuple(tensor.shape), write=write)


def forward(path: Path, tokens_T: Tensor) -> Tensor:
    """Logits [T, V] in float32, as llama.cpp defines the network, from tensors under the file's own names."""
    from gguf import dequantize

    tensors, fields = _open(path)
    architecture = fields["general.architecture"]

    def weights(name: str) -> Tensor | None:
        tensor = tensors.get(name)
        return None if tensor is None else torch.tensor(dequantize(tensor.data, tensor.tensor_type))

    def setting(name: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{name}", default)

    def given(name: str) -> Tensor:
        tensor = weights(name)
        assert tensor is not None, name
        return tensor

    num_heads, epsilon = setting("attention.head_count"), setting("attention.layer_norm_rms_epsilon")
    width = setting("attention.key_length") or setting("embedding_length") // num_heads
    rotate = plain.rotate_neighbours if architecture == "llama" else plain.rotate_halves
    angles_TF = plain.angles(len(tokens_T), width, setting("rope.freq_base", 10_000.0))
    visible_TT = plain.blocks_visible(len(tokens_T), 1)
    embedding_VD = given("token_embd.weight")
    x_TD = embedding_VD[tokens_T]
    for layer in range(setting("block_count")):
        block = f"blk.{layer}"

        def heads_of(name: str, y_TD: Tensor, prefix: str = f"{block}.attn") -> Tensor:
            weight, bias = weights(f"{prefix}_{name}.weight"), weights(f"{prefix}_{name}.bias")
            y_THE = plain.linear(y_TD, weight, bias).unflatten(-1, (-1, width))
            norm_E = weights(f"{prefix}_{name}_norm.weight")
            return y_THE if norm_E is None else plain.rms_norm(y_THE, norm_E, epsilon)

        y_TD = plain.rms_norm(x_TD, given(f"{block}.attn_norm.weight"), epsilon)
        q_THE, k_THE = (rotate(heads_of(name, y_TD), angles_TF) for name in "qk")
        y_TD = plain.attend(q_THE, k_THE, heads_of("v", y_TD), visible_TT)
        x_TD = x_TD + plain.linear(y_TD, given(f"{block}.attn_output.weight"))
        y_TD = plain.rms_norm(x_TD, given(f"{block}.ffn_norm.weight"), epsilon)
        x_TD = x_TD + plain.gated(y_TD, *(given(f"{block}.ffn_{name}.weight") for name in ("gate", "up", "down")))
    x_TD = plain.rms_norm(x_TD, given("output_norm.weight"), epsilon)
    head_VD = weights("output.weight")
    return plain.linear(x_TD, embedding_VD if head_VD is None else head_VD)


def _open(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Tensors by name, mapped and not read, and the settings other than lists."""
    from gguf import GGUFReader

    with _reading(path):
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        return {tensor.name: tensor for tensor in reader.tensors}, fields


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # readers of damaged files fail in every way, the Rust tokenizers with a bare Exception
        reason = " ".join(str(error).split())
        raise FewstepError(f"{path} cannot be read as a GGUF file: {reason[:300]}") from error
