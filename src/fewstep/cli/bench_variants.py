"""From the lists that `fewstep bench` is given to the variants that are measured; errors name its options."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewstep.cli.report import note
from fewstep.decode.declarations import declared_settings
from fewstep.decode.policies import Scheduled, evenly, scheduled
from fewstep.decode.registry import DECODERS
from fewstep.decode.requests import Request
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.settings import DEFAULT_DECODER, GenerationSettings
from fewstep.errors import FewstepError
from fewstep.measure import bandwidth
from fewstep.measure.bench import Variant, check_fits
from fewstep.measure.prompts import random_prompts, real_prompts
from fewstep.measure.roofline import Sizes
from fewstep.measure.schedule import AcceptanceSchedule
from fewstep.models.network import Network
from fewstep.models.roles import RoleName


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """How many tokens of a block a step accepts: as the network decides, or fixed by a number or a schedule.

    `by_default`: the number where neither is given, or the whole block if that is smaller.
    """

    is_fixed: bool
    tokens_per_step: int | None
    by_default: int
    schedule: AcceptanceSchedule | None

    def policies(self, block_size: int, count: int) -> list[Scheduled]:
        """One for each request. FewstepError for blocks that they are not made for."""
        if self.schedule is not None:
            if self.schedule.block_size != block_size:
                raise FewstepError(
                    f"the schedule is for blocks of {self.schedule.block_size} tokens, and these have {block_size}; "
                    "set --block-size, or record another"
                )
            return self.schedule.policies(count)
        if self.tokens_per_step is None:
            return [scheduled(evenly(block_size, min(block_size, self.by_default)))] * count
        if self.tokens_per_step > block_size:
            raise FewstepError(
                f"--tokens-per-step {self.tokens_per_step} is more than a block has, which is {block_size}; lower it, "
                "or raise --block-size"
            )
        return [scheduled(evenly(block_size, self.tokens_per_step))] * count


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What all variants share. `texts`: real prompts; None for random ones."""

    lm: LanguageModel
    told: Mapping[str, Any]
    texts: Sequence[Any] | None
    acceptance: Acceptance
    role_is_free: bool
    settings: Mapping[str, Any]
    num_answers: int

    @property
    def default_decoder(self) -> str | None:
        """Of a shape the one that few-pass decoding is about; None is what the model picks."""
        if not self.role_is_free or self.lm.role.name == "autoregressive":
            return None
        return "block"

    def variant(
        self, decoder: str | None, engine: str, batch_size: int, block_size: int | None, context: int | None
    ) -> Variant:
        """FewstepError if the settings do not go together."""
        lm = self._playing(decoder)
        settings: dict[str, Any] = {**self.settings, "decoder": decoder, "engine": engine}
        name = decoder or lm.decoder(**self.settings).name
        taken = declared_settings(DECODERS[name])
        if block_size is not None and "block_size" in taken:
            settings["block_size"] = self._possible(block_size)
        # Real prompts differ, so each is asked once if there are enough; random ones are as good again.
        num_batches = 1 if self.texts is None else max(1, min(self.num_answers, len(self.texts) // batch_size))
        policies: list[Any] = [None] * (num_batches * batch_size)
        if self.acceptance.is_fixed and "policy" in taken:
            policies = self.acceptance.policies(lm.decoder(**settings).block_size, len(policies))
            settings["policy"] = policies[0]
        started_s = time.perf_counter()
        lm.choice(**settings)  # an engine may prepare itself when it is first asked for
        engine_seconds = time.perf_counter() - started_s
        (sample,) = self._prompts(lm, 1, context)
        check_fits(lm, settings, self._request(sample, policies[0], settings), batch_size)  # before so many are made
        prompts = self._prompts(lm, len(policies), context)
        made = lm.decoder(**settings)
        requests = [self._request(ids, policy, settings) for ids, policy in zip(prompts, policies, strict=True)]
        return Variant(
            lm=lm,
            settings=settings,
            batches=[requests[start : start + batch_size] for start in range(0, len(requests), batch_size)],
            told={
                "device": str(lm.network.device),
                **self.told,
                "role": lm.role.name,
                "decoder": made.name,
                "batch_size": batch_size,
                "block_size": made.block_size if made.block_size > 1 else None,
                "context": context or round(sum(map(len, prompts)) / len(prompts)),
                "max_new_tokens": settings["max_new_tokens"],
                "prompts": "random" if self.texts is None else "real",
                "tokens_per_step_at_most": max(policies[0].counts)
                if self.acceptance.is_fixed and policies[0]
                else None,
            },
            engine_seconds=engine_seconds,
            is_fixed=not self._stops and (policies[0] is not None or made.name == "autoregressive"),
        )

    def _possible(self, block_size: int) -> int:
        """FewstepError for one that no answer fills; a note for one that the model was not trained with."""
        most, role = self.settings["max_new_tokens"], self.lm.role
        if block_size > most:
            raise FewstepError(
                f"--block-size {block_size} is more than the {most} new tokens of an answer; lower it, or raise "
                "--max-new-tokens"
            )
        if self.told["shape"] is None and role.name == "block_causal" and block_size != role.block_size:
            note(
                f"{self.lm.network.name} was trained with blocks of {role.block_size}: with {block_size} it finalises "
                "other tokens, and more or fewer of them in a step"
            )
        return block_size

    def _playing(self, decoder: str | None) -> LanguageModel:
        """Random weights play any role."""
        network = self.lm.network
        if not self.role_is_free or decoder is None:
            return self.lm
        fitting = {name: role for role, name in DEFAULT_DECODER.items()}.get(decoder, "autoregressive")
        if network.role.name == fitting:
            return self.lm
        return LanguageModel(playing(network, fitting))

    def _prompts(self, lm: LanguageModel, count: int, context: int | None) -> list[list[int]]:
        if context is not None and context > lm.network.max_positions:
            raise FewstepError(
                f"--context {context} exceeds the {lm.network.max_positions} positions of {lm.network.name}; lower it"
            )
        if self.texts is None:
            assert context is not None
            return random_prompts(lm.network, count, context, seed=self.settings.get("seed", 0))
        return real_prompts(lm, self.texts, count, context)

    def _request(self, ids: list[int], policy: Scheduled | None, settings: Mapping[str, Any]) -> Request:
        """Fixed acceptance and random weights do not stop: an end-of-text would be one by chance."""
        request = replace(GenerationSettings.of(**settings).request(ids), policy=policy)
        return request if self._stops else replace(request, early_stop=False, stop_token_ids=())

    @property
    def _stops(self) -> bool:
        """Whether an end-of-text ends an answer."""
        stops: bool = self.settings.get("early_stop", not (self.acceptance.is_fixed or self.told["shape"]))
        return stops


def playing(network: Network, role: RoleName) -> Network:
    """The same random weights in a role, with the tokenizer's mask token if theirs had none."""
    own = network.role
    if own.mask_token_id is None:
        own = replace(own, mask_token_id=network.tokenizer.mask_token_id)
    return network.with_role(own.playing(role))


def without_repetition(variants: Sequence[Variant]) -> list[Variant]:
    """A decoder without blocks is the same for every size of them, and the plain path whoever asked for it."""
    kept: dict[Any, Variant] = {}
    for variant in variants:
        told = {**variant.told, "engine": variant.choice.engine}
        kept.setdefault(tuple(map(str, told.values())), variant)
    return list(kept.values())


def check_effect(option: str, key: str, variants: Sequence[Variant]) -> None:
    """FewstepError if the option was given though no variant has what it sets; `key`: what says so of a variant."""
    if all(variant.told[key] is None for variant in variants):
        named = sorted({variant.told["decoder"] for variant in variants})
        raise FewstepError(f"{option} has no effect on the decoder {' or '.join(named)}; leave it out")


def measured_rates(variants: Sequence[Variant]) -> dict[str, bandwidth.DeviceRates]:
    """By the numbers in which the passes of some variant are computed."""
    rates: dict[str, bandwidth.DeviceRates] = {}
    for variant in variants:
        choice = variant.choice
        if choice.dtype not in rates:
            weight_bytes = Sizes.of(variant.lm.network.module, choice.network.dtype).weight_bytes
            rates[choice.dtype] = bandwidth.measure_device(
                variant.device, choice.network.dtype, weight_bytes=weight_bytes
            )
    return rates
