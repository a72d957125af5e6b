"""Hostile options, run files, rows and folders, given to every command: `python tests/hostile_inputs.py`.

Options are read from the commands themselves, so that a new one is covered without a word here. Each case runs one
command in a fork of this process, in which torch and the tiny models' code are loaded. It is passed if the command ends
within SECONDS with exit code 0 or 2 (after Ctrl-C: 130), says what is wrong in one line, shows no traceback, leaves its
inputs as they were, and writes its outputs whole or not at all.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="100")

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from safetensors.torch import load_file, save_file

from fewstep.cli import training
from fewstep.cli.main import app, main
from fewstep.models.load import save_network
from fewstep.models.medusa import MedusaHeads, save_heads
from fewstep.models.tiny import tiny_network

SECONDS = 10
"""On an idle machine; where others wait for its cores too, as much longer as they make it."""

MOST_LINES = 12
"""Of standard error, notes and a library's warnings included."""

SHORT = "--max-new-tokens 4"
TRAIN = "--output out --rows 1 --row-length 64 --max-steps 1 --device cpu"
WATCH = "--evaluate-every 1 --watch-data rows.jsonl --watch-num-prompts 1 --watch-max-new-tokens 4"
SEVERAL_LINES = {
    "generate": (
        f"generate 1+2 --model student --json out.json {SHORT}",
        f"generate --input prompts.jsonl --output out.jsonl --model teacher --json out.json {SHORT}",
        f"generate 1+2 --model causal {SHORT}",
        f"generate 1+2 --model causal --decoder medusa --heads heads {SHORT}",
        f"generate 1+2 --model causal --decoder lookahead {SHORT}",
        f"generate 1+2 --model causal --decoder speculative --draft causal {SHORT}",
    ),
    "correct": ("correct prose --model student --output out.txt --json out.json",),
    "infill": ("infill --model teacher --prefix 1+ --suffix =2 --num-tokens 2 --json out.json",),
    "collect": (
        f"collect --model teacher --data rows.jsonl --output out --json out.json {SHORT}",
        f"collect --model causal --data rows.jsonl --output out {SHORT}",
    ),
    "eval": (f"eval --model student --data problems.jsonl --records out.jsonl --json out.json {SHORT}",),
    "compare": ("compare student,max_new_tokens=4 teacher,max_new_tokens=4 --data problems.jsonl --json out.json",),
    "bench": (
        f"bench --model student --input prompts.jsonl --answers 1 --tokens-per-step 2 {SHORT}",
        f"bench --shape tiny-dream --answers 1 --block-size 4 --context 8 {SHORT}",
    ),
    "calibrate": (
        "calibrate --model student --reference causal --data problems.jsonl --eps 0.9 --confidence 0.5 "
        f"--thresholds 0.5 --output out --json out.json {SHORT}",
    ),
    "import": ("import plain out --json out.json",),
    "merge": ("merge adapter --output out --json out.json",),
    "demo": ("demo --teacher teacher --student student --causal causal --num-problems 1 --device cpu",),
    "bench-serve": ("bench-serve http://127.0.0.1:9 --requests 1 --prompts 1 --json out.json",),
    "chat": (f"chat --model student --json out.json {SHORT}",),
    "serve": ("serve student teacher,threshold=0.5 --port 0 --dtype float32",),
    "models": ("models --json out.json",),
    "doctor": ("doctor --json out.json",),
    "train diffusion": (f"train diffusion --model causal --data rows.jsonl {TRAIN} {WATCH}",),
    "train cdlm": (f"train cdlm --teacher teacher --trajectories shards {TRAIN} {WATCH}",),
    "train sft": (f"train sft --model causal --data rows.jsonl --lora {TRAIN} {WATCH}",),
    "train cllm": (f"train cllm --model causal --trajectories windows {TRAIN} {WATCH}",),
    "train draft": (f"train draft --model causal --texts texts {TRAIN} {WATCH}",),
    "train embedding": (f"train embedding --model causal --data rows.jsonl {TRAIN} {WATCH}",),
    "train medusa": (f"train medusa --model causal --data rows.jsonl --heads 2 {TRAIN}",),
}
"""Command -> lines that work, into which hostile values are put; the first is also the one for rows and folders."""

LASTING = (
    "answers",
    "warm_up",
    "max_steps",
    "epochs",
    "num_problems",
    "max_new_tokens",
    "canvas_length",
    "watch_max_new_tokens",
)
"""Options of which a great value means much work: then Ctrl-C must end the command."""

