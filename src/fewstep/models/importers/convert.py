"""A checkpoint of a known family as a plain folder that stock transformers and `fewstep.load` read."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fewstep.errors import FewstepError
from fewstep.files import write_folder_whole
from fewstep.json_files import write_json_whole
from fewstep.models.checkpoint_files import (
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
    check_files,
    check_generation_config,
    read_object,
    reading,
)
from fewstep.models.importers import causal, gguf_files
from fewstep.models.importers.carried import (
    complete_tokens,
    copy_settings,
    mask_token_id,
    name_mask_token,
    read_tokenizer,
    save_tokenizer,
)
from fewstep.models.importers.dream import DREAM
from fewstep.models.importers.family import Config, Family
from fewstep.models.importers.llada import LLADA
from fewstep.models.importers.sdar import SDAR
from fewstep.models.importers.weight_files import Place, check_fit, copied, read_places, write_shards
from fewstep.models.network import Network, Plan
from fewstep.models.roles import Role
from fewstep.models.vocabulary import end_tokens_named

FAMILIES = {family.model_type: family for family in (DREAM, LLADA, SDAR, *causal.FAMILIES)}


def not_in_transformers(model_type: str, name: str) -> FewstepError:
    """The error for a checkpoint whose family is not in transformers: it has to be imported before it is loaded.

    Code that a checkpoint brings is never run.
    """
    by_name = {family.lower(): family for family in FAMILIES if family not in CONFIG_MAPPING}
    if model_type.lower() in by_name:
        return FewstepError(
            f"{name} is a {by_name[model_type.lower()]} checkpoint as it is published, whose code is not in "
            f"transformers; run `fewstep import {name} NEW_FOLDER` and use the new folder"
        )
    return FewstepError(
        f"{name} is of the family {model_type!r}, whose code is not in transformers, and fewstep runs no code of a "
        f"checkpoint; `fewstep import` reads {', '.join(by_name.values())} besides the families of transformers"
    )


TOLERANCE = 1e-5
"""Largest difference of logits in float32 that the check accepts, as a share of the largest logit or of 1."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import made. `difference`: of the logits, as TOLERANCE counts it; None if they were not compared."""

    target: Path
    family: str
    role: str
    num_parameters: int
    dtype: str
    difference: float | None


def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    block_size: int | None = None,
    mask_token: str | None = None,
    check: bool = False,
    overwrite: bool = False,
) -> Imported:
    """Write the folder or GGUF file `source` as the plain folder `target`, whole or not at all.

    `block_size` replaces what the checkpoint says. `mask_token` names the mask token of a model that has none, so that
    it can be trained into a diffusion teacher. With `check` the logits of the result, as loaded by stock
    transformers, are compared with those of the family's plain forward on the source. FewstepError, naming file and
    tensor, for whatever does not fit.
    """
    source, target = Path(source), Path(target)
    if os.path.realpath(source) == os.path.realpath(target):
        raise FewstepError(f"the source and the target are the same folder {source}; choose another target")
    transformers_logging.disable_progress_bar()
    if source.is_file():
        if block_size is not None:
            raise FewstepError("a GGUF file holds a causal model, which has no block_size")
        conversion = _convert_gguf(source, mask_token)
    else:
        conversion = _convert_folder(source, block_size, mask_token)
    with write_folder_whole(target, overwrite=overwrite) as folder:
        conversion.write(folder)
        difference = _difference(folder, conversion) if check else None
        if difference is not None and difference > TOLERANCE:
            raise FewstepError(
                f"the check failed: logits of the imported network differ by {difference:.1e} of the largest from the "
                f"plain {conversion.family} forward on {source}, more than {TOLERANCE:.0e}; nothing was written"
            )
    return Imported(
        target=target,
        family=conversion.family,
        role=conversion.role.name,
        num_parameters=conversion.num_parameters,
        dtype=conversion.dtype,
        difference=difference,
    )


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    """All of it worked out and checked, nothing written. `forward`: logits [T, V] of the source for tokens [T]."""

    family: str
    role: Role
    tokenizer: PreTrainedTokenizerBase
    num_parameters: int
    dtype: str
    write: Callable[[Path], None]
    forward: Callable[[Tensor], Tensor]


