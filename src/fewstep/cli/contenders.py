"""Contenders as they are typed: a name, a model and its settings."""

from typing import TYPE_CHECKING

from fewstep.cli.compare import read_specification
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from fewstep.measure.contenders import Contender

SPECIFICATION = "NAME=MODEL[,setting=value...]"
SHARED = ("max_new_tokens", "temperature", "top_k", "top_p")
"""Settings that a contender does not have of its own: answers are greedy, and of one greatest length."""


def greedy_contender(specification: str, max_new_tokens: int) -> "Contender":
    """What NAME=MODEL[,setting=value...] spells. FewstepError for anything else, or a setting that has no meaning."""
    from fewstep.engine.settings import GenerationSettings
    from fewstep.measure.contenders import Contender

    name, _, rest = specification.partition("=")
    if not (name and rest.split(",")[0]):
        raise FewstepError(f"{specification!r} names no contender; write {SPECIFICATION}")
    model, settings = read_specification(rest)
    role = settings.pop("role", None)
    plain, own = GenerationSettings(), GenerationSettings.of(**settings)
    for shared in SHARED:
        if getattr(own, shared) != getattr(plain, shared):
            raise FewstepError(
                f"{shared} is not a contender's own: answers are greedy, and --max-new-tokens is for all"
            )
    return Contender(name=name, model=model, role=role, settings={**settings, "max_new_tokens": max_new_tokens})