TEXTS = (
    "",
    " ",
    "x",
    "-",
    "--json",
    "\udcff",
    "é",
    "\n",
    "a=b",
    "1,2",
    ",",
    "null",
    "true",
    "no",
    "~",
    "[]",
    "[1, 2]",
    "[x]",
    "{}",
    "{a: 1}",
    "&a [*a]",
    "!!float x",
    "!!python/object:os.system x",
    "0x_",
    "2026-01-01",
    "[" * 5000,
    "x" * 300,
    "1/2",
    "/".join("x" * 4000),
    "%s",
    "$(id)",
    "{{ 7 * 7 }}",
)
NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "2.5",
    "1e3",
    "-0.0",
    "1e-320",
    "1e308",
    "-1e308",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "٣",
    "1_0",
    "2147483647",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "1" * 5000,
)
PATHS = (
    ".",
    "..",
    "missing",
    "missing/deeper/out",
    "folder",
    "empty",
    "rows.jsonl",
    "prompts.jsonl",
    "binary",
    "loop",
    "null",
    "full",
    "unreadable",
    "rows.jsonl/x",
    "student",
    "student/config.json",
    "adapter",
    "plain",
    "heads",
    "/proc/self/mem",
    "/proc/x",
    "pipe",
    "zeros",
    "shards",
    "run.yaml",
)
VALUES = (*TEXTS, *NUMBERS, *PATHS)

FIELDS = (
    "null",
    "true",
    "0",
    "-1",
    "2.5",
    "1e400",
    "NaN",
    "1" * 5000,
    '""',
    '" "',
    '"x"',
    '"12"',
    '"nan"',
    '"inf"',
    '"\\ud800"',
    '"\\u0000"',
    '"<eos>"',
    '"<mask>"',
    '"' + "12 + 3 = " * 4000 + '"',
    '"é\\u202e"',
    "[]",
    "[[]]",
    "{}",
    '["x"]',
    '[{"role": "user"}]',
    '[{"role": "user", "content": "1+2"}]',
    '[{"role": 1, "content": null}]',
    '[{"role": "owner", "content": "\\ud800"}]',
    '[{"role": "assistant", "content": "3"}]',
    "[" * 3000 + "]" * 3000,
)
"""JSON texts that a field gets."""


@dataclass(frozen=True)
class Case:
    """One command; `files` are written before it, texts of them as links to that."""

    kind: str
    name: str
    arguments: tuple[str, ...]
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    stdin: bytes = b""
    lasting: bool = False


@dataclass
class Fault:
    """What was wrong with a case."""

    kind: str
    name: str
    arguments: str
    faults: list[str]
    said: str


# Cases: options and keys of run files


def _parameters(command: str) -> list[Any]:
    group = typer.main.get_command(training.app if command.startswith("train ") else app)
    return [one for one in group.commands[command.split()[-1]].params if one.name != "help"]  # type: ignore[attr-defined]


def _commands() -> list[str]:
    group = typer.main.get_command(app)
    inner = typer.main.get_command(training.app)
    names = [name for name in group.commands if name != "train"]  # type: ignore[attr-defined]
    return names + [f"train {name}" for name in inner.commands]  # type: ignore[attr-defined]


def _put(words: list[str], options: Sequence[str], value: str) -> list[str]:
    """The line with this value for an option, in place of the one that it has."""
    for option in options:
        if option in words:
            index = words.index(option)
            return [*words[: index + 1], value, *words[index + 2 :]]
    return [*words, options[0], value]


def option_cases(draw: random.Random) -> Iterator[Case]:
    """Every option and argument of every command with every value."""
    seen: set[tuple[str, str]] = set()
    for command in _commands():
        for number, line in enumerate(SEVERAL_LINES[command]):
            words = line.split()
            positions = [index for index, word in enumerate(words) if _is_argument(words, index, command)]
            for parameter in _parameters(command):
                option, about = parameter.opts[0], (parameter.opts[0], str(getattr(parameter, "help", "")))
                # What commands share is tried in full once, and with some values everywhere else.
                values = draw.sample(VALUES, 6) if about in seen else _values_for(parameter, draw)
                seen.add(about)
                if getattr(parameter, "is_flag", False):
                    for flag in (*parameter.opts, *parameter.secondary_opts):
                        yield Case("option", f"{command} {flag}", (*words, flag))
                        yield Case("option", f"{command} {flag}=x", (*words, f"{flag}=x"))
                    continue
                for value in values:
                    name = f"{command}[{number}] {option} {value[:20]!r}"
                    lasting = parameter.name in LASTING
                    if option.startswith("-"):
                        arguments = _put(words, parameter.opts, value)
                    elif positions:
                        place = positions[min(len(positions) - 1, ("second", "target").count(parameter.name))]
                        arguments = [*words[:place], value, *words[place + 1 :]]
                    else:
                        arguments = [*words, value]
                    yield Case("option", name, tuple(arguments), lasting=lasting)
                if option.startswith("-"):
                    yield Case("option", f"{command} {option} without a value", (*words, option))