def _convert_folder(source: Path, block_size: int | None, mask_token: str | None) -> _Conversion:
    config = _read_config(source)
    if block_size is not None:
        config = {**config, "block_size": block_size}
    family = FAMILIES[config["model_type"]]
    check_generation_config(source)
    with reading(source / CONFIG):
        try:
            stock = family.stock_config(config)
        except FewstepError as error:
            raise FewstepError(f"{source}: {error}") from None
        places = read_places(source)
        if stock.num_hidden_layers > len(places):
            raise FewstepError(
                f"{source / CONFIG} speaks of {stock.num_hidden_layers} layers, and the weights beside it are "
                f"{len(places)} tensors"
            )
        matched = _matched(places, family, stock, source)

    tokenizer = read_tokenizer(source, stock_class=family.tokenizer_class)
    if mask_token is not None:
        name_mask_token(tokenizer, mask_token, vocab_size=stock.vocab_size)
    mask = mask_token_id(source, config, tokenizer)
    ends = end_tokens_named(source)
    complete_tokens(tokenizer, source=source, mask_token_id=mask, end_tokens=ends)
    stock.eos_token_id = config.get("eos_token_id") or tokenizer.eos_token_id  # in place of the class's default
    role = _role(family, config, mask, source)
    dtype = max(matched.values(), key=lambda place: place.num_bytes).dtype

    def write(folder: Path) -> None:
        write_config(stock, role, _DTYPE_NAMES[dtype], folder)
        save_tokenizer(tokenizer, folder)
        copy_settings(source, folder)
        files = dict.fromkeys(place.file for place in matched.values())
        write_shards(
            folder,
            [[copied(place, name) for name, place in matched.items() if place.file == file] for file in files],
        )

    by_original_name = {place.name: place for place in matched.values()}

    def weights(name: str) -> Tensor | None:
        place = by_original_name.get(name)
        return None if place is None else place.read()

    return _Conversion(
        family=family.model_type,
        role=role,
        tokenizer=tokenizer,
        num_parameters=sum(torch.Size(place.shape).numel() for place in matched.values()),
        dtype=_DTYPE_NAMES[dtype],
        write=write,
        forward=lambda tokens_T: family.forward(config, weights, tokens_T),
    )


def _convert_gguf(source: Path, mask_token: str | None) -> _Conversion:
    model = gguf_files.read(source)
    if mask_token is not None:
        name_mask_token(model.tokenizer, mask_token, vocab_size=model.config.vocab_size)
    role = Role(name="autoregressive", mask_token_id=model.tokenizer.mask_token_id)

    def write(folder: Path) -> None:
        gguf_files.write_weights(source, folder)
        write_config(model.config, role, "float32", folder)
        save_tokenizer(model.tokenizer, folder)
        write_json_whole(folder / GENERATION_CONFIG, {"eos_token_id": model.end_tokens})

    return _Conversion(
        family=f"gguf {model.config.model_type}",
        role=role,
        tokenizer=model.tokenizer,
        num_parameters=model.num_parameters,
        dtype="float32",
        write=write,
        forward=lambda tokens_T: gguf_files.forward(source, tokens_T),
    )


