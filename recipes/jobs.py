"""A list of jobs shared by one process a GPU: each takes the next that nobody has, and writes its result at once.

A result is a JSON file, written whole: a rerun does only what is missing, so a long list can be done in several
commands. A job that fails is reported (`<name>.failed` holds the traceback), and the others go on.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import FewstepError
from fewstep.json_files import read_json, write_json_whole
from fewstep.models.load import load_network, weights_hash
from fewstep.shards import describe_difference

_WORKER = "FEWSTEP_RECIPE_WORKER"
_DEADLINE = "FEWSTEP_RECIPE_DEADLINE"
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """`run` returns the JSON-able result. `needs` names jobs that must be finished before."""

    name: str
    run: Callable[[], Mapping[str, Any]]
    needs: tuple[str, ...] = ()


def result_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def finished(folder: Path) -> list[str]:
    """Names of the results that are there; a file that is just being written begins with a dot."""
    return sorted(path.stem for path in folder.glob("[!.]*.json"))


def results(folder: Path) -> dict[str, Any]:
    """All finished results by name."""
    return {name: read_json(result_path(folder, name)) for name in finished(folder)}


def spread(
    make_jobs: Callable[[], Sequence[Job]],
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    time_limit_s: float | None = None,
) -> bool:
    """Do the missing jobs, with a process for each visible GPU if there are several.

    The processes run this same command again; in them the function returns False when nothing is left to take, in the
    command itself True, so that it goes on to gather. No job is begun that would, if it takes as long as the longest
    one before it, end after `time_limit_s`. `settings` are what the jobs' names do not say; they are kept beside the
    folder, and FewstepError is raised where there are results of others.
    """
    if _WORKER in os.environ:
        work(make_jobs(), folder, deadline_s=float(os.environ[_DEADLINE]))
        return False
    folder.mkdir(parents=True, exist_ok=True)
    if settings:
        check_settings(folder, settings, begun=bool(finished(folder)))
    for failure in folder.glob("*.failed"):  # those of an earlier run are tried again
        failure.unlink()
    if there := finished(folder):
        print(f"kept in {folder}: {'; '.join(there)}", flush=True)
    deadline_s = time.time() + (float("inf") if time_limit_s is None else time_limit_s)
    devices = visible_gpus()
    if len(devices) < 2:
        work(make_jobs(), folder, deadline_s=deadline_s)
    else:
        _run_again(devices, deadline_s)
    for failure in sorted(folder.glob("*.failed")):
        print(f"failed: {failure.stem}: {failure.read_text().strip().splitlines()[-1]}", flush=True)
    return True


WEIGHTS = "weights"
"""The setting that may never be missing beside results: the hash of each model's weights (see `weights_of`)."""


def weights_of(models: Mapping[str, str | Path]) -> dict[str, str]:
    """The hash of the weights of each model, given by its name, folder or hub id; read on the CPU."""
    return {name: weights_hash(load_network(model, device="cpu"))[:16] for name, model in models.items()}


def check_settings(folder: Path, settings: Mapping[str, Any], *, begun: bool) -> None:
    """Keep the settings beside a folder. FewstepError if it is `begun` and what is in it is of others."""
    settings = json.loads(json.dumps(settings))
    file = folder.with_name(f"{folder.name}-settings.json")
    kept = read_json(file) if file.exists() and begun else {}
    # A newer setting may be missing there, but not whose results they are.
    known = {key: kept.get(key) for key in settings if key in kept or (begun and key == WEIGHTS)}
    difference = describe_difference(known, {key: settings[key] for key in known})
    if difference:
        raise FewstepError(f"{folder} holds results of other settings ({difference}): empty it, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json_whole(file, {**kept, **settings})


def _run_again(devices: Sequence[str], deadline_s: float) -> None:
    """This same command as a worker on each device; all are ended with it, also when it is told to terminate."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    children: list[subprocess.Popen[bytes]] = []
    try:
        for index, device in enumerate(devices):
            own = {_WORKER: str(index), _DEADLINE: str(deadline_s), "CUDA_VISIBLE_DEVICES": device}
            children.append(subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **own}))
        for device, child in zip(devices, children, strict=True):
            if child.wait():
                print(f"the process of GPU {device} ended with code {child.returncode}", flush=True)
    finally:
        for child in children:
            child.terminate()


def visible_gpus() -> list[str]:
    """As they are named in CUDA_VISIBLE_DEVICES. Asking does not occupy them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def work(jobs: Sequence[Job], folder: Path, *, deadline_s: float = float("inf")) -> None:
    """Take and do jobs until none is left that can be done; `deadline_s` is a time of the clock, see `spread`."""
    folder.mkdir(parents=True, exist_ok=True)
    longest_s = 0.0
    while time.time() + longest_s < deadline_s:
        missing = [job for job in jobs if not result_path(folder, job.name).exists()]
        failed = {path.stem for path in folder.glob("*.failed")}
        possible = [job for job in missing if job.name not in failed and not failed.intersection(job.needs)]
        if not possible:
            return
        took_s = _do_first(possible, folder)
        if took_s is None:
            time.sleep(_POLL_S)  # others do them, or what they need
        else:
            longest_s = max(longest_s, took_s)
    print("no time is left for another job; run the command again for the rest", flush=True)


def _do_first(jobs: Sequence[Job], folder: Path) -> float | None:
    """Do the first job that is ready and that nobody else does; its seconds, or None if there is none."""
    for job in jobs:
        if not all(result_path(folder, name).exists() for name in job.needs):
            continue
        with _claimed(folder / ".locks" / job.name) as mine:
            if mine and not result_path(folder, job.name).exists():
                return _do(job, folder)
    return None


def _do(job: Job, folder: Path) -> float:
    started_s = time.monotonic()
    try:
        result = {**job.run(), "job_seconds": time.monotonic() - started_s}
        write_json_whole(result_path(folder, job.name), result)
    except Exception:  # whatever goes wrong in one job, the others are worth having
        (folder / f"{job.name}.failed").write_text(traceback.format_exc())
        print(f"job {job.name} failed:\n{traceback.format_exc()}", flush=True)
    else:
        print(f"job {job.name}: {result['job_seconds']:.1f} s", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return time.monotonic() - started_s


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the lock for itself; the system takes it back when a process dies."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