def _values_for(parameter: Any, draw: random.Random) -> Sequence[str]:
    """Every value; of those that spell no number only some where a number is wanted."""
    words = f"{parameter.type_descriptor.annotation} {parameter.metavar}".lower()
    if "integer" in words or "number" in words or "'int'" in words or "'float'" in words:
        return [*NUMBERS, *draw.sample((*TEXTS, *PATHS), 10)]
    return VALUES


def _is_argument(words: list[str], index: int, command: str) -> bool:
    begin = len(command.split())
    return index >= begin and not words[index].startswith("-") and (index == begin or words[index - 1][:2] != "--")


YAML_VALUES = (
    "",
    "null",
    "true",
    "no",
    "-1",
    "0",
    "2.5",
    "1e308",
    ".nan",
    ".inf",
    "1" * 5000,
    "9223372036854775808",
    "x",
    "'2'",
    "[]",
    "[1, x]",
    "{a: 1}",
    "!!binary x",
    "!!set {a}",
    "2026-01-01",
    "0x_",
    "!!float x",
    "&a [*a]",
    "*a",
    "[" * 5000,
    "folder",
    "pipe",
    "\x00",
    "é",
    "? [1]\n: 2",
    "!!python/name:os.system",
    "out\nout: x",
)


def run_file_cases(draw: random.Random) -> Iterator[Case]:
    """Every key of a run file with every value, and files that are no run files."""
    seen: set[str] = set()
    for command in (name for name in _commands() if name.startswith("train ")):
        words = SEVERAL_LINES[command][0].split()
        for parameter in _parameters(command):
            if parameter.name in ("config", "json"):
                continue
            values: Sequence[str] = draw.sample(YAML_VALUES, 4) if parameter.name in seen else YAML_VALUES
            seen.add(parameter.name)
            rest = _without(words, parameter)
            for value in values:
                text = f"{parameter.name}: {value}\n".encode()
                name = f"{command} {parameter.name}: {value[:20]!r}"
                lasting = parameter.name in LASTING
                yield Case("run file", name, (*rest, "--config", "given.yaml"), {"given.yaml": text}, lasting=lasting)
    for text in (
        b"",
        b"\xff\xfe",
        b"\x00",
        b"- 1",
        b"x",
        b"1: 2",
        b"[a]: 1",
        b"? {a: 1}\n: 2",
        b"model: a\nmodel: b",
        b"\xef\xbb\xbfseed: 1\r\n",
        b"%",
        b"a: b: c",
        b"\t",
        b"{" * 3000,
        b"--- 1\n--- 2",
        b"null: 1",
        b"seed",
    ):
        words = SEVERAL_LINES["train sft"][0].split()
        yield Case("run file", f"train sft {text[:20]!r}", (*words, "--config", "given.yaml"), {"given.yaml": text})


def _without(words: list[str], parameter: Any) -> list[str]:
    """The line without an option and its value."""
    for option in parameter.opts:
        if option in words:
            index = words.index(option)
            return words[:index] + words[index + (1 if parameter.is_flag else 2) :]
    return words


# Cases: rows

_TURNS = '[{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]'
_FORMS: Mapping[str, tuple[str, Sequence[Mapping[str, str]]]] = {
    f"generate --input given --output out.jsonl --model student --json out.json {SHORT}": (
        "prompts",
        ({"id": '"a"', "prompt": '"1+2"'}, {"id": '"a"', "messages": '[{"role": "user", "content": "1+2"}]'}),
    ),
    SEVERAL_LINES["eval"][0].replace("problems.jsonl", "given"): (
        "problems",
        (
            {"id": '"a"', "question": '"1+2"', "answer": "3", "template": "1"},
            {"messages": '[{"role": "user", "content": "1+2"}]', "answer": '"3"'},
        ),
    ),
    SEVERAL_LINES["compare"][0].replace("problems.jsonl", "given"): (
        "problems",
        ({"id": '"a"', "question": '"1+2"', "answer": "3"},),
    ),
    **{
        line.replace("--data rows.jsonl", "--data given"): (
            "rows",
            (
                {"id": '"a"', "prompt": '"1+2"', "completion": '"3"'},
                {
                    "prompt": '[{"role": "user", "content": "1+2"}]',
                    "completion": '[{"role": "assistant", "content": "3"}]',
                },
                {"messages": _TURNS},
                {"text": '"1+2=3"'},
            ),
        )
        for line in (
            SEVERAL_LINES["train sft"][0].replace(WATCH, "").replace("--lora ", ""),
            SEVERAL_LINES["train diffusion"][0].replace(WATCH, ""),
            SEVERAL_LINES["train medusa"][0],
            SEVERAL_LINES["collect"][0],
            SEVERAL_LINES["collect"][1],
        )
    },
    SEVERAL_LINES["train sft"][0].replace("--watch-data rows.jsonl", "--watch-data given").replace("--lora ", ""): (
        "watched rows",
        ({"prompt": '"1+2"', "completion": '"3"'}, {"messages": _TURNS}, {"text": '"1+2=3"'}),
    ),
}
"""Line that reads `given` -> what that holds, and the forms that a row of it may have."""


