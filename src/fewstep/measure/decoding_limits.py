"""What a device allows causal, block and full-canvas decoding over batch sizes, told beside the figures of `bench`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.measure.bandwidth import DeviceRates
from fewstep.measure.bench import Variant
from fewstep.measure.plots import plot_roofline
from fewstep.measure.roofline import MOST_REQUESTS, Analysis, Rates, Setting, Sizes, analysed


@dataclass(frozen=True, kw_only=True)
class DecodingLimits:
    """What the device allows the kinds of decoding over batch sizes, for the first variant's network and sizes."""

    name: str
    sizes: Sizes
    setting: Setting
    rates: Rates
    of_kinds: Sequence[Analysis]

    @classmethod
    def of(
        cls,
        variant: Variant,
        figures: Sequence[Mapping[str, Any]],
        rates: Mapping[str, DeviceRates],
        *,
        tokens_per_pass: float,
    ) -> "DecodingLimits":
        """`tokens_per_pass`: of block decoding, where none was measured."""
        choice, network = variant.choice, variant.lm.network
        in_blocks = next((one for one in figures if one["block_size"]), None)
        block_size = in_blocks["block_size"] if in_blocks else network.role.block_size
        tokens_per_pass = min(block_size, tokens_per_pass)
        if in_blocks:
            answers = in_blocks["answers"]
            tokens_per_pass = answers["num_tokens_mean"] / answers["passes_mean"] / in_blocks["batch_size"]
        setting = Setting(
            context=figures[0]["context"],
            canvas=figures[0]["max_new_tokens"],
            block_size=block_size,
            tokens_per_pass=tokens_per_pass,
        )
        sizes, limits = Sizes.of(network.module, choice.network.dtype), rates[choice.dtype].limits
        return cls(
            name=f"{network.name}, {choice.dtype}, {figures[0]['machine']['gpu'] or figures[0]['machine']['cpu']}",
            sizes=sizes,
            setting=setting,
            rates=limits,
            of_kinds=analysed(sizes, setting, limits),
        )

    def to_json(self) -> dict[str, Any]:
        kinds = [asdict(one) for one in self.of_kinds]
        return {**asdict(self.setting), "ridge": self.rates.ridge, "kinds": kinds}

    def draw(self, figures: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
        return plot_roofline(
            figures, stem, sizes=self.sizes, setting=self.setting, rates=self.rates, title=self.name
        )  # fmt: skip

    def sentence(self) -> str:
        def up_to(batch: int | None) -> str:
            if batch is None:
                return "at no batch size"
            return f"up to batch {batch}" if batch < MOST_REQUESTS else "at every batch size"

        told = [
            f"{one.kind} decoding waits for the memory {up_to(one.memory_bound_up_to)}"
            + ("" if one.kind == "causal" else f" and may beat causal decoding {up_to(one.pays_up_to)}")
            for one in self.of_kinds
        ]
        return (
            f"By the measured rates, at {self.setting.tokens_per_pass:.1f} tokens a pass in blocks of "
            f"{self.setting.block_size}: {'; '.join(told)}."
        )
