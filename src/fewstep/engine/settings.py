"""Generation settings by name, and the decoder they make."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_args

from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.block import Block
from fewstep.decode.causal import NGram
from fewstep.decode.decoder import Decoder
from fewstep.decode.diffusion import Diffusion, GuidanceScale
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.lookahead import Lookahead
from fewstep.decode.medusa import Medusa
from fewstep.decode.policies import (
    DreamAlg,
    DreamSchedule,
    EvenSplit,
    FixedCount,
    Order,
    Origin,
    Policy,
    Threshold,
    check_threshold,
)
from fewstep.decode.prompt_lookup import PromptLookup
from fewstep.decode.requests import Request
from fewstep.decode.sampling import Sampling, TopK
from fewstep.decode.self_speculative import SelfSpeculative
from fewstep.decode.speculative import Speculative
from fewstep.decode.steps import check_settings
from fewstep.errors import FewstepError, suggestion
from fewstep.models.medusa import MedusaHeads
from fewstep.models.network import Network
from fewstep.models.roles import Gaps, Role, RoleName
from fewstep.values import Count, Seed, Temperature, check_fields, shown

if TYPE_CHECKING:
    from fewstep.models.gated import GatedAdapter

DEFAULT_DECODER: dict[RoleName, str] = {
    "autoregressive": "autoregressive",
    "bidirectional": "diffusion",
    "block_causal": "block",
}
ORDERS = (*get_args(Order), "origin")

ALIASES = {"gen_length": "max_new_tokens", "block_length": "block_size", "remasking": "order"}
"""LLaDA's names of settings -> ours."""

# The settings that not every decoder takes; the others hold for all.
_SPECIAL_SETTINGS = {
    "autoregressive": set[str](),
    "diffusion": {
        "threshold",
        "gaps",
        "policy",
        "steps",
        "order",
        "block_size",
        "canvas_length",
        "alg",
        "eps",
        "alg_temp",
        "cfg_scale",
    },
    "block": {"threshold", "gaps", "policy", "block_size"},
    "jacobi": {"window", "ngram", "fixed_windows"},
    "lookahead": {"window", "ngram"},
    "speculative": {"draft", "window"},
    "self-speculative": {"window"},
    "prompt-lookup": {"window", "ngram"},
    "medusa": {"heads", "window", "typical"},
}

