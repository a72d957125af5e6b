"""Networks from disk and back: plain Hugging Face folders, PEFT adapters, bundled names, hub ids.

Weights are read from safetensors only, and code found in a checkpoint is never executed.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from fewstep.errors import FewstepError
from fewstep.files import give_usual_mode
from fewstep.models.adapters import base_name, merge
from fewstep.models.calibration import KEY as CALIBRATION
from fewstep.models.calibration import calibration_in
from fewstep.models.checkpoint_files import (
    ADAPTER_CONFIG,
    CONFIG,
    GATED,
    TOKENIZER_CONFIG,
    VOCABULARIES,
    check_files,
    check_generation_config,
    hub_folder,
    name_damaged_json,
    read_object,
    reading,
)
from fewstep.models.embedding_space import EmbeddingSpace
from fewstep.models.importers.weight_files import read_places
from fewstep.models.names import local_folder
from fewstep.models.network import Network
from fewstep.models.noise_conditioning import PART, attach
from fewstep.models.roles import EMBEDDING_SPACE, Role, RoleName
from fewstep.models.vocabulary import end_tokens_named, set_end_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


Folders = tuple[Path, ...]
"""What makes one model: the folder of a plain one, or that of an adapter and those of its base."""


def holding(folders: Folders, *names: str) -> Path:
    """The folder nearest to the adapter with one of these files, the last base's if none has."""
    *adapters, base = folders
    return next((folder for folder in adapters if any((folder / name).exists() for name in names)), base)


def open_checkpoint(name: str | Path) -> Folders:
    """The folders of a bundled name, a folder (plain or PEFT adapter) or a hub id, which is fetched.

    FewstepError if one is not there, or holds no model.
    """
    folders = [resolve(name)]
    while True:
        folder = folders[-1]
        check_files(folder)
        if not (folder / ADAPTER_CONFIG).exists():
            if not (folder / CONFIG).exists():
                raise FewstepError(f"{folder} holds no config.json; a model folder needs one beside its safetensors")
            return tuple(folders)
        base = base_name(folder)
        try:
            beside = Path(os.path.realpath(folder / base))
            folders.append(beside if beside.is_dir() else resolve(base))
        except (FewstepError, OSError, ValueError) as error:
            raise FewstepError(
                f"{folder / ADAPTER_CONFIG} names the base {base[:100]!r}, which is not there ({error}); "
                "set base_model_name_or_path to its folder or hub id"
            ) from error
        *adapters, last = map(os.path.realpath, folders)
        if last in adapters:
            raise FewstepError(
                f"{folder / ADAPTER_CONFIG} names the adapter itself as its base; name the model it is for"
            )


def resolve(name: str | Path) -> Path:
    """The folder of a bundled name, a path or a hub id, which is fetched. FewstepError if there is none."""
    return local_folder(name) or hub_folder(str(name))


def load_network(
    name: str | Path,
    *,
    role: RoleName | None = None,
    dtype: str = "auto",
    device: str = "auto",
    block_size: int | None = None,
    merged_in: torch.dtype = torch.float32,
) -> Network:
    """Load a bundled name, a folder (plain or PEFT adapter, which is merged) or a hub id; FewstepError if it cannot be.

    `role` and `block_size` override what the checkpoint says. `dtype="auto"` is bfloat16 on a GPU and float32 on a CPU;
    `device="auto"` is the GPU if there is one. Tensors go from the files straight to the device, one after the other
    (an adapter is merged in host memory first, in the numbers `merged_in`); a folder that does not fit is refused
    before any is read. What an adapter's folder does not hold (config.json with the role, the tokenizer) is its base's.
    """
    weights_dtype, target = place_named(dtype, device)
    folders = open_checkpoint(name)
    transformers_logging.disable_progress_bar()
    config_folder = holding(folders, CONFIG)
    config = read_config(config_folder)
    try:
        spec = Role.from_config(config)
    except FewstepError as error:
        raise FewstepError(f"{config_folder / CONFIG}: {error}") from error
    tokenizer = load_tokenizer(holding(folders, *VOCABULARIES))
    gated = getattr(config, GATED, None)
    weights = folders if gated is None else _base_of_gated(folders, spec, role)
    module = _load_module(weights, weights_dtype, target, merged_in)
    if role not in (None, spec.name):
        spec = spec.playing(role)
    if spec.embedding_space is None:
        vars(module.config).pop(EMBEDDING_SPACE, None)
    else:
        _load_conditioning(module, spec, spec.embedding_space, folders)
    set_end_tokens(module, [tokenizer.eos_token_id, *end_tokens_named(*reversed(folders))])
    if block_size is not None:
        spec = replace(spec, block_size=block_size)
    network = Network(module, spec, tokenizer, name=str(name))
    network.may_round = dtype == "auto"
    if role is None and block_size is None:
        network.calibration = calibration_in(folders[0], spec)
    return network if gated is None else with_gated_adapter(network, folders[0], gated)


