"""fewstep: language models that decode in a few passes per block.

`load`, `LanguageModel` and `EmbeddingModel` are imported on first use: torch and transformers take seconds, and
`fewstep --help` needs neither.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.engine.embedding_model import EmbeddingModel
    from fewstep.engine.language_model import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["EmbeddingModel", "LanguageModel", "__version__", "load"]

# OpenMP's threads spin while they wait for each other, which takes the cores from those they wait for when the machine
# is busy. OpenMP reads its environment when torch is loaded, so this is said before; what a user has set stands.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if "torch" not in sys.modules and not any(name in os.environ for name in _WAITING):
    os.environ["OMP_WAIT_POLICY"] = "passive"


def __getattr__(name: str) -> Any:
    if name in ("LanguageModel", "load"):
        from fewstep.engine import language_model

        return getattr(language_model, name)
    if name == "EmbeddingModel":
        from fewstep.engine.embedding_model import EmbeddingModel

        return EmbeddingModel
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
