"""Jobs shared by one process for each GPU: each takes the next that nobody has, and keeps its result at once.

Every result is a file of its own under the guard of `fewstep.kept`: a rerun does only what is missing, and results of
other weights or settings are refused. A job that fails is reported (`<name>.failed` holds the traceback), and the
others go on.
"""

import hashlib
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
from fewstep.files import lock, storage_errors
from fewstep.kept import check_made_by, keep_result, kept_result
from fewstep.models.load import load_network, weights_hash

_WORKER = "FEWSTEP_JOBS_WORKER"
_DEADLINE = "FEWSTEP_JOBS_DEADLINE"
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """`run` returns a JSON-able result, and `made_by` says what that depends on (see `fewstep.kept`): "weights" and all
    settings and inputs. `needs` names jobs that must be finished before; their results are a part of what makes it.
    """

    name: str
    made_by: Mapping[str, Any]
    run: Callable[[], Mapping[str, Any]]
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_made_by(self.made_by)


def weights_of(models: Mapping[str, str | Path]) -> dict[str, str]:
    """The hash of the weights of each model, given by its name, folder or hub id; read on the CPU one by one."""
    return {name: weights_hash(load_network(model, device="cpu")) for name, model in models.items()}


def result_path(folder: Path, name: str) -> Path:
    """Where the result of the job of this name is kept."""
    return folder / f"{name}.json"


def results(jobs: Sequence[Job], folder: Path) -> dict[str, dict[str, Any]]:
    """The results of those jobs that are finished, with `job_seconds`, by name.

    FewstepError if one was made by other weights, settings or needed results than the job says.
    """
    found = {
        job.name: kept_result(result_path(folder, job.name), _made_by(job, folder))
        for job in jobs
        if _are_finished(job.needs, folder)  # a result that is needed and gone is made again, and compared then
    }
    return {name: result for name, result in found.items() if result is not None}


def spread(jobs: Sequence[Job], folder: Path, *, time_limit_s: float | None = None) -> dict[str, dict[str, Any]] | None:
    """Do the missing jobs, with a process for each visible GPU if there are several, and return `results`.

    The processes run this same command again; in them None is returned when nothing is left to take: they have nothing
    to gather. No job is begun that would, if it takes as long as the longest one before it, end after `time_limit_s`.
    FewstepError before anything is done if results there were made by other weights or settings, or if a job needs one
    that is not there, or itself. A KeyboardInterrupt is given words that say how to go on.
    """
    if _WORKER in os.environ:
        try:
            work(jobs, folder, deadline_s=float(os.environ[_DEADLINE]))
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)  # the process that began this one speaks for all
        return None
    _needed(jobs)
    if found := results(jobs, folder):
        print(f"{len(found)} of {len(jobs)} results are kept in {folder}", flush=True)
    for failure in folder.glob("*.failed"):  # those of an earlier run are tried again
        failure.unlink()
    deadline_s = time.time() + (float("inf") if time_limit_s is None else time_limit_s)
    devices = visible_gpus()
    try:
        if len(devices) < 2:
            work(jobs, folder, deadline_s=deadline_s)
        else:
            _run_again(devices, deadline_s)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"interrupted; results kept in {folder}: {len(results(jobs, folder))}; repeat the command to go on"
        ) from interrupt
    for failure in sorted(folder.glob("*.failed")):
        print(f"failed: {failure.stem}: {failure.read_text().strip().splitlines()[-1]}", flush=True)
    return results(jobs, folder)


def _run_again(devices: Sequence[str], deadline_s: float) -> None:
    """This same command as a worker on each device; all are ended with it."""
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
    """Take and do jobs until none is left that can be done; `deadline_s` is a time of the clock, see `spread`.

    FewstepError, before anything is done, if a job needs one that is not there, or itself.
    """
    needed = _needed(jobs)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    longest_s = 0.0
    while time.time() + longest_s < deadline_s:
        missing = [job for job in jobs if not result_path(folder, job.name).exists()]
        failed = {path.stem for path in folder.glob("*.failed")}
        possible = [job for job in missing if not failed.intersection(needed[job.name])]
        if not possible:
            return
        took_s = _do_first(possible, folder)
        if took_s is None:
            time.sleep(_POLL_S)  # others do them, or what they need
        else:
            longest_s = max(longest_s, took_s)
    print("no time is left for another job; run the command again for the rest", flush=True)


def _needed(jobs: Sequence[Job]) -> dict[str, set[str]]:
    """Of each job by name: its own name, those of the jobs that it needs, of those that they need, and so on."""
    needs = {job.name: job.needs for job in jobs}
    needed: dict[str, set[str]] = {}

    def find(name: str, waiting: tuple[str, ...]) -> set[str]:
        if name not in needs:
            raise FewstepError(f"the job {waiting[-1]} needs {name}, and there is no job of that name; add it")
        if name in waiting:
            circle = " needs ".join([*waiting[waiting.index(name) :], name])
            raise FewstepError(f"the job {name} needs itself ({circle}); take one need out")
        if name not in needed:
            needed[name] = {name}.union(*(find(one, (*waiting, name)) for one in needs[name]))
        return needed[name]

    for name in needs:
        find(name, ())
    return needed


def _do_first(jobs: Sequence[Job], folder: Path) -> float | None:
    """Do the first job that is ready and that nobody else does; its seconds, or None if there is none."""
    for job in jobs:
        if not _are_finished(job.needs, folder):
            continue
        with _claimed(folder / ".locks" / job.name) as mine:
            if mine and not result_path(folder, job.name).exists():
                return _do(job, folder)
    return None


def _do(job: Job, folder: Path) -> float:
    started_s = time.monotonic()
    try:
        result = {**job.run(), "job_seconds": time.monotonic() - started_s}
        keep_result(result_path(folder, job.name), result, _made_by(job, folder))
    except Exception as error:  # whatever goes wrong in one job, the others are worth having
        (folder / f"{job.name}.failed").write_text(traceback.format_exc())
        told = str(error) if isinstance(error, FewstepError) else traceback.format_exc()
        print(f"job {job.name} failed: {told}", flush=True)
    else:
        print(f"job {job.name}: {result['job_seconds']:.1f} s", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return time.monotonic() - started_s


def _are_finished(names: Sequence[str], folder: Path) -> bool:
    return all(result_path(folder, name).exists() for name in names)


def _made_by(job: Job, folder: Path) -> dict[str, Any]:
    """What the job says, and a hash of each result that it needs, whenever that was made."""
    if not job.needs:
        return dict(job.made_by)
    needed = {}
    for name in job.needs:
        result = {**json.loads(result_path(folder, name).read_bytes())["result"], "job_seconds": None}
        needed[name] = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
    return {**job.made_by, "needs": needed}


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the lock for itself; the system takes it back when a process dies."""
    path.parent.mkdir(exist_ok=True)
    path.touch()
    descriptor = lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)
