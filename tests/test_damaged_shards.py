"""Shards and manifests that are damaged, though every checksum is right: one sentence, or what was written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewstep.decode.jacobi import Jacobi
from fewstep.errors import FewstepError
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.train.causal_records import collect_jacobi, read_jacobi_table
from fewstep.train.collect import collect, decode_with, distribution_of, teacher_of
from fewstep.train.records import PromptRow
from fewstep.train.trajectories import read_table

ROWS = [PromptRow(f"p{i}", [3, 10 + i, 4], [20, 1] if i else None) for i in range(3)]
Read = Callable[[Path], Any]


@pytest.fixture(scope="module")
def networks() -> dict[str, Network]:
    return {role: tiny_network(role, head_scale=10) for role in ("bidirectional", "autoregressive")}


@pytest.fixture(scope="module", params=["top_k", "hidden", "jacobi"])
def stored(request, networks, tmp_path_factory) -> tuple[Path, Read]:
    """A store of each kind with one shard, and what reads it."""
    folder = tmp_path_factory.mktemp("stores") / request.param
    if request.param == "jacobi":
        causal = networks["autoregressive"]
        decoder = Jacobi(role=causal.role, window=4)
        collect_jacobi(causal, ROWS, folder, decoder, max_new_tokens=8, batch_size=3, settings={})
        return folder, lambda place: read_jacobi_table(place, causal)
    teacher = networks["bidirectional"]
    distribution = distribution_of(teacher, request.param, top_k=4)
    collect(
        decode_with(teacher, _decoder(teacher), max_new_tokens=8, batch_size=3, distribution=distribution),
        ROWS, folder, teacher=teacher_of(teacher), settings={}, distribution=distribution,
    )  # fmt: skip
    return folder, lambda place: read_table(place, teacher)


def _decoder(teacher: Network) -> Any:
    from fewstep.decode.diffusion import Diffusion

    return Diffusion(role=teacher.role, block_size=4, canvas_length=8)


def rewritten(shard: Path, change: Callable[[dict[str, pa.Array], dict[str, Any]], None]) -> None:
    """The shard with changed columns and facts, as whole a file as before."""
    table = pq.read_table(shard)
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    facts = json.loads(table.schema.metadata[b"fewstep"])
    change(columns, facts)
    metadata = {b"fewstep": json.dumps(facts).encode()}
    pq.write_table(
        pa.table(columns).replace_schema_metadata(metadata), shard, use_dictionary=False, write_page_checksum=True
    )


def sentence_of(place: Path, read: Read) -> str:
    """What a reader says of a store; nothing if it reads it."""
    try:
        read(place)
    except FewstepError as error:
        return str(error)
    return ""


def check_one_sentence(place: Path, read: Read, what: str) -> None:
    sentence = sentence_of(place, read)
    assert sentence, what
    assert "\n" not in sentence, what


def first_value(value: int) -> Callable[[pa.Array], pa.Array]:
    def change(column: pa.Array) -> pa.Array:
        lists = column.to_pylist()
        lists[-1][0] = value
        return pa.array(lists, column.type)

    return change


def filled(value: float) -> Callable[[pa.Array], pa.Array]:
    """Of a column of bytes: the same number of bytes, all of them float16 numbers of this value."""

    def change(column: pa.Array) -> pa.Array:
        number = np.float16(value).tobytes()
        return pa.array([number * (len(row) // 2) for row in column.to_pylist()], column.type)

    return change


CHANGES: dict[str, list[Callable[[pa.Array], pa.Array]]] = {
    "prompt_ids": [first_value(-1), first_value(10**6)],
    "reference_ids": [first_value(-1), first_value(10**6)],
    "final_ids": [first_value(-1), first_value(10**6), lambda c: pa.array([r[:-1] for r in c.to_pylist()], c.type)],
    "step_rank": [first_value(-1), lambda c: pa.array([[*r[:-1]] for r in c.to_pylist()], c.type)],
    "canvas_length": [lambda c: pa.array([0] * len(c), c.type)],
    "num_forwards": [lambda c: pa.array([-5] * len(c), c.type), lambda c: pa.array(["x"] * len(c))],
    "topk_ids": [lambda c: pa.array([b"\xff\x7f" * (len(r) // 2) for r in c.to_pylist()], c.type)],
    "topk_logp": [filled(float("nan")), filled(float("inf")), filled(3.0)],
    "log_tail": [filled(float("nan")), filled(3.0)],
    "hidden": [filled(float("nan")), filled(float("-inf"))],
    "answer_ids": [first_value(-1), first_value(10**6)],
    "states": [first_value(-1), first_value(10**6), first_value(1 << 16)],
    "num_states": [first_value(1), first_value(0), first_value(9)],
}
OF_ANY: list[Callable[[pa.Array], pa.Array]] = [
    lambda column: pa.array(["x"] * len(column)),
    lambda column: pa.array([None] * len(column), column.type),
    lambda column: pa.array([[1.5]] * len(column)),
]


def test_values_out_of_range_and_columns_of_another_type_are_one_sentence(stored, tmp_path):
    folder, read = stored
    names = pq.read_schema(folder / "shard-00000.parquet").names
    assert {*names} - {"id"} <= {*CHANGES}
    for name in names:
        for number, change in enumerate([*CHANGES.get(name, ()), *(OF_ANY if name != "reference_ids" else ())]):
            if name == "id" and number == 0:
                continue  # ids are texts
            place = tmp_path / f"{name}-{number}"
            shutil.copytree(folder, place)
            rewritten(
                place / "shard-00000.parquet",
                lambda columns, _, name=name, change=change: columns.update({name: change(columns[name])}),
            )
            check_one_sentence(place, read, f"{name} {number}")


def test_columns_that_are_missing_and_facts_that_are_no_counts_are_one_sentence(stored, tmp_path):
    folder, read = stored
    shard = folder / "shard-00000.parquet"
    facts = json.loads(pq.read_schema(shard).metadata[b"fewstep"])
    for name in pq.read_schema(shard).names:
        place = tmp_path / f"without-{name}"
        shutil.copytree(folder, place)
        rewritten(place / shard.name, lambda columns, _, name=name: columns.pop(name) and None)
        check_one_sentence(place, read, f"without {name}")
    for name in facts:
        for number, value in enumerate((None, -1, 1.5, "x", [], 10**15)):
            place = tmp_path / f"{name}-{number}"
            shutil.copytree(folder, place)
            rewritten(place / shard.name, lambda _, facts, name=name, value=value: facts.update({name: value}))
            check_one_sentence(place, read, f"{name} = {value}")


def test_every_field_of_a_manifest_may_be_damaged(stored, tmp_path):
    folder, read = stored
    manifest = json.loads((folder / "manifest.json").read_text())
    place = tmp_path / "copy"
    shutil.copytree(folder, place)

    def check(changed: Any, what: str) -> None:
        (place / "manifest.json").write_text(json.dumps(changed))
        assert "\n" not in sentence_of(place, read), what

    for name, value in manifest.items():
        check({key: other for key, other in manifest.items() if key != name}, f"without {name}")
        for wrong in (None, True, -1, 0, 1.5, "x", "../x", [], {}, 10**18, "\x00"):
            check({**manifest, name: wrong}, f"{name} = {wrong!r}")
            for inner in value if isinstance(value, dict) else ():
                check({**manifest, name: {**value, inner: wrong}}, f"{name}.{inner} = {wrong!r}")
    for name in ("decoding", "teacher_hash", "kind", "schema_version", "num_shards", "suffix"):
        (place / "manifest.json").write_text(json.dumps({**manifest, name: None}))
        check_one_sentence(place, read, name)
    for text in ("", "[]", "null", "{", "\x00"):
        (place / "manifest.json").write_text(text)
        check_one_sentence(place, read, text)


def test_a_flipped_bit_of_a_shard_is_one_sentence_or_changes_nothing(stored, tmp_path):
    folder, read = stored
    whole = (folder / "shard-00000.parquet").read_bytes()
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    rng = np.random.default_rng(0)
    for bit in rng.integers(0, 8 * len(whole), 60).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (place / "shard-00000.parquet").write_bytes(flipped)
        assert "\n" not in sentence_of(place, read), bit
