"""Options of decoding, made of what `GenerationSettings`, the decoders and the policies declare.

Nothing here loads torch, so that help and refusals come at once.
"""

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

from fewstep.cli.option_names import option_name
from fewstep.cli.sources import Touches
from fewstep.cli.spelling import spelt_in
from fewstep.decode.declarations import Declared, declared_settings
from fewstep.decode.registry import DECODERS, GENERATORS, POLICIES, check_registered, declarers, setting_names
from fewstep.values import parts_of, plain_type

SHARED = "fewstep.engine.settings:GenerationSettings"


@dataclass(frozen=True)
class DecodingOptions:
    """How tokens are decoded: the settings that were given, by name."""

    values: Mapping[str, Any]

    decoders: ClassVar[tuple[str, ...] | None] = None
    without: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, entries in (("decoder", DECODERS), ("policy", POLICIES)):
            if (value := self.values.get(name)) is not None:
                check_registered(name, value, entries)

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """The options, each None unless given."""
        taken = declared_everywhere(cls.decoders)
        return [_parameter(name, found) for name, found in taken.items() if name not in cls.without]

    def given(self) -> dict[str, Any]:
        """Settings for `LanguageModel`: only those that were given."""
        return {name: value for name, value in self.values.items() if value is not None}


@dataclass(frozen=True)
class InfillingOptions(DecodingOptions):
    """The same for infilling, of which the gap gives the canvas."""

    decoders = ("diffusion",)
    without = ("max_new_tokens", "early_stop", "canvas_length")


def declared_everywhere(decoders: Iterable[str] | None = None) -> dict[str, dict[str, Declared]]:
    """Setting -> what declares it (a decoder, "policy NAME", "role NAME", or "" for what holds for all), and how.

    `decoders`: of which alone; by default all of them.
    """
    entries = DECODERS if decoders is None else {name: DECODERS[name] for name in decoders}
    found = {name: {"": declared} for name, declared in declared_settings(SHARED).items()}
    for name in setting_names():
        of_policies = {f"policy {owner}": declared for owner, declared in declarers(name, POLICIES).items()}
        of_generators = {f"role {owner}": declared for owner, declared in declarers(name, GENERATORS).items()}
        if of_all := declarers(name, entries) | of_policies | of_generators:
            found[name] = of_all
    return found


def _parameter(name: str, found: Mapping[str, Declared]) -> inspect.Parameter:
    first = next(iter(found.values()))
    kind = _kind(first)
    option = typer.Option(
        *_names(name, first, kind),
        help=described(name, found),
        metavar=first.details.reads,
        rich_help_panel="Decoding",
    )
    touches = [Touches.READS_MODEL] if first.details.reads is not None else []
    annotation: Any = Annotated[(kind | None, option, *touches)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(declared: Declared) -> type:
    """The type that the command line reads: text for all that is no plain value."""
    parts = parts_of(plain_type(declared.type))
    return next((kind for kind in (bool, int, float) if kind in parts), str)


def _names(name: str, declared: Declared, kind: type) -> list[str]:
    option = option_name(name)
    if kind is bool:
        return [f"{option}/--no-{option[2:]}" if declared.default is True else option]
    aliases = declared.details.aliases
    return [option, *map(option_name, aliases)] if aliases else []


def described(name: str, found: Mapping[str, Declared]) -> str:
    """The help of a setting: each text once, with who takes it and what holds unless it is set."""
    choices = {"decoder": DECODERS, "policy": POLICIES}.get(name)
    texts: dict[str, list[str]] = {}
    for text in dict.fromkeys(declared.help for declared in found.values()):
        of_text = {owner: declared for owner, declared in found.items() if declared.help == text}
        for default in dict.fromkeys(declared.told_default for declared in of_text.values()):
            owners = [owner for owner, declared in of_text.items() if owner and declared.told_default == default]
            told = ": ".join(part for part in (_listed(owners), default) if part)
            texts.setdefault(text, []).extend([told] if told else [])
    sentences = [
        with_options(text.rstrip(".") + (f" ({'; '.join(told)})" if told else "") + ".") for text, told in texts.items()
    ]
    return " ".join([*sentences, *([f"One of {', '.join(choices)}."] if choices else [])])


def _listed(owners: Iterable[str]) -> str:
    """Decoders, roles without one, and policies, as a list."""
    owners = list(owners)
    decoders = [owner for owner in owners if not owner.startswith("policy ")]
    policies = [owner.removeprefix("policy ") for owner in owners if owner.startswith("policy ")]
    kind = "policies" if len(policies) > 1 else "policy"
    return ", ".join([*decoders, *([f"{kind} {', '.join(policies)}"] if policies else [])])


def with_options(text: str) -> str:
    """With options in place of the settings that it names: a name with an underscore is no English word."""
    known = {*declared_settings(SHARED), *setting_names()}
    return re.sub(r"[a-z]+(?:_[a-z]+)+", lambda name: option_name(name[0]) if name[0] in known else name[0], text)


# Settings as text


def spelt_settings() -> dict[str, Declared]:
    """Setting, under each of its names -> how it is declared."""
    found = {name: next(iter(of_all.values())) for name, of_all in declared_everywhere().items()}
    return found | {alias: declared for declared in found.values() for alias in declared.details.aliases}


def read_setting(name: str, text: str, *, called: str | None = None) -> Any:
    """The value that a text such as the 0.9 of `threshold=0.9` spells. FewstepError if it spells none.

    `name`: one of `spelt_settings`; an error calls it by the name of its option, or as `called` says.
    """
    registered = {"decoder": DECODERS, "policy": POLICIES}
    if name in registered:
        check_registered(name, text, registered[name])
        return text
    return spelt_in(text, spelt_settings()[name].type, called or option_name(name))
