"""How settings become a decoder and its policy.

A class of the registry may have a class method `build(resources, **given)`; the arguments are its settings that were
set. Without one the class is called with them. A decoder that has a setting `policy` is given a `PolicyChoice` for it,
and takes the settings of the policies that it can run: all, if its `runs_paced` is true, else those that are not paced.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fewstep.decode.declarations import Details, declared_settings
from fewstep.decode.decoder import Decoder
from fewstep.decode.own_policies import as_policy
from fewstep.decode.policies import Policy
from fewstep.decode.registry import DECODERS, GENERATORS, POLICIES, check_registered, declarers, registered
from fewstep.decode.resources import Resources
from fewstep.errors import FewstepError
from fewstep.models.roles import Role
from fewstep.values import Count


@dataclass(frozen=True, kw_only=True)
class PolicyChoice:
    """What was set of a policy: a name, or a policy itself, and `settings` of policies by their names.

    `name`: of the policy that was named, or whose first setting was set, such as `threshold`; None for one that is no
    name, and for the decoder's own. FewstepError if these contradict each other.
    """

    policy: Policy | Callable[..., Any] | str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = field(init=False)

    def __post_init__(self) -> None:
        name = self.policy if isinstance(self.policy, str) else None
        if isinstance(self.policy, str):
            check_registered("policy", self.policy, POLICIES)
        elif self.policy is not None:
            as_policy(self.policy)
            if self.settings:
                raise FewstepError(
                    f"a policy replaces threshold, gaps, steps and order; leave out {' and '.join(self.settings)}, or "
                    "the policy"
                )
        elif self.settings:
            implied = {first: name for name in POLICIES if (first := _first_setting(name)) in self.settings}
            if len(implied) > 1:
                one, other, *_ = implied
                raise FewstepError(
                    f"{one} sets the policy {implied[one]}, and {other} the policy {implied[other]}; set one or the "
                    "other"
                )
            name = next(iter(implied.values()), None)
        object.__setattr__(self, "name", name)
        if name is not None:
            self.made(Resources(role=Role(name="autoregressive")), default="")

    def made(self, resources: Resources, *, default: str) -> Policy:
        """The policy; `default`: the name of the one that the decoder takes.

        FewstepError for a setting that it does not take.
        """
        if self.policy is not None and not isinstance(self.policy, str):
            return as_policy(self.policy)
        name = self.name or default
        owner, declared = registered(name, POLICIES), declared_settings(POLICIES[name])
        for setting in self.settings:
            if setting in declared:
                continue
            if self.name is None:
                raise FewstepError(f"{setting} belongs to {_owners(setting)}; set {_what_sets(setting)} with it")
            replaced = "" if self.policy is not None else f"{_first_setting(name)} replaces {setting}: "
            raise FewstepError(f"{replaced}the policy {name} takes no {setting}; set one or the other")
        given = {declared[setting].field: value for setting, value in self.settings.items()}
        if hasattr(owner, "build"):
            return as_policy(owner.build(resources, **given))
        return as_policy(owner(**given)) if isinstance(owner, type) else as_policy(owner, given)


ChosenPolicy = Annotated[
    PolicyChoice, "The rule by which masked positions are chosen.", Details(default="as the settings below say")
]
BlockSize = Annotated[
    Count | None, "Tokens per block.", Details(aliases=("block_length",), default="as the checkpoint says")
]


def _first_setting(name: str) -> str | None:
    """The policy's first setting, if it is no other policy's too: it alone says which policy is meant."""
    first = next(iter(declared_settings(POLICIES[name])), None)
    return first if first is not None and list(declarers(first, POLICIES)) == [name] else None


def _owners(setting: str) -> str:
    owners = list(declarers(setting, POLICIES))
    return f"the {'policies' if len(owners) > 1 else 'policy'} {_listed(owners)}"


def _what_sets(setting: str) -> str:
    owners = list(declarers(setting, POLICIES))
    return (_first_setting(owners[0]) if len(owners) == 1 else None) or "policy"


def build_decoder(name: str, resources: Resources, given: Mapping[str, Any]) -> Decoder:
    """The decoder of this name with the settings that were given, by their names.

    FewstepError if one of them is not one of that decoder's or of its policy's, or if the network cannot be decoded so.
    """
    owner, own = registered(name, DECODERS), declared_settings(DECODERS[name])
    for setting in given:
        if setting not in own and not ("policy" in own and setting in _policy_settings(owner)):
            raise FewstepError(f"the {name} decoder takes no {setting}; only {takers(setting)} can")
    arguments = {own[setting].field: value for setting, value in given.items() if setting in own}
    if "policy" in own:
        of_policy = {setting: value for setting, value in given.items() if setting not in own}
        arguments["policy"] = PolicyChoice(policy=given.get("policy"), settings=of_policy)
    decoder: Decoder
    if hasattr(owner, "build"):
        decoder = owner.build(resources, **arguments)
    else:
        decoder = owner(role=resources.role, **arguments)
    if resources.role.name == "autoregressive" and "autoregressive" not in decoder.traits.roles:
        raise FewstepError(f"a causal model cannot run the {name} decoder; leave it out, or load another model")
    return decoder


def _policy_settings(decoder: Any) -> set[str]:
    """The settings of the policies that this class of decoders can run."""
    runs_paced = getattr(decoder, "runs_paced", False)
    return {
        setting
        for name, entry in POLICIES.items()
        if runs_paced or not getattr(registered(name, POLICIES), "paced", False)
        for setting in declared_settings(entry)
    }


def takers(setting: str) -> str:
    """The decoders and the generators that take the setting, as a list in a sentence."""
    decoders = [
        name
        for name, entry in DECODERS.items()
        if setting in (own := declared_settings(entry))
        or ("policy" in own and setting in _policy_settings(registered(name, DECODERS)))
    ]
    return _listed(decoders or [f"a model of the role {role}" for role in declarers(setting, GENERATORS)])


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
