"""Checkpoints of a run in training: whole folders, of which the newest is continued."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from fewstep.errors import FewstepError
from fewstep.files import read_json, write_folder_whole

RUN = "run.json"
AVERAGE = "average.pt"


@dataclass(frozen=True)
class Checkpoints:
    """The folder `step-N` of each checkpoint under `folder`. A folder appears whole, then older ones are removed.

    accelerate saves weights, optimizer, schedule and random states; `average` the weights' moving average, if any;
    `run` what is the same for all processes and `local` what is not, JSON objects. `fingerprint`, JSON too, is what
    must agree for a checkpoint to be continued.
    """

    folder: Path
    accelerator: Accelerator
    average: nn.Module | None
    fingerprint: Mapping[str, Any]

    def save(self, step: int, run: Mapping[str, Any], local: Mapping[str, Any]) -> None:
        """To be called by all processes. FewstepError if the disk is full; the previous checkpoint is then kept."""
        with self._written_whole(self.folder / f"step-{step:08d}") as target:
            with self.accelerator.register_save_state_pre_hook(_drop_tied_weights):
                self.accelerator.save_state(str(target))
            (target / self._local_name).write_text(json.dumps(local))
            if self.accelerator.is_main_process:
                if self.average is not None:
                    torch.save(self.average.state_dict(), target / AVERAGE)
                (target / RUN).write_text(json.dumps({**run, "fingerprint": self.fingerprint}))
        if self.accelerator.is_main_process:
            for path in self.folder.iterdir():
                if path.name != f"step-{step:08d}":  # older ones, and what killed writers left
                    shutil.rmtree(path, ignore_errors=True)

    def restore(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Load the newest checkpoint; its `run` and `local`, or None if there is none.

        FewstepError if it was made with other settings or data.
        """
        newest = max(self.folder.glob("step-*"), default=None)
        if newest is None:
            return None
        run = read_json(newest / RUN)
        difference = describe_difference(run["fingerprint"], self.fingerprint)
        if difference:
            raise FewstepError(
                f"{newest} is of another run ({difference}); repeat the command that made it, remove the folder, "
                "or choose another output"
            )
        self.accelerator.load_state(str(newest))
        if self.average is not None:
            self.average.load_state_dict(torch.load(newest / AVERAGE, weights_only=True))
        return run, read_json(newest / self._local_name)

    @property
    def _local_name(self) -> str:
        return f"process-{self.accelerator.process_index}.json"

    @contextmanager
    def _written_whole(self, target: Path) -> Iterator[Path]:
        """One temporary folder for all processes, which the main one renames once all have written."""
        with ExitStack() as stack:
            shared: list[str | None] = [None]
            if self.accelerator.is_main_process:
                shared = [str(stack.enter_context(write_folder_whole(target, overwrite=True)))]
            broadcast_object_list(shared)
            yield Path(str(shared[0]))
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()


def _drop_tied_weights(models: list[nn.Module], states: list[dict[str, torch.Tensor]], folder: str) -> None:
    """Keep one of several names of a tensor, as safetensors asks; accelerate would, and warn of it each time."""
    for state in states:
        seen = set()
        for name, tensor in list(state.items()):
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if key in seen:
                del state[name]
            seen.add(key)


def describe_difference(there: Any, here: Any, name: str = "") -> str:
    """The first thing that differs, as 'seed is 1 there and 2 here', or ''."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            difference = describe_difference(there.get(key), here.get(key), key)
            if difference:
                return difference
        return ""
    return "" if there == here else f"{name} is {there} there and {here} here"
