"""From settings to the loop that answers requests, with the draft or the heads that they name."""

from collections.abc import Callable, Sequence
from typing import Any

from fewstep.decode.admission import check_request
from fewstep.decode.decoder import Decoder, threshold_rule
from fewstep.decode.loop import Loop, RunPass, loop_for
from fewstep.decode.requests import Record, Request
from fewstep.engine.choice import Choice, Engines, EngineSetting
from fewstep.engine.manner import Manner
from fewstep.engine.settings import GenerationSettings
from fewstep.models.load import load_network
from fewstep.models.medusa import MedusaHeads, load_heads
from fewstep.models.network import Network, check_draft


class Loops:
    """Makes the loops of one network, which run their passes by the engine, or by `run_pass` if that is given.

    A draft or heads are loaded once, in the network's numbers and on its device.
    """

    def __init__(self, network: Network, run_pass: RunPass | None = None) -> None:
        self.network = network
        self._engines = Engines(network, run_pass)
        self._drafts: dict[str, Network] = {}
        self._heads: dict[str, MedusaHeads] = {}

    def __call__(
        self,
        settings: GenerationSettings,
        requests: Sequence[Request],
        *,
        record: Record | None = None,
        **options: Any,
    ) -> Loop:
        """A loop for these requests; `options` as for `loop_for`."""
        decoder = self.decoder(settings)
        choice = self._engines.choice(decoder, settings.engine, records=record is not None)
        return loop_for(choice.network, decoder, requests, record=record, **choice.loop_options(), **options)

    def choice(self, settings: GenerationSettings) -> Choice:
        """How passes are run with these settings, where nothing is recorded."""
        return self._engines.choice(self.decoder(settings), settings.engine)

    def manner(self, settings: GenerationSettings) -> Manner:
        """How a loop answers with these settings."""
        decoder, choice = self.decoder(settings), self.choice(settings)
        return Manner(
            decoder=decoder.name,
            rule=threshold_rule(decoder),
            engine=choice.engine,
            note=choice.note,
            computed_in=choice.network.dtype,
            policy=repr(decoder.policy),
        )

    def checker(self, settings: GenerationSettings) -> Callable[[Request], object]:
        """What raises FewstepError for a request that a loop with these settings cannot answer."""
        decoder = self.decoder(settings)
        return lambda request: check_request(self.network, decoder, request)

    def with_slots(self, decoder: Decoder, engine: EngineSetting, **options: Any) -> Loop:
        """A loop for requests to come; `options` as for `Loop`."""
        sharing = options.get("sharing")
        is_strict = sharing is not None and sharing.strict  # which the plain path alone knows
        records = options.get("record") is not None
        choice = self._engines.choice(decoder, "off" if is_strict else engine, records=records)
        how = choice.loop_options()
        return how.pop("kind")(choice.network, decoder, **how, **options)

    def decoder(self, settings: GenerationSettings) -> Decoder:
        """The decoder that the settings make for this network."""
        return settings.decoder_for(
            self.network.role, adapter=self.network.adapter, draft=self._draft, heads=self._medusa_heads
        )

    def _draft(self, name: str) -> Network:
        if name not in self._drafts:
            dtype, device = str(self.network.dtype).removeprefix("torch."), str(self.network.device)
            draft = load_network(name, dtype=dtype, device=device)
            check_draft(self.network, draft)
            draft.may_round = self.network.may_round
            self._drafts[name] = draft
        return self._drafts[name]

    def _medusa_heads(self, folder: str) -> MedusaHeads:
        if folder not in self._heads:
            self._heads[folder] = load_heads(folder, self.network)
        return self._heads[folder]
