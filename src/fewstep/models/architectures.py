"""Which stock classes can be run, and what is special about each: sliding windows, rotary factors, scaled logits.

Nothing here is a list of names, but for the one class that decoding was written for: a plain Llama, of which a test
measures what is said here. What another class or setting does is measured on the module itself, with a few random rows
and its layers replaced by ones that record their arguments: which mask its own code makes for each layer, whether the
masks, positions and cache that we pass arrive there, whether rows are influenced by rows that they do not see, and what
happens to logits after the head. A class for which one of these cannot be determined is refused.

Axes: R = requests, Q = rows of a forward, K = keys, S = scored rows, D = hidden width, F = rotary frequencies,
V = vocabulary.
"""

import inspect
import re
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fewstep.errors import FewstepError
from fewstep.models.cache import KVCache
from fewstep.models.roles import CONFIG_KEYS

FULL, SLIDING = "full_attention", "sliding_attention"
"""Layer types as transformers names them; a class that mixes them takes a dictionary of masks with these keys."""

_SOUND = "choose a decoder-only model with rotary positions, such as a Llama, Qwen, Mistral or Gemma"
_LIMITS = re.compile("window|attention_chunk|local_attention")
_KNOWN_LIMITS = re.compile("sliding_window|use_sliding_window|max_window_layers|.*sliding_window_pattern|jacobi_window")
"""Settings that limit attention; those of them that decide which layers have the window measured below, or our own."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What `Network` and training have to know about a module.

    `sliding_window`: in a layer with one, a row sees only positions greater than its own minus this; None: no layer has
    one that a text can outgrow. `mixed`: only some layers have it. `scales_logits`: the class does something to logits
    behind its head. `long_from`: positions above which `longrope` has other factors. `restarts`: whether the reference
    computes a text's keys again when it grows past that.
    """

    sliding_window: int | None = None
    mixed: bool = False
    scales_logits: bool = False
    long_from: int | None = None
    restarts: bool = False

    def attention_mask(self, whole: Any, sliding: Any | None) -> Any:
        """What the module takes as its mask, from that of layers without a window and that of layers with one."""
        if sliding is None:
            return whole
        return {FULL: whole, SLIDING: sliding} if self.mixed else sliding


def within_sliding_window(query_positions: Tensor, key_positions: Tensor, sliding_window: int) -> Tensor:
    """Whether a layer with a sliding window lets each query see each key, by position alone: [R, Q] and [R, K] -> [R,
    1, Q, K].
    """
    return (key_positions[:, None, :] > query_positions[:, :, None] - sliding_window)[:, None]


def examine(module: PreTrainedModel, name: str) -> Architecture:
    """Measure a module, and settle its rotary embedding; a class and its settings are measured once.

    FewstepError if it cannot be run, or if that cannot be determined.
    """
    if is_plain(module):
        return PLAIN
    kind = type(module).__name__
    try:
        _check_parts(module)
        long_rope = _settle_rotary(module.base_model)
        measured = _measured(module)
    except _UnfitError as unfit:
        raise FewstepError(f"{name} is a {kind}, which fewstep cannot run: {unfit}; {_SOUND}") from None
    if long_rope is None:
        return measured
    restarts = "prepare_inputs_for_generation" in vars(type(module))
    return replace(measured, long_from=long_rope.boundary, restarts=restarts)