def _read_config(source: Path) -> Config:
    if not source.is_dir():
        raise FewstepError(f"there is no folder or GGUF file {source}")
    check_files(source)
    if (source / ADAPTER_CONFIG).exists():
        raise FewstepError(f"{source} is an adapter; `fewstep merge` makes a plain folder of it and its base")
    if not (source / CONFIG).exists():
        raise FewstepError(f"{source} holds no config.json, which says what kind of model it is")
    config = read_object(source / CONFIG)
    if config.get("model_type") not in list(FAMILIES):  # which may be of a type that no dictionary takes
        raise FewstepError(
            f"{source / 'config.json'} has the model_type {config.get('model_type')!r}, which no importer knows; "
            f"known are {', '.join(FAMILIES)} and GGUF files"
        )
    if "role" in config:
        raise FewstepError(f"{source} is a plain folder with a role already; use it as it is")
    if config.get("quantization_config"):
        raise FewstepError(f"{source} is quantised (quantization_config in its config.json); import the original")
    return config


def _matched(places: list[Place], family: Family, stock: PreTrainedConfig, source: Path) -> dict[str, Place]:
    """Tensors by stock name, each in its place; FewstepError naming the one that is not."""
    matched: dict[str, Place] = {}
    for place in places:
        if place.name.endswith("rotary_emb.inv_freq"):
            continue  # a table that older versions stored; it follows from config.json
        name = family.stock_name(place.name) or place.name
        if name in matched:
            raise FewstepError(f"{place.file} holds {place.name} a second time; the first is in {matched[name].file}")
        matched[name] = place
    expected = expected_shapes(stock)
    optional = {"lm_head.weight"} if stock.tie_word_embeddings else set()
    check_fit(matched, expected)
    missing = [name for name in expected if name not in matched and name not in optional]
    if missing:
        raise FewstepError(f"no weight file in {source} holds {family.original_name(missing[0])}")
    return matched


def _role(family: Family, config: Config, mask: int | None, source: Path) -> Role:
    if mask is None and family.needs_mask:
        raise FewstepError(
            f"the {family.model_type} checkpoint in {source} has no mask token: neither config.json, "
            "generation_config.json nor the tokenizer names one; set mask_token_id in config.json"
        )
    try:
        return family.role(config, mask)
    except FewstepError as error:
        raise FewstepError(f"{source}: {error}") from None


_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def expected_shapes(stock: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the stock network's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in _hollow(stock).state_dict().items()}


def _hollow(stock: PreTrainedConfig) -> PreTrainedModel:
    """The stock network without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(stock)


def write_config(stock: PreTrainedConfig, role: Role, dtype: str, folder: Path) -> None:
    """config.json of the stock class with the role's keys."""
    stock.architectures = [type(_hollow(stock)).__name__]
    stock.dtype = dtype
    for key, value in role.to_config().items():
        setattr(stock, key, value)
    stock.save_pretrained(folder)


# The check


def _difference(folder: Path, conversion: _Conversion) -> float:
    """Largest difference between the target's logits and the source's, as a share of the largest logit or of 1."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    network = Network(module, conversion.role, conversion.tokenizer)
    tokens_T = _some_tokens(network)
    with torch.no_grad():
        expected_TV = conversion.forward(tokens_T)
        logits_TV = module.get_output_embeddings()(network.hidden(_full_plan(network.role, tokens_T)))[0]
    return float((logits_TV - expected_TV).abs().max() / expected_TV.abs().max().clamp(min=1))


def _some_tokens(network: Network) -> Tensor:
    """Random tokens over a few blocks, every third of them masked if there is a mask token."""
    role = network.role
    num_positions = 2 * role.block_size + 3 if role.name == "block_causal" else 24
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(network.vocab_size, (num_positions,), generator=generator)
    if role.name != "autoregressive" and role.mask_token_id is not None:
        tokens_T[2::3] = role.mask_token_id
    return tokens_T


def _full_plan(role: Role, tokens_T: Tensor) -> Plan:
    positions_1T = torch.arange(len(tokens_T))[None]
    context_length_11 = torch.tensor([[len(tokens_T) // 3]])
    return Plan(
        kind="full",
        tokens_RQ=tokens_T[None],
        positions_RQ=positions_1T,
        blocks_RQ=role.blocks(positions_1T, context_length_11),
        slots_RQ=None,
        scored_RS=positions_1T,
    )
