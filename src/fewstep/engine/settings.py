"""Generation settings by name, and the decoder they make."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from fewstep.decode.building import PolicyChoice, build_decoder, takers
from fewstep.decode.declarations import Details, declared_settings
from fewstep.decode.decoder import Decoder
from fewstep.decode.embedding import EmbeddingSampling, check_draws_nothing
from fewstep.decode.own_policies import OwnPolicy, as_policy, is_function
from fewstep.decode.registry import DECODERS, GENERATORS, POLICIES, check_registered, declarers, setting_names
from fewstep.decode.requests import Request
from fewstep.decode.resources import Resources
from fewstep.decode.sampling import Sampling, TopK
from fewstep.decode.steps import check_settings
from fewstep.engine.choice import EngineSetting
from fewstep.errors import FewstepError, suggestion
from fewstep.models.roles import Role, RoleName
from fewstep.values import Count, Seed, Temperature, check_fields, fitted, shown

DEFAULT_DECODER: dict[RoleName, str] = {
    "autoregressive": "autoregressive",
    "bidirectional": "diffusion",
    "block_causal": "block",
}


_ALWAYS_TOLD = {
    **dict.fromkeys(("threshold", "gaps", "steps", "block_size", "canvas_length", "alg", "eps", "alg_temp")),
    **dict.fromkeys(("draft", "heads", "window", "ngram", "typical")),
    "order": "low_confidence",
    "cfg_scale": 0.0,
    "fixed_windows": False,
}
"""What descriptions held, set or not, before settings were declared by decoders. Kept answers and shards are guarded by
them and go on; a setting that came later stands in a description only if it was set.
"""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How to generate. FewstepError for a value of another type or outside its range, or if a setting has no meaning.

    `own`: the settings of the decoder and of its policy that were set, by name; `of` takes them among the others. They
    are declared by the decoders and policies of `decode.registry`. Without `decoder` the network picks one: by its
    role, `self-speculative` for a gated adapter, and greedily `jacobi` if the checkpoint names a window.
    """

    decoder: Annotated[
        str | None,
        "How tokens are decoded.",
        Details(default="as the model's role says; jacobi for a CLLM, self-speculative for a gated adapter"),
    ] = None
    max_new_tokens: Annotated[Count, "Most new tokens of an answer.", Details(aliases=("gen_length",))] = 256
    early_stop: Annotated[
        bool, "Stop at the end-of-text, or run all passes of the canvas.", Details(default="stop")
    ] = True
    temperature: Annotated[
        Temperature | None,
        "Temperature of sampling; 0 takes the most probable token. In embedding space it scales the noise.",
        Details(default="0; in embedding space 1"),
    ] = None
    top_k: Annotated[TopK | None, "Draw from the k most probable tokens."] = None
    top_p: Annotated[float | None, "Draw from the most probable tokens that together have this probability."] = None
    seed: Annotated[Seed, "Seed of each request."] = 0
    engine: Annotated[
        EngineSetting,
        "How passes are run: auto takes the engine where it pays; compiled too, and on a GPU waits until passes are "
        "compiled; off takes the plain path.",
    ] = "auto"
    stop: tuple[str, ...] = ()
    """Texts before the first of which the answer ends; its counts end with the step that completed it."""

    own: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if "" in self.stop:
            raise FewstepError("a stop text must not be empty; leave it out, or give some text")
        if self.decoder is not None:
            check_registered("decoder", self.decoder, DECODERS)
        if not isinstance(self.own, Mapping):
            raise FewstepError(f"own must be a mapping of settings, got {shown(self.own)}")
        object.__setattr__(self, "own", {name: self._fitted(name, value) for name, value in self.own.items()})
        of_policy = {name: value for name, value in self.own.items() if declarers(name, POLICIES)}
        PolicyChoice(policy=self.own.get("policy"), settings=of_policy)
        self.sampling  # noqa: B018  (checked when built)

    @classmethod
    def of(cls, **options: Any) -> "GenerationSettings":
        """From names as a user gives them, aliases among them; None is not set. A function as `policy` brings its
        settings.

        FewstepError naming the closest setting for an unknown one, or if a setting is given under two names.
        """
        aliases = {name: one.details.aliases for name, one in declared_settings(cls).items()} | setting_names()
        for name, alias in ((name, alias) for name, others in aliases.items() for alias in others):
            if alias in options:
                if name in options:
                    raise FewstepError(f"{alias} is another name of {name}; give one of them")
                options[name] = options.pop(alias)
        if isinstance(options.get("stop"), str):
            options["stop"] = (options["stop"],)
        shared = [one.name for one in fields(cls) if one.name != "own"]
        known = [*shared, *setting_names()]
        rule: Any = options.get("policy")
        if rule is not None and is_function(rule):
            names = [name for name in OwnPolicy(rule=rule).setting_names if name not in shared]
            known += names
            given = {name: options.pop(name) for name in names if name in options}
            options["policy"] = _with_settings(rule, given)
        for name in options:
            if name not in known:
                raise FewstepError(f"unknown setting {name!r}; {suggestion(name, known)}")
        own = {name: value for name, value in options.items() if name not in shared and value is not None}
        return cls(**{name: value for name, value in options.items() if name in shared}, own=own)

    def _fitted(self, name: str, value: Any) -> Any:
        """The value in the type that the decoder, or else some decoder or policy, declares for it."""
        found = {**declarers(name, DECODERS), **declarers(name, POLICIES), **declarers(name, GENERATORS)}
        if not found:
            raise FewstepError(f"unknown setting {name!r}; {suggestion(name, setting_names())}")
        declared = found.get(self.decoder or "") or next(iter(found.values()))
        return value if name == "policy" else fitted(value, declared.type, name)

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature or 0.0, top_k=self.top_k, top_p=self.top_p)

    @property
    def sets_policy(self) -> bool:
        """Whether a policy was set, by name or by a setting of its own, rather than by threshold, steps and order."""
        plain = ("threshold", "gaps", "steps", "order")
        return any(name == "policy" or (name not in plain and declarers(name, POLICIES)) for name in self.own)

    @property
    def described(self) -> dict[str, Any]:
        """All settings that answers depend on, by name as a JSON object, of the decoder's and the policy's those that
        were set. What the engine changes is told by the numbers in which it computes.
        """
        shared = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("own", "engine")}
        shared["temperature"] = self.sampling.temperature
        rule = self.own.get("policy")
        policy = {} if rule is None else {"policy": rule if isinstance(rule, str) else repr(as_policy(rule))}
        return {**_ALWAYS_TOLD, **shared, **self.own, **policy}

    def decoder_for(self, role: Role, **resources: Any) -> Decoder:
        """The decoder for a network of this role; `resources`: what `Resources` has besides.

        It is the one that was set, or that of the network: one trained on Jacobi windows has `jacobi`, unless it
        samples. Where windows are set as well it is `jacobi` all the same, which then says that it cannot sample.
        FewstepError if a setting is not one of that decoder's.
        """
        if role.name == "embedding":
            raise FewstepError("a model in embedding space makes whole texts from noise, without a decoder")
        found = Resources(role=role, greedy=self.sampling.greedy, canvas_length=self.max_new_tokens, **resources)
        windows = not self.own.keys().isdisjoint(declared_settings(DECODERS["jacobi"]))
        if self.decoder is not None:
            name = self.decoder
        elif found.adapter is not None:
            name = "self-speculative"
        elif role.jacobi_window and (found.greedy or windows):
            name = "jacobi"
        else:
            name = DEFAULT_DECODER[role.name]
        decoder = build_decoder(name, found, self.own)
        check_settings(decoder, self.request([]))
        return decoder

    def embedding_sampling(self) -> EmbeddingSampling:
        """How a network in embedding space answers. FewstepError if a setting is not one of its generator's."""
        if self.decoder is not None:
            raise FewstepError(
                f"a model in embedding space makes whole texts from noise, without a decoder; leave out {self.decoder}"
            )
        own = declared_settings(GENERATORS["embedding"])
        for name in self.own:
            if name not in own:
                raise FewstepError(f"a model in embedding space takes no {name}; only {takers(name)} can")
        check_draws_nothing(self.sampling)
        return EmbeddingSampling(**{own[name].field: value for name, value in self.own.items()})

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


def _with_settings(rule: Any, given: Mapping[str, Any]) -> OwnPolicy:
    """The function with these settings, in the types that it declares."""
    declared = declared_settings(getattr(rule, "func", rule)) if given else {}
    fit = {
        name: fitted(value, declared[name].type, name) if name in declared else value
        for name, value in given.items()
        if value is not None
    }
    return OwnPolicy(rule=rule, settings=fit)
