"""Which engine runs the passes of a decoder, or why none does.

The plain path, `run_pass` of the loop, runs everything and is the reference. An engine runs the same passes faster.
Each is a module of its own in this room, and gets its case in `Engines.choice`.
"""

from dataclasses import dataclass
from typing import Literal

from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import RunPass, run_pass
from fewstep.models.network import Network

EngineSetting = Literal["auto", "off"]
"""`auto` takes the engine where it pays, `off` is the plain path."""

OFF = "off"
"""The plain path, as reports name it in the place of an engine."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How passes are run.

    `engine`: its name, or OFF. `network`: whose forward a pass runs: the one that was loaded, or its weights in the
    numbers of the engine. `note`: why the plain path is taken though the engine was asked for, in a sentence.
    """

    engine: str
    network: Network
    run_pass: RunPass
    note: str | None = None

    @property
    def dtype(self) -> str:
        """The numbers in which passes are computed, such as float32."""
        return str(self.network.dtype).removeprefix("torch.")


class Engines:
    """The engines of one network: chosen anew for each call, kept between calls with what they have prepared.

    `run_pass`: a function of the caller's own that runs all passes; no engine is taken then.
    """

    def __init__(self, network: Network, run_pass: RunPass | None = None) -> None:
        self.network = network
        self._run_pass = run_pass

    def choice(self, decoder: Decoder, setting: EngineSetting, *, records: bool = False) -> Choice:
        """How the passes of this decoder are run; `records`: hidden rows are recorded, as training reads them."""
        if self._run_pass is not None:
            return Choice(
                engine=OFF, network=self.network, run_pass=self._run_pass, note="a function of your own runs the passes"
            )
        if setting == "off":
            return self._plain(None)
        return self._plain(f"there is no engine yet for {self.network.device.type}")

    def _plain(self, note: str | None) -> Choice:
        return Choice(engine=OFF, network=self.network, run_pass=run_pass, note=note)