def _base_of_gated(folders: Folders, spec: Role, role: RoleName | None) -> Folders:
    """The base of a gated adapter. FewstepError for another role than the base's, or without a base."""
    folder, *base = folders
    if not base:
        raise FewstepError(f"{folder / CONFIG} describes a gated adapter, and there is no {ADAPTER_CONFIG}")
    if spec.name != "autoregressive" or role not in (None, "autoregressive"):
        raise FewstepError(
            f"the gated adapter {folder} drafts for a causal network, which has the role autoregressive; "
            f"it cannot play {role or spec.name}"
        )
    return tuple(base)


def with_gated_adapter(base: Network, folder: Path, settings: Any) -> Network:
    """The network with the adapter of a folder beside its weights, which both share. FewstepError if its base is
    another.
    """
    from fewstep.models.gated import load_gated_adapter
    from fewstep.models.shared import shared_copy

    found = _hash_as_trained(base, folder)
    module = shared_copy(base.module)
    adapter = load_gated_adapter(module, folder, settings)
    if found != adapter.base_hash:
        raise FewstepError(
            f"the gated adapter {folder} belongs to other weights than its base has ({adapter.base_hash[:12]}, not "
            f"{found[:12]}); load it beside the base that it was trained on"
        )
    network = Network(module, base.role, base.tokenizer, name=base.name, adapter=adapter)
    network.base, network.may_round = base, base.may_round
    return network


