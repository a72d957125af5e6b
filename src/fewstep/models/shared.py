"""Layers of their own around the parameters of another network: adapters beside the weights, not merged into them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoRALinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewstep.errors import FewstepError
from fewstep.models.adapters import quiet_peft, read_description, stored_shapes
from fewstep.models.checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, reading


class LeanLinear(LoRALinear):
    """W x + s B A x, without the questions that PEFT asks first: they take a small network much of its pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0]
        added = self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return cast(Tensor, self.get_base_layer()(x)) + added


def merged_weight(linear: LoRALinear) -> Tensor:
    """W + s B A, in the numbers of W."""
    name, own = linear.active_adapters[0], cast(nn.Linear, linear.get_base_layer()).weight.detach()
    down, up = linear.lora_A[name].weight.detach(), linear.lora_B[name].weight.detach()
    return (own.float() + linear.scaling[name] * (up.float() @ down.float())).to(own.dtype)


@contextmanager
def learning_kept(module: nn.Module) -> Iterator[None]:
    """Which of the module's parameters learn is as it was, whatever was done to them inside, and however it ended."""
    learning = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, learns in learning:
            parameter.requires_grad_(learns)


def shared_copy(module: PreTrainedModel) -> PreTrainedModel:
    """The same network with layers of its own around the very same parameters and buffers.

    What is put into the copy's layers is not in those of `module`.
    """
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def beside_adapter(module: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A `shared_copy` whose layers also hold the adapter of a folder, frozen, in the module's numbers.

    PEFT freezes the parameters, which both share: see `learning_kept`.
    FewstepError if the adapter does not fit, or if it changes the embeddings, which cannot be shared then.
    """
    weights = folder / ADAPTER_WEIGHTS
    shapes = stored_shapes(weights)
    own = {name for name, inside in module.named_modules() if isinstance(inside, nn.Embedding)} | {"lm_head"}
    if changed := next((key for key in shapes if any(f".{name}." in key for name in own)), None):
        raise FewstepError(
            f"the adapter {folder} changes the embeddings ({changed}), which cannot be shared then; load it as a model "
            "of its own"
        )
    copied = shared_copy(module)
    with quiet_peft(), reading(folder, advice="the adapter and its adapter_config.json do not fit the base"):
        config = read_description(folder / ADAPTER_CONFIG, copied)
        model: Any = PeftModel.from_pretrained(copied, folder, config=config, autocast_adapter_dtype=False)
        different = sorted(set(get_peft_model_state_dict(model, save_embedding_layers=False)) ^ set(shapes))
        if different:
            raise FewstepError(
                f"{weights} does not fit its {ADAPTER_CONFIG}: missing or left over, first {different[0]}"
            )
    for layer in copied.modules():
        if type(layer) is LoRALinear and not layer.lora_variant:  # those, such as DoRA, add something else
            layer.__class__ = LeanLinear
    copied.to(module.device, module.dtype).requires_grad_(False)
    return copied