PLAIN = Architecture()
_LLAMA = LlamaConfig().to_dict()
_SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"}
_SIZES |= {"num_key_value_heads", "max_position_embeddings"}
_FREE = _SIZES | {"pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "architectures", "dtype"}
_FREE |= {"_name_or_path", "is_causal", *CONFIG_KEYS}
"""Settings in which plain Llamas differ: sizes, tokens, what is no setting of the network, and our own."""


def is_plain(module: PreTrainedModel) -> bool:
    """Whether this is a Llama with the settings that transformers gives one, but for sizes and tokens, and its layers
    hold sound numbers: then all that is measured of a class is known to be `PLAIN`.
    """
    settings = module.config.to_dict()
    as_usual = type(module) is LlamaForCausalLM and all(
        settings[name] == _LLAMA.get(name) for name in settings.keys() - _FREE
    )
    if not as_usual or not all(isinstance(settings[name], int) and settings[name] > 0 for name in _SIZES):
        return False
    base = module.base_model
    positions_1Q = torch.arange(3, device=base.device)[None]
    try:
        with torch.no_grad():
            rows_1QD = _rows(base, 1, 3)
            rows_1QD = base.layers[0](rows_1QD, position_embeddings=base.rotary_emb(rows_1QD, positions_1Q))
            return bool(base.norm(rows_1QD).isfinite().all())
    except RuntimeError:  # sizes that do not fit each other, of which measuring tells
        return False


class _UnfitError(Exception):
    """Why a class cannot be run."""


_MEASURED: dict[tuple[Any, ...], Architecture] = {}
"""By class, settings, precision and kind of device."""


def _measured(module: PreTrainedModel) -> Architecture:
    identity = (type(module), module.config.to_json_string(), module.dtype, module.device.type)
    if identity not in _MEASURED:
        with torch.no_grad():
            _MEASURED[identity] = _measure(module)
    return _MEASURED[identity]


def _check_parts(module: PreTrainedModel) -> None:
    """Refuse what lacks the parts that a decoder with rotary positions has."""
    base, config = module.base_model, module.config
    if base is module or not isinstance(getattr(base, "layers", None), nn.ModuleList) or not len(base.layers):
        raise _UnfitError("it is not a stack of decoder layers that takes masks and a cache")
    if not isinstance(getattr(base, "rotary_emb", None), nn.Module):
        raise _UnfitError("its positions are not rotary")
    for setting in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if not isinstance(getattr(config, setting, None), int):
            raise _UnfitError(f"its config.json has no {setting}")
    if module.get_output_embeddings() is None:
        raise _UnfitError("it has no head that scores tokens")
    for setting, value in config.to_dict().items():
        if value and _LIMITS.search(setting) and not _KNOWN_LIMITS.fullmatch(setting):
            raise _UnfitError(f"its attention is limited by {setting} ({value}), which is not applied")


# Rotary embeddings


class LongRope(nn.Module):
    """`longrope` with the factors of each row's own request, where transformers takes those of the longest row.

    As transformers' `generate` computes a text alone: its prompt has the long factors if it is longer than `boundary`,
    a token after it from the position `boundary` on; keys stay as they were computed.
    """

    def __init__(self, rotary: Any, boundary: int) -> None:
        super().__init__()
        rotary.rope_type = "default"  # keeps transformers from choosing factors
        self.short, self.long, self.boundary = rotary, deepcopy(rotary), boundary
        long_F, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, rotary.inv_freq.device, seq_len=boundary + 1)
        self.long.inv_freq.copy_(long_F)
        self.context_length_R: Tensor | None = None
        """Of the next forward; None: the rows are a whole text."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.context_length_R is None:
            is_long = position_ids.amax(1, keepdim=True) >= self.boundary
        else:
            is_long = (self.context_length_R[:, None] > self.boundary) | (position_ids >= self.boundary)
        short, long = self.short(x, position_ids), self.long(x, position_ids)
        cosine, sine = (torch.where(is_long[..., None], *pair) for pair in zip(long, short, strict=True))
        return cosine, sine


def _settle_rotary(base: Any) -> LongRope | None:
    """Fix the factors of each rotary embedding, so that a row's do not depend on the other rows of its forward.

    `dynamic` has other factors past `max_position_embeddings` only, where no request may go.
    """
    if isinstance(base.rotary_emb, LongRope):
        return base.rotary_emb
    for rotary in [each for each in base.modules() if hasattr(each, "rope_type")]:
        types = rotary.rope_type
        if isinstance(types, dict):
            rotary.rope_type = {layer: "default" if kind == "dynamic" else kind for layer, kind in types.items()}
        elif types == "dynamic":
            rotary.rope_type = "default"
        if types == "longrope" and rotary is base.rotary_emb:
            parameters = rotary.config.rope_parameters
            base.rotary_emb = LongRope(rotary, parameters["original_max_position_embeddings"])
            return base.rotary_emb
        if "longrope" in (types.values() if isinstance(types, dict) else [types]):
            raise _UnfitError("its rotary factors depend on the longest row of a forward")
    return None


# Measuring


class _Watched(nn.Module):
    """A layer that notes what it is given; it computes only if it is to `run`."""

    def __init__(self, layer: nn.Module, *, run: bool) -> None:
        super().__init__()
        self.layer, self.run, self.seen = layer, run, dict[str, Any]()
        self.signature = inspect.signature(layer.forward)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # such as the type of its attention

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        given = dict(self.signature.bind(*arguments, **settings).arguments)
        self.seen = given | given.pop("kwargs", {})
        return self.layer(*arguments, **settings) if self.run else arguments[0]


class _Probe(KVCache):
    """Notes which layers write to it."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.written: set[int] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> Any:
        self.written.add(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


_SHORT_SLIDING_WINDOW = 2


def _measure(module: PreTrainedModel) -> Architecture:
    base, config = module.base_model, module.config
    try:
        sliding = _sliding_layers(base)
        sliding_window = config.sliding_window if any(sliding) else None
        if sliding_window is not None and sliding_window >= config.max_position_embeddings:
            sliding_window = None
        found = Architecture(
            sliding_window=sliding_window,
            mixed=sliding_window is not None and not all(sliding),
            scales_logits=_scales_logits(module),
        )
        _check_what_arrives(base, found, sliding)
        _check_layers(base, found)
    except _UnfitError:
        raise
    except Exception as error:  # code of any class, called in a way that it may not know
        reason = " ".join(str(error).split())[:160]
        raise _UnfitError(
            f"its code does not take the masks, positions and cache that decoding needs ({reason})"
        ) from None
    return found


def _run(base: Any, layers: list[_Watched], rows_RQD: Tensor, **given: Any) -> Tensor:
    """The base model's own forward on these rows, with these layers in place of its own; `config`: another one."""
    stand_in = copy(base)
    stand_in._modules = {**base._modules, "layers": nn.ModuleList(layers)}
    if "config" in given:
        stand_in.config = given.pop("config")
    return stand_in(inputs_embeds=rows_RQD, use_cache=given.get("past_key_values") is not None, **given)[0]


def _idle(base: Any) -> list[_Watched]:
    return [_Watched(layer, run=False) for layer in base.layers]


def _rows(base: Any, num_requests: int, num_rows: int) -> Tensor:
    """Random rows about as large as those of the embedding."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((num_requests, num_rows, base.config.hidden_size), generator=generator)
    return rows.to(base.device, base.dtype)


def _sliding_layers(base: Any) -> list[bool]:
    """For each layer, whether the mask that its class makes for it is a causal one with a window, or a causal one."""
    config = copy(base.config)
    if hasattr(config, "is_causal"):
        config.is_causal = True  # what another role has stored; its masks are ours
    has_sliding_window = isinstance(getattr(config, "sliding_window", None), int) and config.sliding_window > 0
    if has_sliding_window:
        if config.sliding_window < _SHORT_SLIDING_WINDOW:
            raise _UnfitError(f"its sliding window is of {config.sliding_window} position")
        config.sliding_window = _SHORT_SLIDING_WINDOW
    layers, num_rows = _idle(base), _SHORT_SLIDING_WINDOW + 3
    positions_1Q = torch.arange(num_rows, device=base.device)[None]
    _run(base, layers, _rows(base, 1, num_rows), attention_mask=None, position_ids=positions_1Q, config=config)
    causal = positions_1Q[0, None, :] <= positions_1Q[0, :, None]
    in_sliding_window = causal & within_sliding_window(positions_1Q, positions_1Q, _SHORT_SLIDING_WINDOW)[0, 0]
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    sliding = []
    for layer, kind in zip(layers, types, strict=True):
        mask = layer.seen.get("attention_mask")
        visible = causal if mask is None else (mask if mask.dtype == torch.bool else mask == 0).expand(1, 1, -1, -1)
        sliding.append(has_sliding_window and torch.equal(visible.squeeze(), in_sliding_window))
        if not sliding[-1] and not torch.equal(visible.squeeze(), causal):
            raise _UnfitError("its attention is neither causal nor causal with a sliding window")
        if kind not in (None, SLIDING if sliding[-1] else FULL):
            raise _UnfitError(f"it has layers of the type {kind!r}")
    if (
        has_sliding_window
        and not any(sliding)
        and types[0] is None
        and getattr(base.config, "use_sliding_window", True)
    ):
        raise _UnfitError(
            f"it is not said which layers its sliding window of {base.config.sliding_window} positions is for"
        )
    return sliding


def _check_what_arrives(base: Any, found: Architecture, sliding: list[bool]) -> None:
    """Refuse a class that does not hand each layer the mask, the positions and the cache given for it."""
    last = base.rotary_emb.boundary if isinstance(base.rotary_emb, LongRope) else base.config.max_position_embeddings
    rows_1QD, whole = _rows(base, 1, 3), torch.zeros((1, 1, 3, 4), device=base.device, dtype=base.dtype)
    whole[..., 1] = float("-inf")
    narrow = whole.roll(1, -1) if found.sliding_window is not None else None
    cache = _Probe(base.config, 1, 3, device=base.device, dtype=base.dtype)
    seen = []
    for positions in ([2, 1, 3], [3, 1, 2], [2, 1, last - 1]):
        layers = _idle(base)
        _run(
            base,
            layers,
            rows_1QD,
            attention_mask=found.attention_mask(whole, narrow),
            position_ids=torch.tensor([positions], device=base.device),
            past_key_values=cache,
        )
        seen.append([layer.seen for layer in layers])
    for given, is_sliding in zip(seen[0], sliding, strict=True):
        wanted = narrow if is_sliding and narrow is not None else whole
        mask = given.get("attention_mask")
        if not isinstance(mask, Tensor) or not torch.equal(mask, wanted):
            raise _UnfitError("its layers do not receive the attention masks that are passed to it")
        if not any(each is cache for each in given.values()):
            raise _UnfitError("its layers do not receive the cache that is passed to it")
    rotated = [_tensors([given.get("position_embeddings") for given in each]) for each in seen]
    if not rotated[0]:
        raise _UnfitError("its layers receive no rotary positions")
    for first, swapped, longer in zip(*rotated, strict=True):
        if not torch.equal(first, swapped.flip(1)) or torch.equal(first, swapped):
            raise _UnfitError("its rotary positions are not those that are passed to it")
        if not torch.equal(first[:, :2], longer[:, :2]):
            raise _UnfitError("its rotary factors depend on the longest row of a forward")


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [tensor for each in nested or [] for tensor in _tensors(each)] if isinstance(nested, list | tuple) else []


def _check_layers(base: Any, found: Architecture) -> None:
    """Refuse a class with a layer that does not use the cache, or that lets a row see what its mask excludes.

    One layer of each make is run. Two requests write three rows each, every row by itself; the second differs from the
    first in a row that the row behind them does not see.
    """
    makes: dict[Any, int] = {}
    for number, layer in enumerate(base.layers):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
        makes.setdefault((shapes, *map(type, layer.modules())), number)
    layers = [_Watched(layer, run=number in makes.values()) for number, layer in enumerate(base.layers)]
    rows_24D = _rows(base, 1, 4).repeat(2, 1, 1)
    rows_24D[1, 1] = _rows(base, 1, 5)[0, 4]
    cache = _Probe(base.config, 2, 4, device=base.device, dtype=base.dtype)

    def forward(first: int, end: int, visible: list[list[bool]]) -> Tensor:
        mask = torch.zeros((2, 1, end - first, 5), device=base.device, dtype=base.dtype)
        mask.masked_fill_(~torch.tensor(visible, device=base.device), float("-inf"))
        positions_2Q = torch.arange(first, end, device=base.device).expand(2, -1)
        cache.place(positions_2Q, positions_2Q)
        masks = found.attention_mask(mask, None if found.sliding_window is None else mask)
        given = {"attention_mask": masks, "position_ids": positions_2Q, "past_key_values": cache}
        return _run(base, layers, rows_24D[:, first:end], **given)

    forward(0, 3, torch.eye(5, dtype=torch.bool)[:3].tolist())
    same, hidden = forward(3, 4, [[True, False, True, True, False]])[:, 0].double()
    if cache.written != set(makes.values()):
        raise _UnfitError("some of its layers store no keys and values in the cache")
    scale = same.norm()
    if not scale.isfinite() or (hidden - same).norm() > _ROUNDING[base.dtype] * scale:
        raise _UnfitError("its rows depend on rows that the mask excludes")


_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""How far two rows may be apart that the same numbers give; experts may take their rows in another order."""


# Logits


class _Given(nn.Module):
    """In place of a base model: its last hidden rows are what it is given."""

    def forward(self, *arguments: Any, inputs_embeds: Tensor, **settings: Any) -> Any:
        return _Outputs(inputs_embeds)


class _Outputs(SimpleNamespace):
    """Hidden rows as the outputs of a base model, whatever else is asked for being None."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(last_hidden_state=rows)

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else None


def adjust_logits(module: Any, logits: Tensor) -> Tensor:
    """What the class's own code makes of its head's logits [..., V]: it runs with the logits in place of hidden rows,
    and with nothing in place of the head.
    """
    stand_in = copy(module)
    head = next(name for name, part in module._modules.items() if part is module.get_output_embeddings())
    stand_in._modules = {**module._modules, module.base_model_prefix: _Given(), head: nn.Identity()}
    rows = logits.reshape(1, logits.shape[:-1].numel(), logits.shape[-1])
    return stand_in(inputs_embeds=rows).logits.view_as(logits)


def _scales_logits(module: PreTrainedModel) -> bool:
    logits_1V = torch.linspace(-300, 300, module.config.vocab_size, device=module.device, dtype=module.dtype)[None]
    return not torch.equal(adjust_logits(module, logits_1V), logits_1V)
