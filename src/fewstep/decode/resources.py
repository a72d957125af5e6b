"""What a decoder and its policy are built from, besides their settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewstep.errors import FewstepError
from fewstep.models.network import Network
from fewstep.models.roles import Role

if TYPE_CHECKING:
    from fewstep.models.gated import GatedAdapter
    from fewstep.models.medusa import MedusaHeads


def _no_models(name: str) -> Any:
    raise FewstepError(f"{name} cannot be loaded here; decode with a model that fewstep.load returned")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a decoder is built from besides its settings: the network's role and gated adapter, whether its requests are
    `greedy`, the room that they ask for, and what loads a drafting network or Medusa heads by name.
    """

    role: Role
    adapter: "GatedAdapter | None" = None
    greedy: bool = True
    canvas_length: int = 256
    draft: Callable[[str], Network] = _no_models
    heads: "Callable[[str], MedusaHeads]" = _no_models
