"""Kill commands at every event of the file system, run them again, and see what is left: `python tests/kill_events.py`.

For each command: once undisturbed, which counts its events and gives the right results; then for each chosen event k
afresh, killed by SIGKILL just before it, and once more undisturbed. After the kill no source and no target that was
there may be missing or torn; after the rerun the results must be the same and nothing may lie beside them. Events are
files opened for writing, renames, removals, new folders, flushes, locks, swaps and kept results. Commands run in forks
of this one process, so that torch is imported once.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from fewstep import files, kept
from fewstep.cli import training  # noqa: F401  (what a fork needs is imported before it)
from fewstep.cli.main import main
from fewstep.measure import plots  # noqa: F401
from fewstep.models.importers import convert  # noqa: F401
from fewstep.models.load import save_network
from fewstep.models.tiny import tiny_network
from fewstep.train import causal_records, relabel, trainer  # noqa: F401

SHORT = "--max-new-tokens 8"
TRAIN = "--rows 1 --row-length 64 --max-steps 3 --save-every 1 --evaluate-every 2 --watch-data rows.jsonl "
TRAIN += "--watch-num-prompts 2 --watch-max-new-tokens 8 --device cpu"
COMMANDS = {
    "import": "import plain out",
    "import --overwrite": "import plain out --overwrite",
    "import --overwrite, in two renames": "import plain out --overwrite",
    "merge": "merge adapter --output out",
    "merge --overwrite": "merge adapter --output out --overwrite",
    "generate": f"generate --model student --input rows.jsonl --output out.jsonl --json out.json {SHORT}",
    "correct": "correct rows.jsonl --model student --output out.txt --json out.json",
    "eval": f"eval --model student --data rows.jsonl --records out.jsonl --json out.json --plot out {SHORT}",
    "compare": "compare student,max_new_tokens=8 teacher,max_new_tokens=8 --data rows.jsonl --json out.json",
    "calibrate": "calibrate --model student --reference causal --data rows.jsonl --eps 0.9 --confidence 0.5 "
    f"--thresholds 0.5 --output out --json out.json {SHORT}",
    "collect": f"collect --model teacher --data rows.jsonl --output out --shard-size 2 {SHORT}",
    "collect, causal": f"collect --model causal --data rows.jsonl --output out --shard-size 2 {SHORT}",
    "train": f"train sft --model causal --data rows.jsonl --output out {TRAIN}",
    "train --lora": f"train sft --model causal --data rows.jsonl --output out --lora {TRAIN}",
}
SOURCES = ("student", "teacher", "causal", "plain", "adapter", "rows.jsonl")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_AUDITED = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


@dataclass
class Outcome:
    """What killing one command showed; `faults` in words."""

    command: str
    num_events: int
    num_killed: int = 0
    faults: list[str] = field(default_factory=list)


# Events


class _Counter:
    """Counts events that change files below a folder, and kills this process before event `last`, if that is given."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.count, self._folder, self._last = 0, str(folder), last

    def event(self) -> None:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "fcntl.flock":
            self.event()
        elif name == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and self._is_inside(path):
                self.event()
        elif name in _AUDITED and any(self._is_inside(one) for one in arguments):
            self.event()

    def _is_inside(self, path: object) -> bool:
        if isinstance(path, int) or path is None:
            return False
        with contextlib.suppress(TypeError, ValueError):
            return os.path.abspath(os.fsdecode(path)).startswith(self._folder)  # type: ignore[arg-type]
        return False

    def around(self, holder: Any, name: str) -> None:
        """Count before and after each call of a function that the interpreter does not report."""
        called = getattr(holder, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.event()
            result = called(*arguments, **options)
            self.event()
            return result

        setattr(holder, name, counted)


def _in_fork(folder: Path, line: str, *, last: int | None, two_renames: bool) -> tuple[int, int, str]:
    """Run a command in a fork: its exit code (negative: the signal), how many events it had, and what it said."""
    shown, counted = folder.parent / "shown", folder.parent / "counted"
    counted.write_text("0")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            with shown.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            sys.argv = ["fewstep", *line.split()]
            counter = _Counter(folder, last)
            if two_renames:
                files._swap = lambda *_: False
            counter.around(files, "_swap")
            counter.around(os, "fsync")
            counter.around(kept.Kept, "add")
            sys.addaudithook(counter.audit)
            try:
                main(line.split())
            except SystemExit as stopped:
                code = int(stopped.code or 0)  # type: ignore[arg-type]
            sys.stdout.flush()
            counted.write_text(str(counter.count))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(counted.read_text()), shown.read_text(errors="replace").strip()


# What is there


def _listing(folder: Path) -> list[str]:
    """Every file and folder, but the logs of a training, of which each run begins one."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name for name in names if "tfevents" not in name)


_OF_THE_MOMENT = ("second", "step_ms", "answered_earlier", "num_shards_made_now", "tokens_per_second", "history")


def _steady(value: Any) -> Any:
    """JSON without what depends on the moment."""
    if isinstance(value, dict):
        return {name: _steady(one) for name, one in value.items() if not any(part in name for part in _OF_THE_MOMENT)}
    return [_steady(one) for one in value] if isinstance(value, list) else value


def _contents(folder: Path, names: tuple[str, ...] | None = None) -> dict[str, str]:
    """A digest of every file, less what depends on the moment: times, and the drawings of them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "tfevents" in name or path.suffix in (".png", ".svg"):
            continue
        if names is not None and name.split("/")[0] not in names:
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = [data] if path.suffix == ".json" else data.splitlines()
            with contextlib.suppress(ValueError):  # a temporary file that a kill cut off
                data = json.dumps(_steady([json.loads(one) for one in lines]), sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


# The runs


def prepare(folder: Path) -> None:
    """Tiny networks, one without a role, an adapter and rows."""
    from peft import LoraConfig, get_peft_model

    folder.mkdir()
    for name, role in (("student", "block_causal"), ("teacher", "bidirectional"), ("causal", "autoregressive")):
        save_network(tiny_network(role, head_scale=30.0, max_positions=256), folder / name)  # type: ignore[arg-type]
    base = tiny_network("autoregressive", head_scale=30.0, max_positions=256)
    shutil.copytree(folder / "causal", folder / "plain")
    config = json.loads((folder / "plain" / "config.json").read_text())
    for key in base.role.to_config():
        config.pop(key, None)
    (folder / "plain" / "config.json").write_text(json.dumps(config))
    model = get_peft_model(base.module, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../causal"
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    base.tokenizer.save_pretrained(folder / "adapter")
    for name in ("config.json", "generation_config.json"):
        if (folder / "causal" / name).exists():
            shutil.copy(folder / "causal" / name, folder / "adapter" / name)
    rows = (
        {"id": f"p{i}", "prompt": f"{i} + 2 =", "question": f"{i} + 2 =", "answer": i + 2, "completion": f"{i + 2}"}
        for i in range(5)
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def try_command(name: str, base: Path, scratch: Path, choose: Callable[[int], list[int]]) -> Outcome:
    """Run one command undisturbed, then killed at the chosen events."""
    line, two_renames = COMMANDS[name], "two renames" in name
    folder = scratch / "work"

    def afresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        if "--overwrite" in line:
            shutil.copytree(base / "teacher", folder / "out")

    afresh()
    sources = _contents(folder, SOURCES)
    old = _contents(folder, ("out",))
    code, num_events, shown = _in_fork(folder, line, last=None, two_renames=two_renames)
    outcome = Outcome(name, num_events)
    if code:
        outcome.faults.append(f"undisturbed: exit code {code}: {shown[-300:]}")
        return outcome
    right, listing = _contents(folder), _listing(folder)
    new = _contents(folder, ("out",))
    for last in choose(num_events):
        afresh()
        code, _, shown = _in_fork(folder, line, last=last, two_renames=two_renames)
        if code != -signal.SIGKILL:
            outcome.faults.append(f"event {last}: exit code {code}, not killed: {shown[-200:]}")
            continue
        outcome.num_killed += 1
        outcome.faults += [f"event {last}: {fault}" for fault in _after_kill(folder, sources, old, new, two_renames)]
        code, _, shown = _in_fork(folder, line, last=None, two_renames=two_renames)
        outcome.faults += [f"event {last}: {fault}" for fault in _after_rerun(folder, code, shown, right, listing)]
    return outcome


def _after_kill(
    folder: Path, sources: dict[str, str], old: dict[str, str], new: dict[str, str], two_renames: bool
) -> Iterator[str]:
    if _contents(folder, SOURCES) != sources:
        yield "a source has changed"
    there = _contents(folder, ("out",))
    if old and there not in (old, new) and not (two_renames and not there):
        yield "the target is neither the old one nor the new one"


def _after_rerun(folder: Path, code: int, shown: str, right: dict[str, str], listing: list[str]) -> Iterator[str]:
    finished = "is not empty" in shown or "already holds a model" in shown  # the kill came after the last rename
    if code and not finished:
        yield f"the rerun ended with {code}: {shown[-300:]}"
    if (there := _contents(folder)) != right:
        differing = sorted(name for name in there.keys() | right.keys() if there.get(name) != right.get(name))
        yield f"other results: {differing[:5]}"
    if extra := sorted(set(_listing(folder)) ^ set(listing)):
        yield f"left over or missing: {extra[:5]}"


def run(names: list[str], per_command: int | None, seed: int) -> list[Outcome]:
    """An outcome for each command; `per_command`: events drawn with this seed, by default all."""
    torch.set_num_threads(1)
    draw = random.Random(seed)

    def choose(num_events: int) -> list[int]:
        everything = range(1, num_events + 1)
        return (
            list(everything) if per_command is None else sorted(draw.sample(everything, min(per_command, num_events)))
        )

    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch) / "base")
        outcomes = []
        for name in names:
            outcomes.append(try_command(name, Path(scratch) / "base", Path(scratch), choose))
            last = outcomes[-1]
            print(f"{name}: {last.num_killed} kills at {last.num_events} events, {len(last.faults)} faults", flush=True)
            for fault in last.faults[:10]:
                print(f"    {fault}", flush=True)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill commands at events of the file system.")
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=list(COMMANDS), metavar="NAME")
    parser.add_argument("--per-command", type=int, help="events of each command; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    given = parser.parse_args()
    outcomes = run(given.commands, given.per_command, given.seed)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(one) for one in outcomes]))
    sys.exit(any(one.faults for one in outcomes))
