"""The models of a server by the names under which clients ask for them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError, suggestion
from fewstep.models.load import open_checkpoint
from fewstep.models.names import is_bundled
from fewstep.models.roles import RoleName
from fewstep.serve.errors import ApiError

_SHRINKS = 4
"""How many times as many characters a text may have as its tokens spell: normalisers put marks and letters together."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model to serve: what to load, under which name, in which role (by default the checkpoint's), and settings that
    hold unless a request sets others. `corrects`: it was trained to answer a sentence with the corrected one.
    """

    model: str
    name: str
    role: RoleName | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    corrects: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model that is served. `created`: when it was loaded, in seconds since 1970. `bundled`: it ships with this
    package, and solves the word problems of its templates alone.
    """

    name: str
    lm: LanguageModel
    settings: Mapping[str, Any]
    created: int
    bundled: bool = False
    corrects: bool = False

    @property
    def multi_turn(self) -> bool:
        """Whether it was trained on conversations, as far as is known; the bundled ones were not."""
        return not self.bundled

    @property
    def infills(self) -> bool:
        """Whether it sees what stands behind a gap."""
        return self.lm.role.name == "bidirectional"

    @property
    def abilities(self) -> list[str]:
        """What it can be asked for besides going on with a text."""
        if self.corrects:
            return ["correct"]
        has_template = bool(self.lm.network.tokenizer.chat_template)
        return [name for name, able in (("chat", has_template), ("infill", self.infills)) if able]

    @cached_property
    def most_characters(self) -> int:
        """A longer text has more tokens than the model has positions, whatever it says."""
        longest = max(len(token) for token in self.lm.network.tokenizer.get_vocab())
        return _SHRINKS * longest * self.lm.network.max_positions

    @property
    def literal(self) -> tuple[int, ...]:
        """Special tokens, which a user who types their names does not mean."""
        return tuple(one for one, token in self.lm.network.tokenizer.added_tokens_decoder.items() if token.special)

    def card(self) -> dict[str, Any]:
        """As /v1/models tells of it."""
        role = self.lm.role
        decoder = self.lm.decoder(**self.settings)
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fewstep",
            "fewstep": {
                "role": role.name,
                "decoder": decoder.name,
                "block_size": decoder.block_size,
                "max_positions": self.lm.network.max_positions,
                "abilities": self.abilities,
                "multi_turn": self.multi_turn,
                "bundled": self.bundled,
                "settings": {name: value for name, value in self.settings.items() if name not in ("draft", "heads")},
            },
        }


class Catalogue:
    """Entries by name; the first is the one for requests that name none."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = {entry.name: entry for entry in entries}

    def __getitem__(self, name: str | None) -> Entry:
        """ApiError (404) for a name that is none."""
        if name is None:
            return next(iter(self.entries.values()))
        if name not in self.entries:
            hint = suggestion(name, self.entries)
            raise ApiError(f"no model {name[:200]!r} here; {hint}", status=404, code="model_not_found", param="model")
        return self.entries[name]


Load = Callable[[str, RoleName | None], LanguageModel]


def load_all(served: Sequence[Served], load: Load) -> Catalogue:
    """Load the models. Adapters of one base share its weights. FewstepError if two have one name, if one cannot be
    loaded, or cannot decode with its settings.
    """
    names = [one.name for one in served]
    for name in names:
        if names.count(name) > 1:
            raise FewstepError(f"two models have the name {name}; give one another name, as in MODEL,name=other")
    bases: dict[Path, LanguageModel] = {}
    return Catalogue([_entry(one, _loaded(one, served, load, bases)) for one in served])


def _entry(served: Served, lm: LanguageModel) -> Entry:
    if lm.role.name == "embedding":
        raise FewstepError(
            f"{served.model} is a model in embedding space, which has no decoder that requests could share; serve a "
            "causal or a diffusion model"
        )
    lm.decoder(**served.settings)
    return Entry(
        name=served.name,
        lm=lm,
        settings=dict(served.settings),
        created=int(time.time()),
        bundled=is_bundled(served.model),
        corrects=served.corrects,
    )


def _loaded(one: Served, served: Sequence[Served], load: Load, bases: dict[Path, LanguageModel]) -> LanguageModel:
    """From a base that is loaded already, where others need it too."""
    base = _base_of(one)
    sharing = [other for other in served if base is not None and _base_of(other) == base]
    if base is None or len(sharing) < 2:
        return load(one.model, one.role)
    if base not in bases:
        itself = next((other.model for other in sharing if _is_whole(other)), str(base))
        bases[base] = load(itself, None)
    return bases[base] if _is_whole(one) else bases[base].with_adapter(one.model)


def _base_of(one: Served) -> Path | None:
    """The folder of the weights under the adapter, or of the model itself; None if its weights cannot be shared: in
    another role they would be another model, and an adapter on an adapter is merged when it is loaded.
    """
    folders = open_checkpoint(one.model)
    return Path(folders[-1]).resolve() if one.role is None and len(folders) < 3 else None


def _is_whole(one: Served) -> bool:
    return len(open_checkpoint(one.model)) == 1
