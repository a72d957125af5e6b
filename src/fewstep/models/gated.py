"""A gated adapter: low-rank weights of a causal network that apply only to the rows of a forward that draft.

Axes: R = requests, Q = rows of a forward, D = hidden width.

Clean rows (the prompt, accepted text, drafts that are being verified) run on the base alone, so their keys, values and
logits are exactly those of the causal network. Draft rows hold a mask token each and run on base + adapter. Both kinds
share one forward, which says which of its rows are adapted (I-DLM, arXiv 2604.11035, gates a LoRA alike). Nothing ever
merges such an adapter into the weights: the gate would be lost.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from annotated_types import Ge
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoRALinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewstep.errors import FewstepError
from fewstep.models.adapters import quiet_peft, read_description, stored_shapes
from fewstep.models.checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, GATED, reading
from fewstep.values import fitted

MASK_EMBEDDING = "mask_embedding"
"""A gated adapter's tensor beside those that PEFT reads."""


class Gate:
    """Which rows of the forward being run are adapted, boolean [R, Q, 1]; None: none of them."""

    rows_RQ1: Tensor | None = None


class GatedLinear(LoRALinear):
    """W x, and W x + s B A x where the gate is open."""

    gate: Gate

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = cast(Tensor, self.get_base_layer()(x))
        rows_RQ1 = self.gate.rows_RQ1
        if rows_RQ1 is None:
            return out
        name = self.active_adapters[0]
        added = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return torch.where(rows_RQ1, out + added, out)


class GatedAdapter(nn.Module):
    """The adapter that was put into a causal network's layers, and the embedding of the mask that its rows hold.

    `mask_token_id`: an id of the vocabulary that occurs in no text; its own embedding is in `mask_embedding` [D], since
    the base's table, which may be tied to its head, stays as it is. `block_size`: masks of a draft in training.
    `base_hash`: `load.weights_hash` of the network that it belongs to.
    """

    def __init__(
        self, model: PeftModel, mask_embedding: Tensor, *, mask_token_id: int, block_size: int, base_hash: str
    ) -> None:
        super().__init__()
        self.model = model
        self.mask_embedding = nn.Parameter(mask_embedding)
        self.mask_token_id = mask_token_id
        self.block_size = block_size
        self.base_hash = base_hash
        self.gate = Gate()
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.__class__ = GatedLinear
                layer.gate = self.gate

    @property
    def open_rows(self) -> Tensor | None:
        """The rows of the forward being run to which the adapter applies, boolean [R, Q, 1]; None: to none."""
        return self.gate.rows_RQ1

    def learn_alone(self) -> None:
        """Make the adapter and the mask's embedding trainable, and nothing of the base."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name or name == MASK_EMBEDDING)

    def description(self) -> dict[str, Any]:
        """What a checkpoint's config.json keeps under GATED."""
        return {"mask_token_id": self.mask_token_id, "block_size": self.block_size, "base_hash": self.base_hash}

    def embed(self, tokens_RQ: Tensor, adapted_RQ: Tensor) -> Tensor:
        """The rows' input embeddings [R, Q, D]: an adapted row holds a mask."""
        table = cast(PreTrainedModel, self.model.get_base_model()).get_input_embeddings()
        embedded_RQD = cast(Tensor, table(tokens_RQ))
        return torch.where(adapted_RQ[..., None], self.mask_embedding.to(embedded_RQD.dtype), embedded_RQD)

    @contextmanager
    def open_for(self, adapted_RQ: Tensor | None) -> Iterator[None]:
        """Within this block the adapter applies to these rows, boolean [R, Q]."""
        self.gate.rows_RQ1 = None if adapted_RQ is None else adapted_RQ[..., None]
        try:
            yield
        finally:
            self.gate.rows_RQ1 = None


