"""What answers with networks in embedding space."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fewstep.decode.embedding import EmbeddingSampling
from fewstep.decode.embedding_generator import EmbeddingSampler, check_embedding_request, sampler_for
from fewstep.decode.generator import Generator
from fewstep.decode.requests import Record, Request
from fewstep.engine.choice import Engines
from fewstep.engine.manner import Manner
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.models.network import Network


class Samplers:
    """Makes the samplers of one network in embedding space."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._engines = Engines(network)

    def __call__(
        self,
        settings: GenerationSettings,
        requests: Sequence[Request],
        *,
        batch_size: int = 32,
        record: Record | None = None,
        listeners: Sequence[Any] = (),
        kept: Generator | None = None,
    ) -> EmbeddingSampler:
        """A sampler for these requests; each listener is called after a round, with the sampler."""
        if record is not None:
            raise FewstepError(
                "nothing is recorded of a model in embedding space, whose tokens change until the last pass"
            )
        sampling = self._sampling(settings)
        note = self._note(sampling)
        if note is not None:
            warnings.warn(note, stacklevel=2)
        made = sampler_for(
            self._engines.without_decoder(settings.engine).network,
            sampling,
            requests,
            batch_size=batch_size,
            kept=kept,
            fixed_temperature=_temperature(settings),
        )
        made.listeners = list(listeners)
        return made

    def manner(self, settings: GenerationSettings) -> Manner:
        """How it answers. FewstepError for a setting that has no meaning in embedding space."""
        sampling = self._sampling(settings).for_role(self.network.role)
        choice = self._engines.without_decoder(settings.engine)
        return Manner(
            decoder=str(sampling.sampler),
            rule={"threshold": None, "gaps": None, "block_size": None},
            engine=choice.engine,
            note=self._note(sampling) or choice.note,
            computed_in=choice.network.dtype,
            told={**vars(sampling), "temperature": _temperature(settings)},
        )

    def checker(self, settings: GenerationSettings) -> Callable[[Request], object]:
        """What raises FewstepError for a request that cannot be answered."""
        sampling = self._sampling(settings)
        return lambda request: check_embedding_request(self.network, sampling, request)

    def _sampling(self, settings: GenerationSettings) -> EmbeddingSampling:
        sampling = settings.embedding_sampling()
        sampling.for_role(self.network.role)
        return sampling

    def _note(self, sampling: EmbeddingSampling) -> str | None:
        assert self.network.role.embedding_space is not None
        return sampling.note(self.network.role.embedding_space)


def _temperature(settings: GenerationSettings) -> float:
    return 1.0 if settings.temperature is None else settings.temperature
