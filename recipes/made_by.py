"""What made a kept result, so that a rerun does not mix it with what others make."""

from fewstep.engine.language_model import LanguageModel
from fewstep.models.load import weights_hash


def made_by(lm: LanguageModel) -> dict[str, str]:
    """Weights, numbers and kind of device: answers of others are not these."""
    network = lm.network
    return {"weights": weights_hash(network), "dtype": str(network.dtype), "device": network.device.type}
