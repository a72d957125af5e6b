"""Which engine runs the passes of a decoder, or why none does.

The plain path, `run_pass` of the loop, runs everything and is the reference. An engine runs the same passes faster.
Each is a module of its own in this room, and gets its case in `Engines.choice`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import Loop, RunPass, run_pass
from fewstep.engine.captured import CapturedLoop
from fewstep.engine.cpu import CpuNetwork, has_bfloat16
from fewstep.engine.stack import FusedNetwork
from fewstep.engine.stack import fused as fused_network
from fewstep.errors import FewstepError
from fewstep.models.load import free_memory
from fewstep.models.network import Network

EngineSetting = Literal["auto", "compiled", "off"]
"""`auto` takes the engine where it pays; `compiled` too, and waits until passes are compiled, where the engine can be
faster for that; `off` is the plain path.
"""

OFF = "off"
"""The plain path, as reports name it in the place of an engine."""


_Weights = list[tuple[int, int]]
"""Of each parameter where it is in memory, and how often it was written."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How passes are run.

    `engine`: its name, or OFF. `network`: whose forward a pass runs: the one that was loaded, or its weights in the
    numbers of the engine; `companions` stand in the place of those of the decoder. `note`: why the plain path is taken
    though the engine was asked for, in a sentence. `kind`: the class of the loop; `more`: what it is made with beside.
    """

    engine: str
    network: Network
    run_pass: RunPass
    companions: Mapping[str, Network] = field(default_factory=dict)
    note: str | None = None
    kind: type[Loop] = Loop
    more: Mapping[str, Any] = field(default_factory=dict)

    def loop_options(self) -> dict[str, Any]:
        """What `loop_for` is given beside the network, the decoder and the requests."""
        return {"run_pass": self.run_pass, "companions": self.companions, "kind": self.kind, **self.more}

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
        self._on_cpu: dict[tuple[Network, torch.dtype], CpuNetwork | FewstepError] = {}
        self._state_of: dict[Network, _Weights] = {}
        self._on_gpu: dict[Network, tuple[FusedNetwork | FewstepError | None, _Weights]] = {}

    def choice(self, decoder: Decoder, setting: EngineSetting, *, records: bool = False) -> Choice:
        """How the passes of this decoder are run; `records`: hidden rows are recorded, as training reads them."""
        if self._run_pass is not None:
            return Choice(
                engine=OFF, network=self.network, run_pass=self._run_pass, note="a function of your own runs the passes"
            )
        if setting == "off":
            return self._plain(None)
        if records:
            return self._plain("hidden rows are recorded from the plain path")
        try:
            if self.network.device.type == "cpu":
                return self._cpu(decoder)
            if self.network.device.type == "cuda":
                return self._cuda(decoder, compiles=setting == "compiled")
        except FewstepError as error:
            return self._plain(str(error))
        return self._plain(f"there is no engine yet for {self.network.device.type}")

    def without_decoder(self, setting: EngineSetting) -> Choice:
        """How forwards of whole texts are run, which no decoder plans: on a CPU by fused layers, elsewhere plainly."""
        if setting == "off":
            return self._plain(None)
        if self.network.device.type != "cpu":
            return self._plain("passes of models in embedding space are not captured")
        try:
            return Choice(engine="cpu", network=self._cpu_network(self.network, rounds=True), run_pass=run_pass)
        except FewstepError as error:
            return self._plain(str(error))

    def _plain(self, note: str | None) -> Choice:
        return Choice(engine=OFF, network=self.network, run_pass=run_pass, note=note)

    def _cuda(self, decoder: Decoder, *, compiles: bool) -> Choice:
        """Captured passes on fused layers, in the numbers of the network."""
        networks = {"target": self.network, **decoder.traits.companions}
        fused = {name: self._fused(each) for name, each in networks.items()}
        made = {"fused": fused, "compiles": compiles}
        name = "cuda compiled" if compiles else "cuda"
        return Choice(engine=name, network=self.network, run_pass=run_pass, kind=CapturedLoop, more=made)

    def _fused(self, network: Network) -> FusedNetwork:
        """FewstepError if it cannot be run so; told once more each time that it is asked for."""
        found, weights = self._on_gpu.get(network, (None, []))
        copied = isinstance(found, FusedNetwork) and found.copies_weights
        if weights != _weights(network, written=copied):  # nobody has tried, or it has other weights since
            try:
                found = fused_network(network)
            except FewstepError as error:
                found = error
            copied = isinstance(found, FusedNetwork) and found.copies_weights
            self._on_gpu[network] = found, _weights(network, written=copied)
        if isinstance(found, FewstepError):
            raise found
        assert found is not None
        return found

    def _cpu(self, decoder: Decoder) -> Choice:
        """Fused layers; in bfloat16 if nobody asked for other numbers, unless the decoder promises the text of another.

        Decoders of causal networks do: they verify by equality with what one row alone would give.
        """
        network = self._cpu_network(self.network, rounds=decoder.role.name != "autoregressive")
        companions = decoder.traits.companions.items()
        found = {name: self._cpu_network(companion, rounds=True) for name, companion in companions}
        return Choice(engine="cpu", network=network, companions=found, run_pass=run_pass)

    def _cpu_network(self, network: Network, *, rounds: bool) -> CpuNetwork:
        """FewstepError if it cannot be run so; told once more each time that it is asked for.

        It is made anew when weights have been changed since, as training does.
        """
        state = _weights(network, written=True)
        if self._state_of.setdefault(network, state) != state:
            self._state_of[network] = state
            self._on_cpu = {key: made for key, made in self._on_cpu.items() if key[0] is not network}
        dtype = torch.bfloat16 if rounds and network.may_round and has_bfloat16() else network.dtype
        if (network, dtype) not in self._on_cpu:
            try:
                _check_fits(network, dtype)
                self._on_cpu[network, dtype] = CpuNetwork(network, dtype)
            except FewstepError as error:
                self._on_cpu[network, dtype] = error
        found = self._on_cpu[network, dtype]
        if isinstance(found, FewstepError):
            raise found
        return found


def _weights(network: Network, *, written: bool) -> _Weights:
    """Where its parameters are in memory, and if it matters how often they were written."""
    return [
        (each.data_ptr(), each._version if written and not each.is_inference() else 0)
        for each in network.module.parameters()
    ]


def _check_fits(network: Network, dtype: torch.dtype) -> None:
    """FewstepError if the engine does not compute in these numbers, or cannot keep a second copy of the weights."""
    if not torch.backends.mkldnn.is_available():
        raise FewstepError("this build of torch has no oneDNN, whose products the engine uses on a CPU")
    if network.quantized is not None:
        raise FewstepError(f"weights in {network.quantized} are multiplied by the plain path")
    if dtype not in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise FewstepError(f"on a CPU the engine computes in float32 or bfloat16, and {network.name} is in {name}")
    if dtype == torch.bfloat16 and not has_bfloat16():
        raise FewstepError("this processor does not multiply bfloat16 itself")
    needed, free = network.num_parameters * dtype.itemsize, free_memory(network.device)
    if free is not None and 2 * needed > free:
        raise FewstepError(
            f"the engine keeps a copy of the weights, which takes {needed / 1e9:.1f} GB, and there are "
            f"{free / 1e9:.1f} GB free"
        )
