"""PEFT adapters: what their description may ask for, and merging them into their base."""

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import regex
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from fewstep.errors import FewstepError
from fewstep.files import write_folder_whole
from fewstep.json_files import write_json_whole
from fewstep.models.checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_object, reading

MERGEABLE = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA")
"""Types of adapters that change weights. Others change inputs (prompts, prefixes), or read files that they name."""

_NOT_FOR_LOADING = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
}
"""Settings of the training that made an adapter, or of its writer; some name modules or files to be read."""
_NOT_MERGEABLE = ("alora_invocation_tokens", "arrow_config", "megatron_config", "use_bdlora")
"""Settings of LoRA whose result is not one weight, or of another library's layers."""

REGEX_SECONDS = 2.0
"""For all patterns of a description on all names of modules."""


def base_name(folder: Path) -> str:
    """What the adapter in a folder belongs to. FewstepError if it cannot be merged, or does not say."""
    path = folder / ADAPTER_CONFIG
    settings = read_object(path)
    kind = settings.get("peft_type")
    if kind not in MERGEABLE:
        raise FewstepError(
            f"{path} describes an adapter of the type {kind!r}, which cannot be merged into the weights of its base; "
            f"adapters of the types {', '.join(MERGEABLE)} can"
        )
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise FewstepError(
            f"{path} does not say which model the adapter belongs to; set base_model_name_or_path to the folder or hub "
            "id of its base"
        )
    return name


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence two warnings: PEFT asks transformers for a property by its old name, about which nobody who loads a model
    can do anything; and it tells of missing tensors, which its callers here refuse in a sentence. Others may matter.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"(?s).*Found missing adapter keys", UserWarning)
        yield


def merge(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """The base, in its numbers, with the adapter in its weights; FewstepError if the two do not fit each other.

    Embeddings take the adapter's size, where tokens were added for it. Tied embeddings come apart where the adapter
    changes one of the two.
    """
    weights = folder / ADAPTER_WEIGHTS
    shapes = stored_shapes(weights)
    with reading(folder / ADAPTER_CONFIG):
        config = read_description(folder / ADAPTER_CONFIG, base)
    names = _embeddings(base)
    of_embeddings = {
        key: shape
        for key, shape in shapes.items()
        if "trainable_tokens" not in key and any(f".{name}." in key for name in names)
    }
    if of_embeddings:
        _fit_embeddings(base, of_embeddings, weights)
    with quiet_peft(), reading(folder, advice="the adapter and its adapter_config.json do not fit the base"):
        from peft import PeftModel, get_peft_model_state_dict

        model: Any = PeftModel.from_pretrained(base, folder, config=config)
        needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        known = set(get_peft_model_state_dict(model, save_embedding_layers=True)) | needed
        known |= {f"base_model.model.{name}.weight" for name in _embeddings(base)}  # as they are, since resized
        different = sorted((needed - set(shapes)) | (set(shapes) - known))
        if different:
            raise FewstepError(
                f"{weights} does not fit its {ADAPTER_CONFIG}: missing or left over, first {different[0]}"
            )
        merged: PreTrainedModel = model.merge_and_unload()
    if getattr(merged.config, "tie_word_embeddings", False) and not _is_tied(merged):
        _mark_untied(merged)
    return merged.requires_grad_(True)  # PEFT froze the base; what is merged can be trained like any model


def write_share(adapter: Path, target: Path, share: float) -> None:
    """A copy of a LoRA's folder that adds only a share of it to the base: its alpha is what scales it.

    Between the base and the fully trained weights (weight-space interpolation, arXiv 2109.01903) accuracy is traded for
    what was trained. Logs and checkpoints of its training are left out. FewstepError for a folder without an adapter.
    """
    if not (adapter / ADAPTER_CONFIG).exists():
        raise FewstepError(f"{adapter} is no adapter, so there is no part of it; train one instead of all weights")
    with write_folder_whole(target, overwrite=True) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("logs", "checkpoints"))
        settings = read_object(folder / ADAPTER_CONFIG)
        settings["lora_alpha"] *= share
        write_json_whole(folder / ADAPTER_CONFIG, settings)


