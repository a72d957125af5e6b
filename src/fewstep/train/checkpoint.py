"""Checkpoints of a training run: whole folders, of which the newest is continued.

A checkpoint also names the hash of each of its files. Nothing of it is used unless all are there as they were written:
accelerate would go on without random states that are missing, and the run would no longer repeat itself.
"""

import hashlib
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
from accelerate.utils.other import load as load_checked
from torch import nn

from fewstep.errors import FewstepError
from fewstep.files import write_folder_whole
from fewstep.json_files import read_json

RUN = "run.json"
AVERAGE = "average.pt"
HASHES = "hashes.json"

VERSION = 2
"""Of what a checkpoint holds and of how a run goes on from it; 1 had no hashes, and a schedule that began at 0."""


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
                (target / RUN).write_text(json.dumps({**run, "fingerprint": self._fingerprint}))
        if self.accelerator.is_main_process:
            for path in self.folder.iterdir():
                if path.name != f"step-{step:08d}":  # older ones, and what killed writers left
                    shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Path | None:
        """The folder of the checkpoint that would be continued, if there is one."""
        return max(self.folder.glob("step-*"), default=None)

    def restore(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Load the newest checkpoint; its `run` and `local`, or None if there is none.

        FewstepError if it was made with other settings or data, or if it is damaged.
        """
        newest = self.newest()
        if newest is None:
            return None
        run = read_json(newest / RUN)
        if not isinstance(run, dict):
            raise _damaged(newest, f"{RUN} is no JSON object")
        difference = describe_difference(run.get("fingerprint"), self._fingerprint)
        if difference:
            raise FewstepError(
                f"{newest} is of another run ({difference}); repeat the command that made it, remove the folder, "
                "or choose another output"
            )
        _check_hashes(newest)
        try:
            self.accelerator.load_state(str(newest))
            if self.average is not None:
                self.average.load_state_dict(torch.load(newest / AVERAGE, weights_only=True))
            random_states_taken = self._has_random_states_of(newest)
        except Exception as error:  # torch, safetensors and accelerate each raise their own for what does not fit
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _damaged(newest, f"it does not fit this run: {reason[:200]}") from error
        if not random_states_taken:
            raise _damaged(newest, "its random states cannot be restored on this machine")
        return run, read_json(newest / self._local_name)

    @property
    def _fingerprint(self) -> dict[str, Any]:
        return {**self.fingerprint, "version": VERSION}

    def _has_random_states_of(self, folder: Path) -> bool:
        """Whether torch's generators stand as the checkpoint says; accelerate passes over what it cannot restore."""
        states = load_checked(folder / f"random_states_{self.accelerator.process_index}.pkl")
        pairs = [(torch.get_rng_state(), states["torch_manual_seed"])]
        if self.accelerator.device.type == "cuda":
            pairs += zip(torch.cuda.get_rng_state_all(), states["torch_cuda_manual_seed"], strict=True)
        return all(torch.equal(there, wanted) for there, wanted in pairs)

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
            folder = Path(str(shared[0]))
            yield folder
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (folder / HASHES).write_text(json.dumps(_hashes(folder), indent=1))
        self.accelerator.wait_for_everyone()


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a checkpoint but the one that lists them, by name."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name != HASHES:
            with path.open("rb") as stream:
                hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _check_hashes(folder: Path) -> None:
    """FewstepError naming a file of a checkpoint that is missing or not as it was written."""
    written = read_json(folder / HASHES)
    if not isinstance(written, dict):
        raise _damaged(folder, f"{HASHES} is no JSON object")
    try:
        there = _hashes(folder)
    except OSError as error:
        raise _damaged(folder, f"{error.filename} cannot be read: {error.strerror}") from error
    for name in sorted(written.keys() | there.keys()):
        if name not in there:
            raise _damaged(folder, f"{name} is missing")
        if there[name] != written.get(name):
            raise _damaged(folder, f"{name} is not as it was written")


def _damaged(folder: Path, reason: str) -> FewstepError:
    return FewstepError(
        f"the checkpoint {folder} cannot be continued ({reason}); restore its files, or remove the folder to go on "
        "from an earlier checkpoint, if there is one, or else from the start"
    )


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
