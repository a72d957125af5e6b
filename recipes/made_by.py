"""What made a kept result, so that a rerun does not mix it with what others make."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.load import weights_hash


@cache
def made_by(lm: LanguageModel) -> dict[str, str]:
    """Weights, numbers and kind of device: answers of others are not these. Hashed once a model."""
    network = lm.network
    return {"weights": weights_hash(network), "dtype": str(network.dtype), "device": network.device.type}


def check_made_by(lm: LanguageModel, result: Mapping[str, Any], file: Path) -> None:
    """FewstepError if the result in this file, which keeps `made_by`, is not this model's."""
    if result["made_by"] != made_by(lm):
        raise FewstepError(f"{file} is of other weights, dtype or device: delete it")
