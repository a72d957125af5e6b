"""The folder that a training run writes: whether it can be written is found out before any work."""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.json_files import read_json
from fewstep.models.checkpoint_files import DESCRIPTIONS

LOGS = "logs"
CHECKPOINTS = "checkpoints"
REPORT = "report.json"
SAMPLES = "samples.jsonl"
FINISHED = "finished"
"""Where the finished files lie until all of them are whole."""

_CHECKPOINT = re.compile(r"\.?step-\d{8}(\.\S*)?")
"""Also one that was just being written, under its temporary name."""

PROBE = b"\0" * 4096
"""A file of less may still be stored where nothing else can be."""


def check_output(output: Path) -> None:
    """FewstepError if `output` holds a finished model, or cannot be a folder that is written to.

    This is tried with a small file, also in the folders of an earlier run; the file is removed again. If the model is
    that of a run that was killed before it could remove its checkpoints, they are removed now.
    """
    try:
        if any((output / name).exists() for name in DESCRIPTIONS):
            _remove_what_a_kill_left(output)
            raise FewstepError(f"{output} already holds a model; choose another output folder or remove it")
        for folder in (output, *(output / name for name in (LOGS, CHECKPOINTS, FINISHED))):
            if folder.is_symlink() and not folder.exists():
                raise FewstepError(f"{folder} is a link to {os.readlink(folder)}, which is not there; make that folder")
            if folder.exists() and not folder.is_dir():
                raise FewstepError(f"{folder} is a file, not a folder; choose another output folder")
            if folder.exists() or folder == output:
                _try_out(folder)
    except OSError as error:
        raise FewstepError(
            f"cannot write to the output folder {str(output)[:200]}: {error.strerror or error}; choose another one, or "
            "make room there"
        ) from error
    except ValueError as error:
        if isinstance(error, FewstepError):
            raise
        raise FewstepError(f"{str(output)!r} cannot be the name of a folder: {error}") from error


def _remove_what_a_kill_left(output: Path) -> None:
    """Checkpoints of a run whose model is there: the description, which is, comes last, so nothing is missing."""
    try:
        report = read_json(output / REPORT)
    except (OSError, FewstepError):
        return
    if not isinstance(report, dict) or "objective" not in report:
        return  # no run of ours
    checkpoints, finished = output / CHECKPOINTS, output / FINISHED
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        for path in checkpoints.iterdir():
            if _CHECKPOINT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
    for folder in (checkpoints, finished):
        with suppress(OSError):  # it is not there, or somebody else's files are in it
            folder.rmdir()


def check_space(output: Path, num_bytes: int) -> None:
    """FewstepError if the disk that `output` is or will be on has less room than that."""
    place = next(path for path in (output, *Path(os.path.realpath(output)).parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise FewstepError(
            f"the disk of {output} has {free / 1e6:.1f} MB left, and what is saved there takes {num_bytes / 1e6:.1f} "
            "MB; free some space or choose another output folder"
        )


def _try_out(folder: Path) -> None:
    """OSError if no file can be written in `folder`, which is made for that, with its parents, if it is not there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(PROBE)
            probe.flush()
            os.fsync(probe.fileno())
    finally:
        with suppress(OSError):  # somebody else uses what was made
            for path in missing:
                path.rmdir()