_CAUSAL = {"autoregressive", "jacobi", "lookahead", "speculative", "self-speculative", "prompt-lookup", "medusa"}
"""The decoders of causal networks, and the only ones that those take."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How to generate; None = the decoder's default. FewstepError for a value of another type or outside its range, or
    if a setting has no meaning.

    `decoder`: by default the role's; greedily `jacobi` if the checkpoint names a window. `threshold`: probability from
    which tokens are finalised, by default the role's for `block` and none for `diffusion`, which then takes `steps`
    over the whole canvas (by default one per token) in the given `order`. `gaps`: how many less probable positions of
    the block such a token may leave before it, by default the role's, and any number if that names none.
    `policy` replaces threshold, gaps, steps and order.
    `canvas_length` (diffusion): by default `max_new_tokens` in whole blocks. `alg`: Dream's own sampler instead of
    `order`, over the canvas as a single block, with the last step at time `eps` (by default 0.001) and positions drawn
    at temperature `alg_temp` (by default 0, the most certain ones); see `DreamSchedule`. `early_stop=False` runs all
    passes of the canvas. Temperature 0 is argmax. `cfg_scale` (diffusion): LLaDA's classifier-free guidance.

    `stop`: a text, or several; the answer ends before the first of them, its counts with the step that completed it.

    For draft-and-verify: `draft` names the model that drafts (speculative), `heads` the folder of Medusa heads.
    `window` counts guesses: tokens of a window (jacobi, that of the checkpoint or 16), columns (lookahead, 8), tokens
    drafted (speculative, 4, or the block of a block-causal draft; self-speculative, 16; prompt-lookup, 10), guesses of
    the tree (medusa, 32). `ngram`: tokens of an n-gram (lookahead, 4), the longest match (prompt-lookup, 3; jacobi,
    whose new guesses are random tokens without it).
    `fixed_windows` (jacobi): windows one after the other, as published, in place of one that slides. `typical`: see
    `Medusa`.
    """

    decoder: str | None = None
    max_new_tokens: Count = 256
    threshold: float | None = None
    gaps: Gaps | None = None
    policy: Policy | None = None
    steps: Count | None = None
    order: str = "low_confidence"
    block_size: Count | None = None
    canvas_length: Count | None = None
    early_stop: bool = True
    temperature: Temperature = 0.0
    top_k: TopK | None = None
    top_p: float | None = None
    seed: Seed = 0
    alg: DreamAlg | None = None
    eps: float | None = None
    alg_temp: Temperature | None = None
    cfg_scale: GuidanceScale = 0.0
    draft: str | None = None
    heads: str | None = None
    window: Count | None = None
    ngram: NGram | None = None
    fixed_windows: bool = False
    typical: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if "" in self.stop:
            raise FewstepError("a stop text must not be empty; leave it out, or give some text")
        _check_choice("decoder", self.decoder, _SPECIAL_SETTINGS)
        _check_choice("order", self.order, ORDERS)
        if self.policy is not None and not callable(self.policy):
            raise FewstepError(f"policy must be one of fewstep.decode.policies, got {shown(self.policy)}")
        check_threshold(self.threshold)
        replaced = (self.threshold, self.gaps, self.steps, self.order)
        if self.policy is not None and replaced != (None, None, None, "low_confidence"):
            raise FewstepError("a policy replaces threshold, gaps, steps and order; set one or the other")
        if self.threshold is not None and (self.steps is not None or self.order != "low_confidence"):
            raise FewstepError("a threshold replaces steps and order; set one or the other")
        if self.alg is not None:
            taken = {"threshold": None, "gaps": None, "policy": None, "order": "low_confidence", "block_size": None}
            for name, default in taken.items():
                if getattr(self, name) != default:
                    raise FewstepError(f"alg is Dream's own sampler, which takes no {name}; set one or the other")
            self._dream_schedule()
        for name in ("eps", "alg_temp"):
            if self.alg is None and getattr(self, name) is not None:
                raise FewstepError(f"{name} belongs to Dream's sampler; set alg with it")
        self.sampling  # noqa: B018  (checked when built)

    @classmethod
    def of(cls, **options: Any) -> "GenerationSettings":
        """From names as a user gives them, ALIASES among them.

        FewstepError naming the closest setting for an unknown one, or if a setting is given under two names.
        """
        for alias, name in ALIASES.items():
            if alias in options:
                if name in options:
                    raise FewstepError(f"{alias} is another name of {name}; give one of them")
                options[name] = options.pop(alias)
        if isinstance(options.get("stop"), str):
            options["stop"] = (options["stop"],)
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise FewstepError(f"unknown setting {name!r}; {suggestion(name, known)}")
        return cls(**options)

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def decoder_for(
        self,
        role: Role,
        *,
        draft: Network | None = None,
        heads: MedusaHeads | None = None,
        adapter: "GatedAdapter | None" = None,
    ) -> Decoder:
        """The decoder for a network of this role; `draft` and `heads` as loaded from what the settings name, `adapter`
        the network's own.

        FewstepError if a setting is not one of that decoder's.
        """
        decoder = self._decoder_for(role, draft, heads, adapter)
        check_settings(decoder, self.request([]))
        return decoder

    def request(self, prompt_ids: list[int], *, canvas: list[int] | None = None) -> Request:
        """What a request with these settings asks for; its policy is the decoder's."""
        return Request(
            prompt_ids=prompt_ids,
            canvas=canvas,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            sampling=self.sampling,
            early_stop=self.early_stop,
        )

    def _decoder_for(
        self, role: Role, draft: Network | None, heads: MedusaHeads | None, adapter: "GatedAdapter | None"
    ) -> Decoder:
        name = self.decoder or ("self-speculative" if adapter is not None else self._default_decoder(role))
        for field in fields(self):
            special = any(field.name in names for names in _SPECIAL_SETTINGS.values())
            if special and field.name not in _SPECIAL_SETTINGS[name] and getattr(self, field.name) != field.default:
                *others, last = (other for other, names in _SPECIAL_SETTINGS.items() if field.name in names)
                takers = f"{', '.join(others)} and {last}" if others else last
                raise FewstepError(f"the {name} decoder takes no {field.name}; only {takers} can")
        if name not in _CAUSAL and role.name == "autoregressive":
            raise FewstepError(f"a causal model cannot run the {name} decoder; leave it out, or load another model")
        if name in _CAUSAL:
            return self._causal_decoder(name, role, draft, heads, adapter)
        if role.name == "block_causal" and self.block_size is not None:
            role = replace(role, block_size=self.block_size)
        if name == "block":
            return Block(
                role=role,
                policy=self.policy or self._threshold(role),
            )
        return Diffusion(
            role=role,
            block_size=self.block_size or (role.block_size if self.alg is None else self._canvas_room()),
            policy=self.policy or self._diffusion_policy(role),
            steps=self.steps,
            canvas_length=self.canvas_length,
            cfg_scale=self.cfg_scale,
        )

    def _default_decoder(self, role: Role) -> str:
        """The role's; `jacobi` for a checkpoint trained on Jacobi windows, unless tokens are sampled.

        Where windows are set as well it is `jacobi` all the same, which then says that it cannot sample.
        """
        windows = self.window is not None or self.ngram is not None or self.fixed_windows
        return "jacobi" if role.jacobi_window and (self.sampling.greedy or windows) else DEFAULT_DECODER[role.name]

    def _causal_decoder(
        self,
        name: str,
        role: Role,
        draft: Network | None,
        heads: MedusaHeads | None,
        adapter: "GatedAdapter | None",
    ) -> Decoder:
        shared: dict[str, Any] = {"role": role}
        counts = {"window": self.window, "ngram": self.ngram}
        given: dict[str, Any] = {key: value for key, value in counts.items() if value is not None}
        match name:
            case "autoregressive":
                return Autoregressive(**shared)
            case "jacobi":
                trained = {} if role.jacobi_window is None else {"window": role.jacobi_window}
                return Jacobi(**shared, **{**trained, **given}, fixed_windows=self.fixed_windows)
            case "lookahead":
                return Lookahead(**shared, **given)
            case "prompt-lookup":
                return PromptLookup(**shared, **given)
            case "speculative":
                if draft is None:
                    raise FewstepError(
                        "the speculative decoder needs a draft (--draft): name a small or a block-causal model of the "
                        "same vocabulary"
                    )
                return Speculative(**shared, **given, draft=draft, sampled=not self.sampling.greedy)
            case "self-speculative":
                if adapter is None:
                    raise FewstepError(
                        "the self-speculative decoder needs a model with a gated adapter; fewstep train draft makes one"
                    )
                return SelfSpeculative(**shared, **given, adapter=adapter)
            case _:
                if heads is None:
                    raise FewstepError("the medusa decoder needs heads (--heads): name the folder that holds them")
                return Medusa(**shared, **given, heads=heads, typical=self.typical)

    def _canvas_room(self) -> int:
        return self.canvas_length or self.max_new_tokens

    def _dream_schedule(self) -> DreamSchedule:
        assert self.alg is not None
        eps = DreamSchedule.eps if self.eps is None else self.eps
        num_steps = self.steps or self._canvas_room()
        return DreamSchedule(alg=self.alg, num_steps=num_steps, eps=eps, alg_temp=self.alg_temp)

    def _threshold(self, role: Role) -> Threshold:
        """As set, else as the role says."""
        return Threshold(
            at_least=role.threshold if self.threshold is None else self.threshold,
            gaps=role.gaps if self.gaps is None else self.gaps,
        )

    def _diffusion_policy(self, role: Role) -> Policy:
        if self.alg is not None:
            return self._dream_schedule()
        if self.threshold is not None:
            return self._threshold(role)
        if self.gaps is not None:
            raise FewstepError("gaps limits what a threshold finalises; set threshold with it, and no steps or order")
        if self.order == "origin":
            return Origin()
        order: Order = self.order  # type: ignore[assignment]  # checked when built
        return FixedCount(num_tokens=1, order=order) if self.steps is None else EvenSplit(order=order)


def _check_choice(what: str, name: str | None, choices: Iterable[str]) -> None:
    if name is not None and name not in choices:
        raise FewstepError(f"unknown {what} {name!r}; {suggestion(name, choices)}")