def _object(fields: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


def row_cases(draw: random.Random) -> Iterator[Case]:
    """Every field of every form of every file of rows with every value, and files that hold no rows."""
    for line, (what, forms) in _FORMS.items():
        for form in forms:
            good = _object(form)
            for name in form:
                for value in FIELDS:
                    yield _rows(line, what, f"{name} = {value[:20]}", [good, _object({**form, name: value})], draw)
                others = {key: value for key, value in form.items() if key != name}
                yield _rows(line, what, f"without {name}", [_object(others)], draw)
                yield _rows(line, what, f"{name} renamed", [_object({**others, name.upper(): form[name]})], draw)
                twice = good[:-1] + f', "{name}": null}}'
                yield _rows(line, what, f"{name} twice", [twice], draw)
            for name, text in _texts(good).items():
                yield _case_of(line, f"{what}: {name}", "given.jsonl", text, "rows")
        for name, table in _tables(forms[0]).items():
            yield _case_of(line, f"{what}: Parquet, {name}", "given.parquet", table, "rows")


def _rows(line: str, what: str, name: str, rows: list[str], draw: random.Random) -> Case:
    end = draw.choice(["\n", "\r\n"])
    text = "".join(row + end for row in rows).encode("utf-8", "surrogatepass")
    return _case_of(line, f"{what}: {name}", "given.jsonl", text, "rows")


def _case_of(line: str, name: str, file: str, text: bytes | str, kind: str) -> Case:
    arguments = tuple(file if word == "given" else word for word in line.split())
    return Case(kind, f"{' '.join(arguments[:2])}, {name}", arguments, {file: text})


def _texts(good: str) -> dict[str, bytes]:
    """A file's text, spoilt as a whole."""
    line = good.encode()
    return {
        "nothing": b"",
        "blank lines": b"\n \r\n\n",
        "a byte order mark": b"\xef\xbb\xbf" + line,
        "CR": line + b"\r" + line,
        "no end": line,
        "cut off": line + b"\n" + line[: len(line) // 2],
        "NUL": line[:-1] + b"\x00}",
        "UTF-16": good.encode("utf-16"),
        "Latin-1": line.replace(b"1", b"\xe9"),
        "half a character": line.replace(b"1", b"\xed\xa0\x80"),
        "bytes": bytes(range(256)) * 20,
        "an array": b"[" + line + b"]",
        "several lines": json.dumps(json.loads(good), indent=1).encode(),
        "text": b'"x"',
        "null": b"null",
        "deep": b"[" * 100_000,
        "a long line": line[:-1] + b" " * 3_000_000 + b"}",
        "two in a line": line + line,
        "a comma": line + b",",
        "an empty object": b"{}",
        "another object": b'{"x": 1}',
        "comment": b"// x\n" + line,
        "the same id": line + b"\n" + line,
        "gzip": b"\x1f\x8b\x08" + bytes(50),
    }


def _tables(form: Mapping[str, str]) -> dict[str, bytes]:
    """Parquet files of one form, each column in turn of every kind."""
    good = {name: json.loads(value) for name, value in form.items()}
    kinds: dict[str, pa.Array] = {
        "null": pa.array([None, None]),
        "integers": pa.array([1, 2]),
        "floats": pa.array([float("nan"), 1.0]),
        "bytes": pa.array([b"\xff", b"1"]),
        "lists": pa.array([["1"], []]),
        "structs": pa.array([{"role": "user"}, None]),
        "booleans": pa.array([True, None]),
        "dates": pa.array([2**62, 1], pa.timestamp("ns")),
        "coded": pa.array(["1+2", "3"]).dictionary_encode(),
        "large text": pa.array(["1+2", "3"], pa.large_string()),
        "decimals": pa.array([None, 1], pa.decimal128(38, 5)),
        "some null": pa.array(["1+2", None]),
        "durations": pa.array([2**62, 1], pa.duration("s")),
        "empty text": pa.array(["", "x"]),
        "far dates": pa.array([2**30, 1], pa.date32()),
    }
    found = {}
    for name in good:
        for kind, column in kinds.items():
            columns = {other: pa.array([value, value]) for other, value in good.items()}
            found[f"{name} of {kind}"] = _parquet(pa.table({**columns, name: column}))
    whole = _parquet(pa.table({name: pa.array([value]) for name, value in good.items()}))
    twice = pa.Table.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["prompt", "prompt"])
    return {
        **found,
        "whole": whole,
        "cut off": whole[: len(whole) // 2],
        "no end": whole[:-1],
        "nothing": b"",
        "not Parquet": b'{"prompt": "x"}\n',
        "no rows": _parquet(pa.table({name: pa.array([value]) for name, value in good.items()}).slice(0, 0)),
        "no columns": _parquet(pa.table({})),
        "a column twice": _parquet(twice),
        "a byte changed": whole[:20] + bytes([whole[20] ^ 255]) + whole[21:],
    }


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


# Cases: folders and files of our own

JSON_VALUES = (None, True, -1, 2.5, 10**20, 10**4299, "", "\ud800", [[]], {"a": 1}, "remove")
_WHOLE = (
    "null",
    "[]",
    "5",
    '"x"',
    "",
    "{",
    '{"a": ' + "1" * 5000 + "}",
    "[" * 100_000,
    '{"a": NaN}',
    "\x00",
    "\ufeff{}",
)
_READERS = {
    "shards/manifest.json": (
        f"train cdlm --teacher teacher --trajectories given {TRAIN}",
        f"collect --model teacher --data rows.jsonl --output given {SHORT}",
    ),
    "windows/manifest.json": (
        f"train cllm --model causal --trajectories given {TRAIN}",
        f"collect --model causal --data rows.jsonl --output given {SHORT}",
    ),
    "texts/manifest.json": (f"train draft --model causal --texts given {TRAIN}",),
    "heads/medusa.json": (f"generate 1+2 --model causal --decoder medusa --heads given {SHORT}",),
    "adapter/adapter_config.json": (f"generate 1+2 --model given {SHORT}", "merge given --output out"),
    "run/report.json": (f"train sft --model causal --data rows.jsonl {TRAIN}".replace("out", "given"),),
}
"""A file of a folder -> the lines that read that folder as `given`."""


def folder_cases(base: Path) -> Iterator[Case]:
    """Every field of the JSON files of folders that commands write, and such a file as a whole."""
    for place, lines in _READERS.items():
        if not (base / place).exists():
            continue
        folder, file = place.split("/")
        others = {
            f"given/{path.name}": f"../{folder}/{path.name}" for path in (base / folder).iterdir() if path.name != file
        }
        good = json.loads((base / place).read_text())
        texts = {repr(text[:20]): text for text in _WHOLE}
        for path in _ways(good):
            for value in JSON_VALUES:
                texts[f"{'.'.join(map(str, path))} = {str(value)[:20]!r}"] = json.dumps(_changed(good, path, value))
        for line in lines:
            for name, text in texts.items():
                files = {**others, f"given/{file}": text.encode("utf-8", "surrogatepass")}
                yield Case("folder", f"{line.split(' --')[0]}, {place}: {name}", tuple(line.split()), files)
    yield from _weight_cases(base)
    yield from _kept_cases(base)


def _ways(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _ways(value[key], (*path, key))


def _changed(good: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(good))
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    if isinstance(value, str) and value == "remove":
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return changed


def _weight_cases(base: Path) -> Iterator[Case]:
    """Weights of Medusa heads and of adapters that are damaged, or that do not fit."""
    readers = {
        "heads/medusa.safetensors": f"generate 1+2 --model causal --decoder medusa --heads given {SHORT}",
        "adapter/adapter_model.safetensors": f"generate 1+2 --model given {SHORT}",
    }
    for place, line in readers.items():
        folder, file = place.split("/")
        others = {
            f"given/{path.name}": f"../{folder}/{path.name}" for path in (base / folder).iterdir() if path.name != file
        }
        good, tensors = (base / place).read_bytes(), load_file(base / place)
        spoilt = {
            "nothing": b"",
            "cut off": good[: len(good) // 2],
            "no end": good[:-1],
            "longer": good + b"x",
            "text": b"x" * 500,
            "a header too long": b"\xff" * 8 + good[8:],
            "a broken header": good[:9] + b"\x00" + good[10:],
            "a pointer": b"version https://git-lfs",
        }
        for name in list(tensors)[:3]:
            rest = {other: tensor for other, tensor in tensors.items() if other != name}
            spoilt |= {
                f"without {name}": _saved(rest),
                f"{name} of another name": _saved({**rest, "x": tensors[name]}),
                f"one more than {name}": _saved({**tensors, "x": tensors[name].clone()}),
                f"{name} of another shape": _saved({**rest, name: tensors[name].flatten()}),
                f"{name} empty": _saved({**rest, name: tensors[name][:0].clone()}),
                f"{name} of integers": _saved({**rest, name: tensors[name].to(torch.int64)}),
                f"{name} not finite": _saved({**rest, name: torch.full_like(tensors[name], float("nan"))}),
            }
        for name, data in spoilt.items():
            yield Case("folder", f"{place}: {name}", tuple(line.split()), {**others, f"given/{file}": data})


def _saved(tensors: Mapping[str, torch.Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


def _kept_cases(base: Path) -> Iterator[Case]:
    """Answers that an interrupted run kept, each field of each line changed."""
    lines = {
        "out.jsonl.kept": f"generate --input prompts.jsonl --output out.jsonl --model student {SHORT}",
        "records.jsonl.kept": f"eval --model student --data problems.jsonl --records records.jsonl {SHORT}",
    }
    for file, line in lines.items():
        rows = (base / "kept" / file).read_text().splitlines()
        for number, row in enumerate(rows[:2]):
            good = json.loads(row)
            texts = {repr(text[:20]): text for text in _WHOLE}
            for path in _ways(good):
                for value in JSON_VALUES:
                    texts[f"{'.'.join(map(str, path))} = {str(value)[:20]!r}"] = json.dumps(_changed(good, path, value))
            for name, text in texts.items():
                changed = "\n".join([*rows[:number], text, *rows[number + 1 :], ""]).encode("utf-8", "surrogatepass")
                yield Case("kept", f"{file} line {number + 1}: {name}", tuple(line.split()), {file: changed})


def stdin_cases() -> Iterator[Case]:
    """Prompts on standard input."""
    line = SEVERAL_LINES["generate"][0].replace(" 1+2", "").split()
    for text in (
        b"",
        b"\n",
        b"\xff",
        b"\x00",
        b"1+2\r\n",
        b"\xef\xbb\xbf1+2",
        b"1" * 100_000,
        "é\u202e".encode(),
        b"<eos>",
        b"<mask>",
        b"\xed\xa0\x80",
        b"<|x|>",
        b"\x1b[2J",
    ):
        yield Case("option", f"generate < {text[:20]!r}", tuple(line), stdin=text)


# What cases need


def prepare(folder: Path) -> None:
    """Tiny networks, heads, an adapter, trajectories, rows and strange places."""
    from peft import LoraConfig, get_peft_model

    folder.mkdir(parents=True)
    networks = {}
    for name, role in (("student", "block_causal"), ("teacher", "bidirectional"), ("causal", "autoregressive")):
        networks[name] = tiny_network(role, hidden=16, head_scale=30.0)  # type: ignore[arg-type]
        save_network(networks[name], folder / name)
    save_heads(MedusaHeads.of(networks["causal"], 2), folder / "heads", networks["causal"])
    shutil.copytree(folder / "causal", folder / "plain")
    config = json.loads((folder / "plain/config.json").read_text())
    role_keys = networks["causal"].role.to_config()
    (folder / "plain/config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in role_keys}))
    model = get_peft_model(networks["causal"].module, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder / "adapter")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    (folder / "adapter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../causal"}))
    row = {"id": "a", "prompt": "1+2", "question": "1+2", "answer": 3, "completion": "3"}
    rows = "".join(json.dumps({**row, "id": name}) + "\n" for name in "ab")
    for name in ("rows.jsonl", "prompts.jsonl", "problems.jsonl", "unreadable"):
        (folder / name).write_text(rows)
    (folder / "unreadable").chmod(0)
    (folder / "run.yaml").write_text("seed: 1\n")
    (folder / "prose").write_text("Teh cat sat.\n")
    (folder / "binary").write_bytes(bytes(range(256)) * 40)
    (folder / "empty").write_text("")
    (folder / "folder/inside").mkdir(parents=True)
    (folder / "folder/file").write_text("x")
    (folder / "kept").mkdir()
    for name, target in (("loop", "loop"), ("null", "/dev/null"), ("full", "/dev/full"), ("zeros", "/dev/zero")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    for line in (
        f"collect --model teacher --data rows.jsonl --output shards {SHORT}",
        f"collect --model causal --data rows.jsonl --output windows {SHORT}",
        f"collect --model causal --decoder autoregressive --data rows.jsonl --output texts {SHORT}",
    ):
        code, said = _in_fork(Case("", "", tuple(line.split())), folder, folder.parent)
        assert code == 0, said
    for line, file in (
        (f"generate --input prompts.jsonl --output out.jsonl --model student {SHORT}", "out.jsonl"),
        (f"eval --model student --data problems.jsonl --records records.jsonl {SHORT}", "records.jsonl"),
    ):
        code, said = _in_fork(Case("", "", tuple(line.split())), folder, folder.parent, interrupted=True)
        assert code == 130, said
        (folder / f"{file}.kept").rename(folder / "kept" / f"{file}.kept")


def cases(base: Path) -> list[Case]:
    """Each of them; which values what is shared gets is drawn, always the same."""
    draw = random.Random(0)
    return [
        *option_cases(draw),
        *stdin_cases(),
        *run_file_cases(draw),
        *row_cases(draw),
        *folder_cases(base),
    ]


# Runs


def _limit_s() -> float:
    return SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _in_fork(case: Case, folder: Path, scratch: Path, *, interrupted: bool = False) -> tuple[int | None, str]:
    """Exit code (negative: a signal; None: it had to be killed) and what was said, standard error last.

    `interrupted`: as by Ctrl-C before the outputs are written.
    """
    out, err, given = (scratch / name for name in ("stdout", "stderr", "stdin"))
    given.write_bytes(case.stdin)
    limit_s = _limit_s()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _become(case, folder, out, err, given, interrupted)
    os.close(writer)
    try:
        killed = None
        if not select.select([reader], [], [], limit_s)[0]:
            killed = signal.SIGINT if case.lasting else signal.SIGKILL
            os.kill(child, killed)
            if case.lasting and not select.select([reader], [], [], limit_s)[0]:
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(reader)
    code = os.waitstatus_to_exitcode(status)
    said = "\n".join(path.read_text(errors="replace") for path in (out, err))
    return (None if code == -signal.SIGKILL else code), said


def _become(case: Case, folder: Path, out: Path, err: Path, given: Path, interrupted: bool) -> None:
    """What the fork does; it never returns."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        for descriptor, path, flags in ((0, given, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
            os.dup2(os.open(path, flags | (os.O_CREAT | os.O_TRUNC if descriptor else 0)), descriptor)
        sys.argv = ["fewstep", *case.arguments]
        if interrupted:
            _interrupt_at_delivery()
        try:
            main(list(case.arguments))
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode("utf-8", "replace"))
    finally:
        os._exit(code)


def _interrupt_at_delivery() -> None:
    from fewstep.cli import evaluate, generate

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    generate.deliver = evaluate.deliver = interrupt


_Listing = dict[str, tuple[int, int, int, int]]


def _listing(folder: Path) -> _Listing:
    """What lies below a folder; of a folder only its mode."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            about = os.lstat(path)
            is_folder = stat.S_ISDIR(about.st_mode)
            same = (0, 0, 0) if is_folder else (about.st_ino, about.st_size, about.st_mtime_ns)
            found[os.path.relpath(path, folder)] = (about.st_mode, *same)
    return found


def _write(files: Mapping[str, bytes | str], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            (folder / name).symlink_to(content)
        else:
            (folder / name).write_bytes(content)


def try_case(case: Case, base: Path, outer: Path) -> Fault | None:
    """Run one case in `outer/work`, which is as `base` before and after."""
    work = outer / "work"
    if not work.exists():
        shutil.copytree(base, work, symlinks=True, ignore=lambda *_: ["pipe"])
        os.mkfifo(work / "pipe")
    clean = _listing(outer)
    _write(case.files, work)
    before = _listing(outer)
    code, said = _in_fork(case, work, outer.parent / f"{outer.name}-streams")
    after = _listing(outer)
    faults = [*_faults_of_end(case, code, said), *_faults_of_files(case, code, work, outer, before, after)]
    if any(after.get(name) != about for name, about in clean.items()):
        shutil.rmtree(work)
    else:
        for name in sorted(after.keys() - clean.keys(), reverse=True):
            path = outer / name
            with contextlib.suppress(FileNotFoundError):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    if not faults:
        return None
    return Fault(case.kind, case.name, " ".join(word[:60] for word in case.arguments), faults, said[-1500:])


def _faults_of_end(case: Case, code: int | None, said: str) -> Iterator[str]:
    allowed = (0, 2, 130) if case.lasting else (0, 2)
    if code is None:
        yield f"no end within {SECONDS} s"
    elif code not in allowed:
        yield f"exit code {code}"
    if "Traceback (most recent" in said:
        yield "a traceback"
    lines = said.strip().splitlines()
    if code == 2 and not (lines and lines[-1].startswith("fewstep: ")):
        yield "no sentence at the end"
    if code == 2 and len(lines) > MOST_LINES and not case.lasting:
        yield f"{len(lines)} lines"
    if lines and max(map(len, lines)) > 4000 and code == 2:
        yield "an endless line"


def _faults_of_files(
    case: Case, code: int | None, work: Path, outer: Path, before: _Listing, after: _Listing
) -> Iterator[str]:
    resumes = "given" in case.arguments and case.arguments[0] in ("collect", "train")
    kept = {name for name in before if name.endswith(".kept")}
    changed = sorted(name for name in before if after.get(name) != before[name] and name not in kept)
    if changed and not resumes and not _is_target(case, changed):
        yield f"changed: {changed[:3]}"
    new = sorted(after.keys() - before.keys())
    left = [name for name in new if any(part.startswith(".") for part in Path(name).parts) or name.endswith(".kept")]
    if left and code != 130:
        yield f"left: {left[:3]}"
    if code == 2 and new and not left and not resumes and "train" not in case.arguments[0]:
        yield f"written in part: {new[:3]}"
    if code == 2 and case.arguments[0] == "train":
        # Where only the report could not be written, the model is whole.
        partial = [] if "work/out/report.json" in new else [name for name in new if not _is_of_run(name)]
        if partial:
            yield f"written in part: {partial[:3]}"
    if code == 0:
        for name in new:
            path = outer / name
            if path.is_file() and path.suffix in (".json", ".jsonl"):
                texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
                try:
                    for text in texts:
                        json.loads(text)
                except ValueError:
                    yield f"not whole: {name}"


def _is_target(case: Case, changed: list[str]) -> bool:
    """Whether what has changed is what an option for an output named."""
    return all(name.removeprefix("work/") in case.arguments for name in changed)


def _is_of_run(name: str) -> bool:
    """Whether a run that stops, for example since its loss is no number, may keep this: logs and checkpoints."""
    return (
        any(part in ("logs", "checkpoints") for part in Path(name).parts)
        or Path(name).name == "out"
        or "samples" in name
    )


def warm_up(base: Path, outer: Path) -> None:
    """Import what forks need, by running commands in this process."""
    lines = (
        [lines[0] for lines in SEVERAL_LINES.values()]
        + list(SEVERAL_LINES["generate"][1:])
        + [SEVERAL_LINES["collect"][1]]
    )
    shutil.copytree(base, outer, symlinks=True, ignore=lambda *_: ["pipe"])
    from fewstep.serve.run import HttpServer

    HttpServer.run = lambda *_, **__: None  # type: ignore[method-assign]  # all is read, loaded and bound by then
    here = Path.cwd()
    os.chdir(outer)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            for number, line in enumerate(lines):
                with contextlib.suppress(SystemExit):
                    main([f"out{number}" if word == "out" else word for word in line.split()])
    finally:
        os.chdir(here)
    shutil.rmtree(outer)


def run(
    *, per_kind: int | None = None, workers: int = 1, seed: int = 0, only: str = "", report: Path | None = None
) -> tuple[dict[str, int], list[Fault]]:
    """How many cases of each kind were run, and the faults. `per_kind`: that many of each, drawn with this seed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name).resolve()
        base = scratch / "base"
        prepare(base)
        warm_up(base, scratch / "warm")
        chosen = [case for case in cases(base) if only in f"{case.kind} {case.name}"]
        if per_kind is not None:
            draw = random.Random(seed)
            kinds: dict[str, list[Case]] = {}
            for case in chosen:
                kinds.setdefault(case.kind, []).append(case)
            chosen = [case for of in kinds.values() for case in draw.sample(of, min(per_kind, len(of)))]
        gc.freeze()  # a collection in a fork would copy every page
        faults: list[Fault] = []
        children = []
        for worker in range(workers):
            child = os.fork()
            if child == 0:
                _work(chosen[worker::workers], base, scratch / f"worker{worker}", scratch / f"faults{worker}")
            children.append(child)
        for worker, child in enumerate(children):
            _, status = os.waitpid(child, 0)
            assert status == 0, f"worker {worker} ended with {status}"
            faults += [Fault(**json.loads(line)) for line in (scratch / f"faults{worker}").read_text().splitlines()]
        for path in [path for path in base.rglob("*") if path.name == "unreadable"]:
            path.chmod(0o600)
    counts: dict[str, int] = {}
    for case in chosen:
        counts[case.kind] = counts.get(case.kind, 0) + 1
    return counts, faults


def _work(chosen: list[Case], base: Path, outer: Path, found: Path) -> None:
    """What a worker does; it never returns."""
    code = 1
    try:
        outer.mkdir()
        (outer.parent / f"{outer.name}-streams").mkdir()
        with found.open("w") as stream:
            for number, case in enumerate(chosen):
                fault = try_case(case, base, outer)
                if fault is not None:
                    stream.write(json.dumps(asdict(fault)) + "\n")
                    stream.flush()
                    if os.environ.get("FZ"):
                        print(fault, file=sys.stderr, flush=True)
                if number % 100 == 99:
                    print(f"{outer.name}: {number + 1} of {len(chosen)}", file=sys.stderr, flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Give hostile values to every command.")
    parser.add_argument("--per-kind", type=int, help="cases of each kind; by default all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases with this text in their kind and name")
    parser.add_argument("--json", type=Path, help="write counts and faults to this file")
    given = parser.parse_args()
    started = time.monotonic()
    counts, faults = run(per_kind=given.per_kind, workers=given.workers, seed=given.seed, only=given.only)
    for fault in faults:
        print(f"{fault.kind}: {fault.name}\n    {fault.arguments!r}\n    {fault.faults}\n    {fault.said[-300:]!r}")
    print(f"{sum(counts.values())} cases {counts}, {len(faults)} faults, {time.monotonic() - started:.0f} s")
    if given.json is not None:
        given.json.write_text(json.dumps({"counts": counts, "faults": [asdict(one) for one in faults]}))
    sys.exit(bool(faults))