def stored_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of an adapter's tensors. FewstepError if the file is missing or damaged."""
    if not weights.is_file():
        raise FewstepError(f"{weights.parent} holds an {ADAPTER_CONFIG} but no {weights.name}; copy the file beside it")
    try:
        with safe_open(weights, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # of the Rust library, without a common class
        raise FewstepError(f"{weights} is damaged, or no safetensors file ({error}); copy it again") from error


def read_description(path: Path, base: nn.Module) -> Any:
    """PEFT's description of the adapter, without what could read other files, its patterns replaced by names."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    settings = read_object(path)
    for name in _NOT_MERGEABLE:
        if settings.get(name):
            raise FewstepError(f"{path} sets {name}, with which an adapter cannot be merged into its base")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]]
    kept = {name: value for name, value in settings.items() if name not in _NOT_FOR_LOADING}
    _replace_patterns(kept, [name for name, _ in base.named_modules() if name], path)
    known = set(kind.__dataclass_fields__)
    config: PeftConfig = kind(**{name: value for name, value in kept.items() if name in known})
    config.inference_mode = True
    return config


def _replace_patterns(settings: dict[str, Any], modules: list[str], path: Path) -> None:
    """Regular expressions become the modules that they match: some would take PEFT years to match."""
    deadline = time.monotonic() + REGEX_SECONDS

    def matching(pattern: str) -> list[str]:
        found = []
        try:
            for module in modules:
                if time.monotonic() > deadline:
                    raise TimeoutError
                if regex.fullmatch(pattern, module, timeout=max(0.001, deadline - time.monotonic())):
                    found.append(module)
        except TimeoutError:
            raise FewstepError(
                f"{path} has a pattern that takes longer than {REGEX_SECONDS:g} seconds to match, {pattern[:80]!r}; "
                "name the modules instead"
            ) from None
        return found

    for name in ("target_modules", "exclude_modules"):
        pattern = settings.get(name)
        if isinstance(pattern, str) and pattern != "all-linear":
            settings[name] = matching(pattern)
            if not settings[name] and name == "target_modules":
                raise FewstepError(f"{path} names target_modules {pattern[:80]!r}, and the base has no such module")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name)
        if isinstance(patterns, dict):
            replaced: dict[str, Any] = {}
            for pattern, value in patterns.items():
                for module in matching(rf"(.*\.)?({pattern})"):
                    replaced.setdefault("^" + regex.escape(module), value)
            settings[name] = replaced
    layers = settings.get("layers_pattern")
    for name in [layers] if isinstance(layers, str) else layers or []:
        if not str(name).replace("_", "").isalnum():
            raise FewstepError(f"{path} has a layers_pattern that is no name, {str(name)[:80]!r}")


# Embeddings


def _embeddings(base: PreTrainedModel) -> list[str]:
    """The names of the modules that embed tokens and score them."""
    parts = (base.get_input_embeddings(), base.get_output_embeddings())
    return [name for part in parts for name, inside in base.named_modules() if inside is part]


def _fit_embeddings(base: PreTrainedModel, shapes: dict[str, tuple[int, ...]], weights: Path) -> None:
    """Resize and untie those of the base as the adapter's tensors for them need; `shapes`: of these."""
    rows = set()
    for key, shape in shapes.items():
        for name in _embeddings(base):
            if f".{name}." not in key:
                continue
            part = key.rpartition(f".{name}.")[2]
            if part in ("weight", "base_layer.weight", "lora_B.weight") and shape:
                rows.add(shape[0])
            elif part == "lora_embedding_A" and len(shape) == 2:
                rows.add(shape[1])
    if len(rows) > 1:
        raise FewstepError(
            f"{weights} holds embeddings of different sizes, {' and '.join(map(str, sorted(rows)))} rows"
        )
    if rows and rows != {base.get_input_embeddings().weight.shape[0]}:
        with reading(weights):
            base.resize_token_embeddings(rows.pop(), mean_resizing=False)
    if _is_tied(base):
        head = base.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        _mark_untied(base)


def _is_tied(module: PreTrainedModel) -> bool:
    head = module.get_output_embeddings()
    return head is not None and head.weight is module.get_input_embeddings().weight


def _mark_untied(module: PreTrainedModel) -> None:
    """Say so to transformers, which would otherwise write one of the two and read it as both."""
    module.config.tie_word_embeddings = False
    module.all_tied_weights_keys = {}
