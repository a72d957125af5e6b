"""What an importer has to know about a family of checkpoints."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from fewstep.errors import FewstepError
from fewstep.models.roles import Role

Config = Mapping[str, Any]
"""A family's own config.json, as read."""

Weights = Callable[[str], Tensor | None]
"""A tensor in float32 by its original name; None if the checkpoint has none of that name."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    `model_type`: what its config.json says. `stock_config`: the config of the stock class with the same network;
    FewstepError for a setting that the stock class cannot express. `role(config, mask_token_id)`: the id is the one
    that config.json, generation_config.json or the tokenizer names, if any does. `names`: original -> stock names of
    tensors, `{}` for a layer's number; empty if they are the same. `forward(config, weights, tokens_T)`: logits [T, V]
    of the rows as the family's own code computes them, float32, from tensors under their original names.
    `needs_mask`: whether it cannot be decoded without a mask token. `tokenizer_class`: the stock class that stands in
    for a tokenizer class that is the family's own code.
    """

    model_type: str
    stock_config: Callable[[Config], PreTrainedConfig]
    role: Callable[[Config, int | None], Role]
    forward: Callable[[Config, Weights, Tensor], Tensor]
    names: Mapping[str, str]
    needs_mask: bool = False
    tokenizer_class: str = "PreTrainedTokenizerFast"

    def stock_name(self, name: str) -> str | None:
        """The stock name of an original one; None if the family has no such tensor."""
        return _translated(name, self.names) if self.names else name

    def original_name(self, name: str) -> str:
        """The original name of a stock one."""
        return _translated(name, self._originals) or name

    @cached_property
    def _originals(self) -> dict[str, str]:
        return {stock: original for original, stock in self.names.items()}


def _translated(name: str, names: Mapping[str, str]) -> str | None:
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return names.get(name)
    template = names.get(name.replace(layer[0], ".{}.", 1))
    return None if template is None else template.format(layer[1])


def picked(config: Config, names: Mapping[str, str]) -> dict[str, Any]:
    """Settings under their stock names, from a config that calls them `names`' keys. FewstepError if one is missing."""
    missing = [name for name in names if name not in config]
    if missing:
        raise FewstepError(f"config.json has no {missing[0]!r}; a {config.get('model_type')} checkpoint needs it")
    return {stock: config[name] for name, stock in names.items()}


def refuse(config: Config, **expected: Any) -> None:
    """FewstepError if a setting is there, is not None and differs from what the stock class computes."""
    for name, value in expected.items():
        if config.get(name, value) not in (value, None):
            raise FewstepError(
                f"config.json sets {name} to {config[name]!r}; only {value!r} can be imported as a stock class"
            )
