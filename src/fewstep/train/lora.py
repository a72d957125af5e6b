"""LoRA through PEFT, and the folders that trained models are saved to."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoRALinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.json_files import read_json, write_json_whole
from fewstep.models.checkpoint_files import ADAPTER_WEIGHTS, CONFIG, GATED
from fewstep.models.gated import MASK_EMBEDDING, GatedAdapter, new_gated_adapter
from fewstep.models.load import weights_hash
from fewstep.models.medusa import MedusaHeads, write_heads
from fewstep.models.network import Network
from fewstep.values import check_fields

MAX_SHARD_SIZE = "15MB"
"""Small files, so that a small model can be kept in a repository."""


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Low-rank adapters on all linear layers of attention and MLP (arXiv 2106.09685)."""

    rank: Annotated[int, Ge(1), Le(1 << 16), "Rank of the adapters."] = 32
    alpha: Annotated[float, Gt(0), Le(1e6), "The adapters' outputs are multiplied by alpha / rank."] = 32.0
    dropout: Annotated[float, Ge(0), Lt(1), "Dropout of the adapters' inputs."] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "LoRA")


class _MergedLinear(LoRALinear):
    """The same adapter computed on the weights, (W + s B A) x in place of W x + s B (A x).

    For many rows and a rank that is not small beside the width, one product with a merged weight is faster than three
    and their sum, although the gradient then passes through one of the full weight's size.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        base = cast(nn.Linear, self.get_base_layer())
        a, b = (cast(Tensor, part[name].weight) for part in (self.lora_A, self.lora_B))
        return F.linear(x, base.weight + self.scaling[name] * (b @ a), base.bias)


def _merging_pays(layer: nn.Module, rank: int) -> bool:
    """Where the adapter's own products would cost more than an eighth of the layer's."""
    if type(layer) is not LoRALinear:
        return False
    base = cast(nn.Linear, cast(LoRALinear, layer).get_base_layer())
    return 8 * rank * (base.in_features + base.out_features) > base.in_features * base.out_features


def add_lora(network: Network, settings: LoRASettings) -> PeftModel:
    """Freeze the network and put trainable adapters into its layers, in place."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(network.module, config)
    assert isinstance(model, PeftModel)
    for layer in model.modules():
        if not settings.dropout and _merging_pays(layer, settings.rank):
            layer.__class__ = _MergedLinear
    return model


def add_gated_lora(
    network: Network, settings: LoRASettings, *, mask_token_id: int | None = None, block_size: int = 32
) -> Network:
    """The network, frozen, with a trainable gated adapter in its layers; in place.

    FewstepError if neither an id nor the tokenizer names a mask token, or for a network that is not causal.
    """
    if network.role.name != "autoregressive":
        raise FewstepError(f"a gated adapter drafts for a causal network, not for one of the role {network.role.name}")
    mask = network.tokenizer.mask_token_id if mask_token_id is None else mask_token_id
    if mask is None:
        raise FewstepError(
            f"the tokenizer of {network.name} has no mask token; name an id that no text holds with mask_token_id"
        )
    adapter = new_gated_adapter(
        network.module,
        **asdict(settings),
        mask_token_id=mask,
        block_size=block_size,
        base_hash=weights_hash(network),
    )
    return Network(network.module, network.role, network.tokenizer, name=network.name, adapter=adapter)


def write_adapter(adapter: PeftModel | GatedAdapter, state: dict[str, Tensor], folder: Path, *, base: str) -> None:
    """Write what PEFT reads, from the `state_dict` of a PEFT model or a gated adapter. `base`: what it names."""
    if isinstance(adapter, GatedAdapter):
        embedding = state.pop(MASK_EMBEDDING)
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        write_adapter(adapter.model, state, folder, base=base)
        weights = folder / ADAPTER_WEIGHTS
        save_file({**load_file(weights), MASK_EMBEDDING: embedding}, weights, metadata={"format": "pt"})
        return
    adapter.peft_config["default"].base_model_name_or_path = base
    # The embeddings are never trained; asking whether they were would look for the base on the hub.
    adapter.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)


def save_trained(
    network: Network, trained: nn.Module, folder: Path, *, dtype: torch.dtype, base: str, home: Path
) -> None:
    """Write into `folder`, in `dtype`, a plain model, or the adapter if `trained` is a PEFT model; its weights stay as
    they are. If it is Medusa heads, these are written, in bfloat16, with the name of the network they belong to; if it
    is a gated adapter, an adapter whose config.json says so.

    An adapter's folder also holds config.json with the role, and the tokenizer, so that it is complete beside its
    `base`: a folder, which it names relative to `home`, where the files will lie in the end, or a bundled name or hub
    id.
    """
    if isinstance(trained, MedusaHeads):
        write_heads(trained, folder, network)
        return
    copies: dict[tuple[int, torch.Size], Tensor] = {}  # tied weights stay one tensor, which is written once
    state = {
        name: copies.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().to("cpu", dtype))
        for name, tensor in trained.state_dict().items()
    }
    config = network.module.config
    for key, value in {**network.role.to_config(), "use_cache": True}.items():
        setattr(config, key, value)
    if isinstance(trained, PeftModel | GatedAdapter):
        beside = os.path.relpath(os.path.realpath(base), os.path.realpath(home))
        write_adapter(trained, state, folder, base=beside if Path(base).is_dir() else base)
        config.save_pretrained(folder)
    else:
        network.module.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
    # transformers writes the type of the module in training.
    stored = {**read_json(folder / CONFIG), "dtype": str(dtype).removeprefix("torch.")}
    if isinstance(trained, GatedAdapter):
        stored[GATED] = trained.description()
    write_json_whole(folder / CONFIG, stored)
    network.tokenizer.save_pretrained(folder)
