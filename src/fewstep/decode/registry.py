"""The decoders, the policies, and what answers without a decoder, by the names under which users know them: the only
list of each.

A line names a class, or for a policy also a function, and where it is; a class or function itself will do as well. What
it may be told, on the command line and in Python, is read from its declaration: see `declarations`.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from fewstep.decode.declarations import Declared, Place, declared_settings
from fewstep.errors import FewstepError, suggestion

Entry = Place | Callable[..., Any]

DECODERS: dict[str, Entry] = {
    "diffusion": "fewstep.decode.diffusion:Diffusion",
    "block": "fewstep.decode.block:Block",
    "autoregressive": "fewstep.decode.autoregressive:Autoregressive",
    "jacobi": "fewstep.decode.jacobi:Jacobi",
    "lookahead": "fewstep.decode.lookahead:Lookahead",
    "speculative": "fewstep.decode.speculative:Speculative",
    "self-speculative": "fewstep.decode.self_speculative:SelfSpeculative",
    "prompt-lookup": "fewstep.decode.prompt_lookup:PromptLookup",
    "medusa": "fewstep.decode.medusa:Medusa",
}

POLICIES: dict[str, Entry] = {
    "threshold": "fewstep.decode.policies:Threshold",
    "factor": "fewstep.decode.policies:Factor",
    "margin": "fewstep.decode.policies:Margin",
    "entropy": "fewstep.decode.policies:EntropyBelow",
    "fixed": "fewstep.decode.policies:FixedCount",
    "even": "fewstep.decode.policies:EvenSplit",
    "origin": "fewstep.decode.policies:Origin",
    "dream": "fewstep.decode.policies:DreamSchedule",
}

GENERATORS: dict[str, Entry] = {
    "embedding": "fewstep.decode.embedding:EmbeddingSampling",
}
"""The settings of what answers without a decoder, by the role of its networks."""


def registered(name: str, entries: Mapping[str, Entry]) -> Any:
    """The class or function of this name, loaded."""
    entry = entries[name]
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    return getattr(import_module(module), attribute)


def check_registered(what: str, name: str, entries: Mapping[str, Entry]) -> None:
    """FewstepError with the closest name for one that is not among the entries."""
    if name not in entries:
        raise FewstepError(f"unknown {what} {name!r}; {suggestion(name, entries)}")


def declarers(name: str, entries: Mapping[str, Entry]) -> dict[str, Declared]:
    """Which of these declare the setting, and how."""
    found = {owner: declared_settings(entry).get(name) for owner, entry in entries.items()}
    return {owner: declared for owner, declared in found.items() if declared is not None}


def setting_names() -> dict[str, tuple[str, ...]]:
    """Every setting that some decoder, policy or generator declares, in this order -> its other names."""
    entries = [*DECODERS.values(), *POLICIES.values(), *GENERATORS.values()]
    return {name: declared.details.aliases for entry in entries for name, declared in declared_settings(entry).items()}