def new_gated_adapter(
    module: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    mask_token_id: int,
    block_size: int,
    base_hash: str,
) -> GatedAdapter:
    """Freeze the network and put an untrained gated adapter into its layers, in place.

    The mask's embedding begins as the mean of all embeddings. FewstepError if the id is outside the vocabulary.
    """
    table = module.get_input_embeddings().weight
    if not 0 <= mask_token_id < len(table):
        raise FewstepError(f"mask_token_id {mask_token_id} is outside the vocabulary of {len(table)} tokens")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(module, config)
    assert isinstance(model, PeftModel)
    return GatedAdapter(
        model,
        table.detach().float().mean(0),
        mask_token_id=mask_token_id,
        block_size=block_size,
        base_hash=base_hash,
    )


def start_from(adapter: GatedAdapter, other: PreTrainedModel, mask_embedding: Tensor) -> None:
    """Start from what another network of the same shape has learnt: the low-rank part of the difference of its weights
        from the base's.

    The best approximation of each difference in the adapter's rank, split evenly between both factors.
    FewstepError if the shapes differ.
    """
    weights = dict(other.named_parameters())
    prefix = "base_model.model."
    for name, layer in adapter.model.named_modules():
        if not isinstance(layer, GatedLinear):
            continue
        base = cast(nn.Linear, layer.get_base_layer()).weight
        own = weights.get(f"{name.removeprefix(prefix)}.weight")
        if own is None or own.shape != base.shape:
            raise FewstepError(
                f"the network to start from has no {name.removeprefix(prefix)} of the shape of the base's"
            )
        key = layer.active_adapters[0]
        u, s, vh = torch.linalg.svd(own.detach().float() - base.detach().float(), full_matrices=False)
        rank = layer.r[key]
        root = (s[:rank] / layer.scaling[key]).sqrt()
        with torch.no_grad():
            layer.lora_A[key].weight.copy_(root[:, None] * vh[:rank])
            layer.lora_B[key].weight.copy_(u[:, :rank] * root)
    with torch.no_grad():
        adapter.mask_embedding.copy_(mask_embedding)


def load_gated_adapter(module: PreTrainedModel, folder: Path, settings: Any) -> GatedAdapter:
    """Put the adapter of a folder into the layers of its base, frozen, in the base's numbers and on its device.

    `settings` is what the folder's config.json keeps under GATED. FewstepError if it is damaged, or if the adapter does
    not fit the base.
    """
    described = _checked(settings, folder / CONFIG)
    weights = folder / ADAPTER_WEIGHTS
    stored_shapes(weights)  # says what a file that is missing or damaged needs
    with quiet_peft(), reading(folder, advice="the gated adapter does not fit its base"):
        config = read_description(folder / ADAPTER_CONFIG, module)
        state = load_file(weights)
        model: Any = PeftModel.from_pretrained(module, folder, config=config, autocast_adapter_dtype=False)
        needed = {MASK_EMBEDDING, *get_peft_model_state_dict(model, save_embedding_layers=False)}
        different = sorted(needed ^ set(state))
        if different:
            raise FewstepError(
                f"{weights} does not fit its {ADAPTER_CONFIG}: missing or left over, first {different[0]}"
            )
        width = module.get_input_embeddings().weight.shape[1]
        if state[MASK_EMBEDDING].shape != (width,):
            raise FewstepError(f"{weights}: {MASK_EMBEDDING} must have {width} numbers, as the base's embeddings have")
        adapter = GatedAdapter(model, state[MASK_EMBEDDING], **described)
    return adapter.to(module.device, module.dtype).requires_grad_(False)


def _checked(settings: Any, path: Path) -> dict[str, Any]:
    """The arguments of a GatedAdapter that a config names. FewstepError for one that is missing or cannot be."""
    declared = {"mask_token_id": Annotated[int, Ge(0)], "block_size": Annotated[int, Ge(1)], "base_hash": str}
    if not isinstance(settings, Mapping):
        raise FewstepError(f"{path}: {GATED} must name {', '.join(declared)}")
    return {name: fitted(settings.get(name), kind, f"{path}: {name} of {GATED}") for name, kind in declared.items()}