def _hash_as_trained(base: Network, folder: Path) -> str:
    """The hash of the base's weights before they were rounded to float16, if they are those that the adapter names."""
    found = weights_hash(base)
    named = open_checkpoint(folder)[1:2] if base.dtype == torch.float16 else ()
    if not named or weights_hash(load_network(named[0], dtype="float16", device="cpu")) != found:
        return found
    return weights_hash(load_network(named[0], dtype="float32", device="cpu"))


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder, without what would choose a back end, which is the choice of this machine.

    FewstepError naming config.json if it is damaged, of an unknown kind, or of quantised weights, or if the family has
    to be imported first.
    """
    path = folder / CONFIG
    settings = read_object(path)
    model_type = settings.get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        from fewstep.models.importers.convert import not_in_transformers

        raise not_in_transformers(model_type, str(folder))
    if settings.get("quantization_config"):
        raise FewstepError(f"{path} says that the weights are quantised (quantization_config); load the original")
    with reading(path):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        for part in [config, *(getattr(config, name, None) for name in config.sub_configs)]:
            if isinstance(part, PreTrainedConfig):
                part._attn_implementation = part._experts_implementation = None
        vars(config).pop(CALIBRATION, None)  # it would be written beside whatever these weights become in training
        return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. FewstepError naming the file that is damaged, or if there is none."""
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise FewstepError(f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES[:3])} is there")
    try:
        with reading(f"the tokenizer in {folder} ({TOKENIZER_CONFIG})"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            tokenizer.encode("")  # settings of a wrong type are found by what uses them
            return tokenizer
    except FewstepError:
        name_damaged_json(folder)
        raise


def place_named(dtype: str, device: str) -> tuple[torch.dtype, torch.device]:
    """Numbers and device by name; "auto" is bfloat16 on a GPU, float32 on a CPU, and the GPU if there is one.

    FewstepError for a name that is unknown, or a device that is not there.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise FewstepError(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise FewstepError(f"unknown device {device!r}; try cpu or cuda") from error
    if target.type not in ("cpu", "cuda"):
        # mps has no float64, in which tokens are drawn, and others have not been tried.
        raise FewstepError(f"the device {device!r} is not supported: decoding and training run on cpu and cuda")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise FewstepError("no CUDA device is available; use --device cpu")
    return DTYPES.get(dtype, torch.bfloat16 if target.type == "cuda" else torch.float32), target


def _load_module(folders: Folders, dtype: torch.dtype, device: torch.device, merged_in: torch.dtype) -> PreTrainedModel:
    folder, *base = folders
    if base:
        if (folder / CONFIG).exists() and read_object(folder / CONFIG).get(GATED) is not None:
            raise FewstepError(
                f"{folder} is a gated adapter, which cannot be the base of another: its gate would be lost"
            )
        # Merged in host memory and then cast, so that the merged weights are rounded once.
        host = torch.device("cpu")
        return merge(folder, _load_module(tuple(base), merged_in, host, merged_in)).to(device, dtype)
    config = read_config(folder)
    _check_sizes(folder, config, dtype, device)
    check_generation_config(folder)
    is_noised = hasattr(config, EMBEDDING_SPACE)
    with reading(f"the network in {folder} ({CONFIG} and weights)"), _without_report() if is_noised else nullcontext():
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            # Without accelerate transformers loads into host memory only.
            device_map={"": device} if is_accelerate_available() else None,
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            wrong = [key for key in map(str, report[kind]) if not (is_noised and key.startswith(f"{PART}."))]
            if wrong:
                key = sorted(wrong)[0]
                raise FewstepError(
                    f"the weights in {folder} do not fit its config.json: {kind.replace('_', ' ')}, first {key}"
                )
        return module.to(device)


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from telling that the class has no place for the conditioning, which gets its own."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _load_conditioning(module: PreTrainedModel, role: Role, space: EmbeddingSpace, folders: Folders) -> None:
    """The part of a module in embedding space, from the same files. FewstepError if they hold another part than the
    config describes.
    """
    assert role.mask_token_id is not None
    part = attach(module, space, role.mask_token_id, shifted=role.right_shift_logits)
    folder, wanted = folders[-1], part.state_dict()
    places = {
        place.name.removeprefix(f"{PART}."): place for place in read_places(folder) if place.name.startswith(PART)
    }
    different = sorted(wanted.keys() ^ places.keys()) or sorted(
        name for name, place in places.items() if tuple(wanted[name].shape) != place.shape
    )
    if different:
        raise FewstepError(
            f"the weights in {folder} do not fit its config.json: missing, left over or of another shape, first "
            f"{PART}.{different[0]}"
        )
    part.load_state_dict({name: place.read() for name, place in places.items()})


def _check_sizes(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    """FewstepError if the weights of a folder, in `dtype`, exceed the free memory of the device, or if the config
    describes a network of quite different sizes from theirs, or one that cannot run.

    Such a network would be built before its weights are found not to fit, however many layers it has.
    """
    places = read_places(folder)
    stored, num_layers = sum(math.prod(place.shape) for place in places), getattr(config, "num_hidden_layers", 0)
    needed, free = stored * dtype.itemsize, free_memory(device)
    if free is not None and needed > free:
        advice = "choose another device" if dtype.itemsize <= 2 else "choose dtype bfloat16 or another device"
        raise FewstepError(
            f"{folder} needs {needed / 1e9:.1f} GB for its weights in {str(dtype).removeprefix('torch.')}, "
            f"and {device} has {free / 1e9:.1f} GB free; {advice}, or free some memory"
        )
    with reading(folder / CONFIG):
        is_larger = len(places) < num_layers
        if not is_larger:
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(config)
            is_larger = sum(parameter.numel() for parameter in module.parameters()) > 2 * stored + 1_000_000
        if is_larger:
            raise FewstepError(
                f"{folder / CONFIG} describes a larger network than the one whose weights lie beside it, of "
                f"{num_layers} layers; its files hold {len(places)} tensors with {stored} numbers"
            )
    doubt = f"either the file is damaged, or fewstep cannot run a {type(module).__name__}"
    tokens, mask = torch.zeros(1, 2, dtype=torch.long, device="meta"), torch.zeros(1, 1, 2, 2, device="meta")
    with reading(folder / CONFIG, advice=doubt), torch.no_grad():
        # Without memory or numbers.
        hidden = module.base_model(input_ids=tokens, attention_mask=mask, position_ids=tokens, use_cache=False)
        module.get_output_embeddings()(hidden.last_hidden_state)


_MEMORY = Path("/proc/meminfo")


def free_memory(device: torch.device) -> int | None:
    """Bytes that a program can still take on a GPU or, on Linux, in host memory; None where that cannot be asked."""
    if device.type == "cuda":
        kept_for_reuse = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_for_reuse
    available = re.search(r"^MemAvailable: *(\d+) kB", _MEMORY.read_text() if _MEMORY.exists() else "", re.MULTILINE)
    return int(available[1]) * 1024 if available else None


def save_network(network: Network, folder: str | Path) -> None:
    """Write a plain Hugging Face folder that stock `AutoModelForCausalLM` loads, our role keys in its config.json."""
    for key, value in network.role.to_config().items():
        setattr(network.module.config, key, value)
    network.module.save_pretrained(folder)
    for weights in Path(folder).glob("*.safetensors"):
        give_usual_mode(weights)
    network.tokenizer.save_pretrained(folder)


def network_hash(network: Network) -> str:
    """SHA-256 over the role and `weights_hash`: which model made a trajectory. How it is decoded does not matter."""
    how_decoded = network.role.decoding_config()
    role = {key: value for key, value in network.role.to_config().items() if key not in how_decoded}
    return hashlib.sha256(f"{json.dumps(role, sort_keys=True)} {weights_hash(network)}".encode()).hexdigest()


def weights_hash(network: Network) -> str:
    """SHA-256 over the weights' names, shapes and values.

    Values are rounded to bfloat16, so that a model has one hash whether it was loaded in float32 or bfloat16 (float16
    rounds otherwise).
    """
    return module_hash(network.module)


def module_hash(module: torch.nn.Module) -> str:
    """The same hash for any module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        tensor = tensor.dequantize() if type(tensor) is not torch.Tensor and hasattr(tensor, "dequantize") else tensor
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
