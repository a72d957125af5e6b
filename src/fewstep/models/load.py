"""Networks from disk and back: plain Hugging Face folders, PEFT adapters, bundled names, hub ids.

Weights are read from safetensors only, and code found in a checkpoint is never executed.
"""

import hashlib
import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from fewstep.errors import FewstepError
from fewstep.files import give_usual_mode
from fewstep.models.importers.weight_files import read_places
from fewstep.models.network import Network
from fewstep.models.roles import Role, RoleName

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def bundled_names() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def resolve(name: str | Path) -> Path | str:
    """A bundled name or a folder as its path; anything else is returned as a hub id."""
    if str(name) in bundled_names():
        return BUNDLED / str(name)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FewstepError(f"{path} holds no config.json; a model folder needs one beside its safetensors")
        return path
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise FewstepError(
            f"no model {str(name)!r}: neither a folder nor a bundled name ({', '.join(bundled_names()) or 'none'})"
        )
    return str(name)


def load_network(
    name: str | Path,
    *,
    role: RoleName | None = None,
    dtype: str = "auto",
    device: str = "auto",
    block_size: int | None = None,
) -> Network:
    """Load a bundled name, a folder (plain or PEFT adapter, which is merged) or a hub id; FewstepError if it cannot be.

    `role` and `block_size` override what the checkpoint says. `dtype="auto"` is bfloat16 on a GPU and float32 on a CPU;
    `device="auto"` is the GPU if there is one. Tensors go from the files straight to the device, one after the other
    (an adapter is merged in host memory first); a folder that does not fit is refused before any is read.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise FewstepError(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    target = _device(device)
    weights_dtype = DTYPES.get(dtype, torch.bfloat16 if target.type == "cuda" else torch.float32)
    source = resolve(name)
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        spec = Role.from_config(config)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        module = _load_module(source, weights_dtype, target)
    except FewstepError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise FewstepError(f"cannot load the model {str(name)!r}: {reason[:300]}") from error
    if role is not None:
        spec = spec.playing(role)
    if block_size is not None:
        spec = replace(spec, block_size=block_size)
    return Network(module, spec, tokenizer, name=str(name))


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise FewstepError(f"unknown device {device!r}; try cpu or cuda") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise FewstepError("no CUDA device is available; use --device cpu")
    return target


def _load_module(source: Path | str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    if isinstance(source, Path):
        if (source / "adapter_config.json").exists():
            return _load_adapter(source, dtype).to(device)
        _check_memory(source, dtype, device)
    module, report = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        # Without accelerate transformers loads into host memory only.
        device_map={"": device} if is_accelerate_available() else None,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            key = sorted(map(str, report[kind]))[0]
            raise FewstepError(
                f"the weights in {source} do not fit its config.json: {kind.replace('_', ' ')}, first {key}"
            )
    return module.to(device)


def _check_memory(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """FewstepError if the weights of a folder, in `dtype`, exceed the free memory of the device."""
    needed = sum(math.prod(place.shape) for place in read_places(folder)) * dtype.itemsize
    free = free_memory(device)
    if free is not None and needed > free:
        advice = "choose another device" if dtype.itemsize <= 2 else "choose dtype bfloat16 or another device"
        raise FewstepError(
            f"{folder} needs {needed / 1e9:.1f} GB for its weights in {str(dtype).removeprefix('torch.')}, "
            f"and {device} has {free / 1e9:.1f} GB free; {advice}, or free some memory"
        )


_MEMORY = Path("/proc/meminfo")


def free_memory(device: torch.device) -> int | None:
    """Bytes that a program can still take on a GPU or, on Linux, in host memory; None where that cannot be asked."""
    if device.type == "cuda":
        kept_for_reuse = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_for_reuse
    available = re.search(r"^MemAvailable: *(\d+) kB", _MEMORY.read_text() if _MEMORY.exists() else "", re.MULTILINE)
    return int(available[1]) * 1024 if available else None


def _load_adapter(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Base + adapter, merged in float32 in host memory and then cast, so that the merged weights are rounded once."""
    from peft import PeftModel, get_peft_model_state_dict

    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise FewstepError(f"{folder} holds an adapter_config.json but no {weights.name}; copy the file beside it")
    try:
        with safe_open(weights, framework="pt") as opened:
            stored = set(opened.keys())
    except SafetensorError as error:
        raise FewstepError(f"{weights} is damaged, or no safetensors file ({error}); copy it again") from error
    base_name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    beside = folder / base_name
    base_source = beside.resolve() if beside.is_dir() else resolve(base_name)
    base = _load_module(base_source, torch.float32, torch.device("cpu"))
    with warnings.catch_warnings():
        # PEFT asks transformers for this by its old name, about which whoever loads a model can do nothing. Other
        # warnings may be about the adapter, so only this one is silenced.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model: Any = PeftModel.from_pretrained(base, folder)
    different = sorted(stored ^ set(get_peft_model_state_dict(model, save_embedding_layers=False)))
    if different:
        raise FewstepError(
            f"{weights} does not fit its adapter_config.json: missing or left over, first {different[0]}"
        )
    merged: PreTrainedModel = model.merge_and_unload().to(dtype)
    return merged.requires_grad_(True)  # PEFT froze the base; what is merged can be trained like any model


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
    digest = hashlib.sha256()
    for name, tensor in sorted(network.module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
