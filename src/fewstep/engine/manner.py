"""How a model answers with some settings, as reports and kept answers tell it, whatever generates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from fewstep.decode.requests import Request
from fewstep.engine.settings import GenerationSettings


@dataclass(frozen=True, kw_only=True)
class Manner:
    """`decoder`: its name, or that of the sampler. `rule`: threshold, gaps and block size, as reports name them.
    `engine`: what runs the passes, "off" for the plain path; `note`: what is to be said of the choice, in a sentence.
    `computed_in`: the numbers of the passes. `policy`: that of the decoder, if it has one. `told`: what else an answer
    depends on, by name.
    """

    decoder: str
    rule: Mapping[str, Any]
    engine: str
    note: str | None
    computed_in: torch.dtype
    policy: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """The numbers of the passes, such as float32."""
        return str(self.computed_in).removeprefix("torch.")


@runtime_checkable
class Telling(Protocol):
    """Of what makes generators: it tells of them without making one."""

    def manner(self, settings: GenerationSettings) -> Manner:
        """FewstepError if the settings have no meaning."""

    def checker(self, settings: GenerationSettings) -> Callable[[Request], object]:
        """What raises FewstepError for a request that cannot be answered with these settings; as `manner`."""
