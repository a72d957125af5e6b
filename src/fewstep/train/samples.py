"""Held-out prompts answered in the middle of training: samples to read, health to log, collapse to stop on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.decode.health import measure_diversity, measure_health
from fewstep.decode.requests import Output
from fewstep.engine.answers import check_prompts
from fewstep.engine.language_model import LanguageModel, Prompt
from fewstep.errors import FewstepError
from fewstep.json_files import read_rows, write_rows_whole
from fewstep.models.network import Network
from fewstep.train.monitor import CollapseMonitor


class Samples:
    """An `Evaluate` for the trainer: decodes `prompts` with `settings` of `LanguageModel.generate`.

    All answers go to `file` (JSONL: step, prompt, text, num_tokens, num_forwards), the first `num_shown` also to the
    log, with tokens per forward and the fields of `Health`. If there is a `monitor`, it judges the health, and the
    trainer should have the same one.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        file: Path | None = None,
        monitor: CollapseMonitor | None = None,
        num_shown: int = 4,
        batch_size: int = 64,
        num_seeds: int = 1,
        **settings: Any,
    ) -> None:
        """`num_seeds`: with which each prompt is answered; with more than one the diversity of the answers is logged
        and judged. FewstepError if there is no prompt.
        """
        if not prompts:
            raise FewstepError("samples need at least one held-out prompt")
        self._prompts = list(prompts)
        self._file, self._monitor = file, monitor
        self._num_shown, self._batch_size, self._num_seeds = num_shown, batch_size, num_seeds
        # An engine prepares itself for weights that stay as they are.
        self._settings = {"engine": "off", **settings}

    def check(self, network: Network, names: Sequence[str]) -> None:
        """FewstepError if this network cannot answer a prompt with these settings (naming it by one of `names`), or if
        the file holds something else. To be called before a run, which would otherwise fail at its first evaluation.
        """
        check_prompts(LanguageModel(network), self._prompts, names, **self._settings)
        if self._file is not None and self._file.exists():
            for _ in read_rows(self._file, ["step"]):
                pass

    def __call__(self, network: Network, step: int) -> Mapping[str, float | str]:
        """CollapseError if the monitor finds that the answers have collapsed; they are written first."""
        prompts: Any = self._prompts
        outputs = LanguageModel(network).generate(prompts, batch_size=self._batch_size, **self._settings)
        if self._file is not None:
            self._write(self._file, outputs, step)
        health = measure_health([output.token_ids for output in outputs], ignored_ids=network.stop_token_ids)
        if self._monitor is not None:
            self._monitor.observe_health(health, step=step)
        diversity = self._diversity(network, outputs, step)
        num_tokens, num_forwards = (
            sum(getattr(output, name) for output in outputs) for name in ("num_tokens", "num_forwards")
        )
        shown = zip(self._prompts[: self._num_shown], outputs, strict=False)
        return {
            "tokens_per_forward": num_tokens / num_forwards,
            **{f"health/{name}": float(value) for name, value in health.to_json().items()},
            **{f"diversity/{name}": value for name, value in diversity.items()},
            **{f"sample/{i}": f"{_plain(prompt)}\n\n{output.text}" for i, (prompt, output) in enumerate(shown)},
        }

    def _diversity(self, network: Network, outputs: Sequence[Output], step: int) -> Mapping[str, float]:
        """Of the answers with further seeds beside these, by name; CollapseError if the monitor judges it so."""
        if self._num_seeds == 1:
            return {}
        prompts: Any = self._prompts
        first, lm = int(self._settings.get("seed", 0)), LanguageModel(network)
        others = [
            lm.generate(prompts, batch_size=self._batch_size, **{**self._settings, "seed": first + i})
            for i in range(1, self._num_seeds)
        ]
        groups = [[output.token_ids for output in group] for group in zip(outputs, *others, strict=True)]
        diversity = measure_diversity(groups, ignored_ids=network.stop_token_ids)
        if self._monitor is not None:
            self._monitor.observe_diversity(diversity, step=step)
        return diversity.to_json()

    def _write(self, file: Path, outputs: Sequence[Output], step: int) -> None:
        """Add this step's answers; those of this step and later come from an interrupted run, and are removed."""
        earlier = [row for row in read_rows(file, ["step"]) if row["step"] < step] if file.exists() else []
        new = [
            {
                "step": step,
                "prompt": prompt,
                "text": output.text,
                "num_tokens": output.num_tokens,
                "num_forwards": output.num_forwards,
            }
            for prompt, output in zip(self._prompts, outputs, strict=True)
        ]
        write_rows_whole(file, [*earlier, *new])


def _plain(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
