"""What a result depends on, so that a rerun does not mix it with results of other weights or settings."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from fewstep.decode.decoder import Decoder
from fewstep.decode.own_policies import OwnPolicy
from fewstep.decode.policies import Policy
from fewstep.engine.code_hash import code_hash, is_of_fewstep
from fewstep.engine.language_model import LanguageModel, Prompt
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.models.load import module_hash, weights_hash
from fewstep.shards import describe_difference

_HASHES: WeakKeyDictionary[LanguageModel, str] = WeakKeyDictionary()
_TOLD_OTHERWISE = ("policy", "draft", "heads")


def made_by(lm: LanguageModel) -> dict[str, str]:
    """Weights, numbers and kind of device: answers of others are not these. Hashed once a model."""
    network = lm.network
    if lm not in _HASHES:
        _HASHES[lm] = weights_hash(network)
    return {"weights": _HASHES[lm], "dtype": str(network.dtype), "device": network.device.type}


def check_made_by(lm: LanguageModel, result: Mapping[str, Any], file: Path) -> None:
    """FewstepError if the result in this file, which keeps `made_by`, is not this model's."""
    difference = describe_difference(result["made_by"], made_by(lm))
    if difference:
        raise FewstepError(f"{file} is of other weights, dtype or device ({difference}): delete it")


def answers_made_by(
    lm: LanguageModel, prompts: Sequence[Prompt], *, raw: bool = False, **settings: Any
) -> dict[str, Any]:
    """Everything that the answers to these prompts depend on, as a JSON object: besides `made_by` the role,
    the end tokens, the settings in effect, whatever helps to draft, and the prompts.
    """
    manner = lm.manner(**settings)
    described = GenerationSettings.of(**settings).described
    chosen = {name: value for name, value in described.items() if name not in _TOLD_OTHERWISE}
    if not chosen["stop"]:
        del chosen["stop"]  # answers that were kept before there were any are the same
    return {
        **made_by(lm),
        **({} if manner.computed_in == lm.network.dtype else {"computed_in": str(manner.computed_in)}),
        "role": lm.role.to_config(),
        "stop_token_ids": list(lm.network.stop_token_ids),
        **chosen,
        **manner.rule,
        **manner.told,
        "decoder": manner.decoder,
        **({} if manner.policy is None else _told_by_decoder(lm.decoder(**settings))),
        "raw": raw,
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
    }


def _told_by_decoder(decoder: Decoder) -> dict[str, Any]:
    """Its policy, and what helps it to draft."""
    heads = getattr(decoder, "heads", None)
    helpers = {name: weights_hash(network) for name, network in decoder.traits.companions.items()}
    if heads is not None:
        helpers["heads"] = module_hash(heads)
    return {**_told_policy(decoder.policy), "helpers": helpers}


def _told_policy(policy: Policy) -> dict[str, str]:
    """The policy by name and settings; one that is not of this package also by its code, which those do not tell."""
    rule, settings = (policy.rule, policy.settings) if isinstance(policy, OwnPolicy) else (policy, {})
    if is_of_fewstep(rule):
        return {"policy": repr(policy)}
    has_address = type(policy).__repr__ is object.__repr__
    told = type(policy).__qualname__ if has_address else repr(policy)
    return {"policy": told, "policy_code": code_hash((rule, dict(settings)))}
