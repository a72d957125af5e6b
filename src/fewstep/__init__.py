"""fewstep: language models that decode in a few passes per block.

`load` and `LanguageModel` are imported on first use: torch and transformers take seconds, and `fewstep --help` needs
neither.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.engine.language_model import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("LanguageModel", "load"):
        from fewstep.engine import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
