"""Trajectories: ranks rebuild states, shards resume to the same bytes, and damage is named."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.files import contents
from torch.testing import assert_close

import fewstep.train.collect
import fewstep.train.records
from fewstep.decode.diffusion import Diffusion
from fewstep.decode.requests import Output, TopK
from fewstep.decode.sampling import Sampling
from fewstep.errors import FewstepError
from fewstep.models.load import network_hash
from fewstep.models.network import Plan
from fewstep.models.tiny import tiny_network
from fewstep.train.collect import collect, decode_with, distribution_of, row_seed, teacher_of
from fewstep.train.records import PromptRow
from fewstep.train.trajectories import Distribution, Teacher, TrajectoryStore, table_from_store

MASK = 3
TEACHER = Teacher(hash="a" * 64, vocab_size=64, mask_token_id=MASK)
CANVAS = 8


def record(row: PromptRow, seed: int) -> Output:
    """A made-up decoding: the seed decides the tokens, the order and where it stops."""
    noise = np.random.default_rng(seed)
    length = int(noise.integers(1, CANVAS + 1))
    ids = np.full(CANVAS, 5)
    steps = np.full(CANVAS, -1)
    ids[:length] = noise.integers(10, 64, length)
    steps[:length] = noise.permutation(length) + 1
    if length > 2:
        ids[0], steps[0], steps[1] = 7, 0, -1  # the first is given, the second stays open
    log_probs = torch.from_numpy(noise.normal(size=(CANVAS, 64))).log_softmax(-1)
    best = log_probs.topk(4, dim=-1)
    return output(
        ids,
        steps,
        token_ids=ids[:length].tolist(),
        top_k=TopK(best.indices, best.values, 1 - best.values.exp().sum(-1)),
    )


def output(ids, steps, **fields) -> Output:
    constant = {"num_tokens": 1, "seconds": 0.0, "finish_reason": "stop", "token_ids": []}
    canvas = {"canvas_ids_G": torch.tensor(ids), "step_G": torch.tensor(steps), "confidence_G": torch.ones(len(ids))}
    return Output(**(constant | canvas | {"num_forwards": int(max(steps))} | fields))


def decode(rows, seeds):
    return [record(row, seed) for row, seed in zip(rows, seeds, strict=True)]


def prompts(n: int = 10) -> list[PromptRow]:
    return [PromptRow(f"p{i}", list(range(10, 11 + i % 3)), [20, 21] if i % 2 else None) for i in range(n)]


def gather(folder: Path, rows=None, **changes):
    options = {"teacher": TEACHER, "settings": {"steps": 8}, "shard_size": 3, "distribution": Distribution(width=4)}
    return collect(changes.pop("decode_rows", decode), rows or prompts(), folder, **(options | changes))


def test_what_was_recorded_is_read_back(tmp_path):
    report = gather(tmp_path / "t", seed=5)
    assert (report.num_shards, report.num_records, report.num_rejected) == (4, 10, 0)
    store = TrajectoryStore(tmp_path / "t", teacher_hash=TEACHER.hash)
    assert len(store) == 10
    assert store.manifest["decoding"] == {"steps": 8}
    for row, read in zip(prompts(), store, strict=True):
        made = record(row, row_seed(row.id, 5))
        n = int((made.step_G > 0).nonzero()[-1]) + 1
        steps = made.step_G[:n]
        assert read.id == row.id
        assert read.prompt_ids.tolist() == list(row.prompt_ids)
        assert (read.reference_ids is None) == (row.reference_ids is None)
        assert read.final_ids.tolist() == torch.where(steps < 0, MASK, made.canvas_ids_G[:n]).tolist()
        assert read.step_rank.tolist() == steps.clamp_min(0).tolist()
        assert (read.canvas_length, read.num_forwards) == (CANVAS, made.num_forwards)
        kept = read.step_rank > 0
        assert kept.tolist() == (steps > 0).tolist()
        assert read.topk_ids[kept].tolist() == made.top_k.ids_GK[:n][kept].tolist()
        assert read.topk_logp[kept].tolist() == made.top_k.log_probs_GK[:n][kept].half().tolist()
        assert read.log_tail[kept].tolist() == made.top_k.tail_mass_G[:n][kept].log().half().tolist()
        assert not read.topk_logp[~kept].any()


def test_flat_arrays_are_the_records_one_after_another(tmp_path):
    gather(tmp_path / "t")
    store = TrajectoryStore(tmp_path / "t")
    arrays = store.load()
    assert arrays.topk_ids.dtype == np.int16
    assert arrays.topk_ids.shape == (store.count("num_positions"), 4)
    assert arrays.log_tail.shape == (store.count("num_positions"),)
    for one, other in zip(store, (arrays[i] for i in range(len(arrays))), strict=True):
        for name in ("id", "prompt_ids", "final_ids", "step_rank", "reference_ids", "topk_logp", "log_tail"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_hidden_rows_keep_every_bit(tmp_path, dtype, torch_dtype):
    rows = torch.randn(CANVAS, 6).to(torch_dtype)

    def decode_hidden(of_shard, seeds):
        return [output(range(10, 10 + CANVAS), range(1, CANVAS + 1), hidden_GD=rows) for _ in of_shard]

    gather(tmp_path / "t", decode_rows=decode_hidden, distribution=Distribution(kind="hidden", width=6, dtype=dtype))
    arrays = TrajectoryStore(tmp_path / "t").load()
    assert arrays.hidden_dtype == dtype
    assert arrays.topk_ids is None
    assert torch.equal(arrays.hidden_tensor(), rows.repeat(10, 1))


def test_the_number_of_workers_does_not_change_a_byte(tmp_path):
    gather(tmp_path / "one")
    for k in (2, 0, 1):
        gather(tmp_path / "three", worker=(k, 3))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    with pytest.raises(FewstepError, match="worker 3 of 3 does not exist"):
        gather(tmp_path / "three", worker=(3, 3))


def test_another_seed_changes_the_noise_and_a_prompt_keeps_its_own():
    assert row_seed("a", 0) == row_seed("a", 0)
    assert len({row_seed("a", 0), row_seed("b", 0), row_seed("a", 1), row_seed("a", 10)}) == 4
    assert 0 <= row_seed("a", 0) < 2**31


def test_a_killed_collection_is_finished_to_the_same_bytes(tmp_path):
    gather(tmp_path / "whole")
    script = (
        "import sys, time\n"
        "import pyarrow.parquet as pq\n"
        "import test_trajectories as t\n"
        "write_table = pq.write_table\n"
        "def hang(table, path, **options):\n"
        "    write_table(table, path, **options)\n"
        "    if 'shard-00002' in str(path):\n"
        "        print('writing', flush=True)\n"
        "        time.sleep(60)\n"
        "pq.write_table = hang\n"
        "t.gather(t.Path(sys.argv[1]))\n"
    )
    source = Path(fewstep.train.collect.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "killed"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{Path(__file__).parent}"},
    )
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(contents(tmp_path / "killed")) == 4  # manifest, two shards and a leftover
    with pytest.raises(FewstepError, match="2 of 4 shards; run collect again"):
        TrajectoryStore(tmp_path / "killed")

    decoded = []

    def counting(rows, seeds):
        decoded.extend(row.id for row in rows)
        return decode(rows, seeds)

    report = gather(tmp_path / "killed", decode_rows=counting)
    assert decoded == ["p6", "p7", "p8", "p9"]
    assert (report.num_shards, report.num_shards_made_now, report.num_records) == (4, 2, 10)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert gather(tmp_path / "killed", decode_rows=None).num_shards_made_now == 0


@pytest.mark.parametrize(
    ("stop", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), FewstepError)]
)
def test_an_interrupted_collection_keeps_the_shards_it_had(tmp_path, monkeypatch, stop, seen):
    write_table = pq.write_table

    def failing(table, path, **options):
        if "shard-00001" in str(path):
            Path(path).write_bytes(b"half")
            raise stop
        write_table(table, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", failing)
        with pytest.raises(seen):
            gather(tmp_path / "t")
    assert sorted(contents(tmp_path / "t")) == ["manifest.json", "shard-00000.parquet"]
    gather(tmp_path / "t")
    gather(tmp_path / "whole")
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_ctrl_c_while_decoding_keeps_the_shard_being_written(tmp_path):
    def interrupted(rows, seeds):
        if rows[0].id == "p3":
            raise KeyboardInterrupt
        return decode(rows, seeds)

    with pytest.raises(KeyboardInterrupt):
        gather(tmp_path / "t", decode_rows=interrupted)
    assert sorted(contents(tmp_path / "t")) == ["manifest.json", "shard-00000.parquet"]


def test_rejected_records_are_counted_also_by_a_rerun(tmp_path):
    def long(row, made):
        return len(made.token_ids) > 4

    expected = [row.id for row in prompts() if len(record(row, row_seed(row.id, 0)).token_ids) > 4]
    progress = []
    report = gather(tmp_path / "t", keep=long, on_shard=progress.append)
    assert report.num_prompts == 10
    assert report.num_records == len(expected)
    assert report.num_rejected == 10 - len(expected)
    assert [part.num_shards for part in progress] == [1, 2, 3, 4]
    assert [trajectory.id for trajectory in TrajectoryStore(tmp_path / "t")] == expected
    assert gather(tmp_path / "t", keep=long).num_rejected == report.num_rejected
    with pytest.raises(FewstepError, match="filtered is True there and False here"):
        gather(tmp_path / "t")


def test_a_shard_may_be_empty(tmp_path):
    gather(tmp_path / "t", keep=lambda row, made: row.id == "p9")
    assert TrajectoryStore(tmp_path / "t").load().ids == ["p9"]
    gather(tmp_path / "none", keep=lambda row, made: False)
    assert len(TrajectoryStore(tmp_path / "none").load()) == 0
    with pytest.raises(FewstepError, match="none holds no diffusion trajectories, since all were rejected"):
        table_from_store(TrajectoryStore(tmp_path / "none"))


def test_other_settings_prompts_or_teacher_are_refused(tmp_path):
    gather(tmp_path / "t")
    with pytest.raises(FewstepError, match=r"decoding\.steps is 8 there and 9 here"):
        gather(tmp_path / "t", settings={"steps": 9})
    with pytest.raises(FewstepError, match=r"\(prompts_hash is \w+ there and \w+ here\)"):
        gather(tmp_path / "t", rows=[*prompts(9), PromptRow("new", [10])])
    with pytest.raises(FewstepError, match=r"teacher_hash is a+ there and b+ here"):
        gather(tmp_path / "t", teacher=Teacher(hash="b" * 64, vocab_size=64, mask_token_id=MASK))
    with pytest.raises(FewstepError, match=r"made by another teacher \(aaaaaaaaaaaa, not bbbbbbbbbbbb\)"):
        TrajectoryStore(tmp_path / "t", teacher_hash="b" * 64)


def test_bad_prompts_are_refused(tmp_path):
    with pytest.raises(FewstepError, match="the prompt id 'p1' occurs 2 times"):
        gather(tmp_path / "t", rows=[*prompts(), PromptRow("p1", [10])])
    with pytest.raises(FewstepError, match="no prompts"):
        collect(decode, [], tmp_path / "t", teacher=TEACHER, settings={}, distribution=Distribution())
    with pytest.raises(FewstepError, match="shard_size 0"):
        gather(tmp_path / "t", shard_size=0)
    assert not (tmp_path / "t").exists()


def test_a_shard_of_another_teacher_or_schema_or_place_is_named(tmp_path, monkeypatch):
    gather(tmp_path / "t")
    gather(tmp_path / "other", teacher=Teacher(hash="b" * 64, vocab_size=64, mask_token_id=MASK))
    shard = tmp_path / "t" / "shard-00001.parquet"
    original = shard.read_bytes()
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(FewstepError, match=r"shard-00001\.parquet was made by another teacher \(bbbb"):
        TrajectoryStore(tmp_path / "t")
    shard.write_bytes((tmp_path / "t" / "shard-00002.parquet").read_bytes())
    with pytest.raises(FewstepError, match="holds shard 2"):
        TrajectoryStore(tmp_path / "t")
    with monkeypatch.context() as patch:
        for module in (fewstep.train.collect, fewstep.train.records):
            patch.setattr(module, "SCHEMA_VERSION", 2)
        gather(tmp_path / "newer")
    shard.write_bytes((tmp_path / "newer" / shard.name).read_bytes())
    with pytest.raises(FewstepError, match=r"shard-00001\.parquet has schema 2 of diffusion trajectories, not 1"):
        TrajectoryStore(tmp_path / "t")
    with pytest.raises(
        FewstepError, match="newer holds diffusion trajectories of schema 2, and this version reads schema 1"
    ):
        TrajectoryStore(tmp_path / "newer")
    pq.write_table(pq.read_table(shard).replace_schema_metadata(None), shard)
    with pytest.raises(FewstepError, match="is not a shard of diffusion trajectories"):
        TrajectoryStore(tmp_path / "t")
    shard.write_bytes(original)
    assert len(TrajectoryStore(tmp_path / "t").load()) == 10


def test_a_damaged_shard_is_named_and_can_be_made_again(tmp_path):
    gather(tmp_path / "t")
    whole = contents(tmp_path / "t")
    shard = tmp_path / "t" / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(FewstepError, match=r"shard-00001\.parquet is damaged .*; delete it and collect again"):
        TrajectoryStore(tmp_path / "t")
    with pytest.raises(FewstepError, match="is damaged"):
        gather(tmp_path / "t")
    flipped = bytearray(whole[shard.name])
    flipped[60] ^= 0xFF  # in the first data page
    shard.write_bytes(flipped)
    with pytest.raises(FewstepError, match="is damaged"):
        TrajectoryStore(tmp_path / "t").load()
    shard.unlink()
    gather(tmp_path / "t")
    assert contents(tmp_path / "t") == whole


def test_an_output_that_lacks_what_is_to_be_stored_is_refused(tmp_path):
    def one(made):
        return lambda rows, seeds: [made] * len(rows)

    with pytest.raises(ValueError, match="p0: the decoding recorded no top-k"):
        gather(tmp_path / "a", decode_rows=one(output([10], [1])))
    with pytest.raises(ValueError, match="p0: the decoding recorded no hidden rows"):
        gather(tmp_path / "b", decode_rows=one(output([10], [1])), distribution=Distribution(kind="hidden", width=6))
    narrow = TopK(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3), torch.zeros(1))
    with pytest.raises(ValueError, match=r"p0: topk_ids has the shape \(1, 3\), not \(1, 4\)"):
        gather(tmp_path / "c", decode_rows=one(output([10], [1], top_k=narrow)))
    with pytest.raises(ValueError, match="p0: the decoding finalised nothing"):
        gather(tmp_path / "d", decode_rows=one(output([10], [0])))
    with pytest.raises(ValueError, match="a step beyond 32767"):
        gather(tmp_path / "e", decode_rows=one(output([10], [40_000])))
    with pytest.raises(ValueError, match="zip"):
        gather(tmp_path / "f", decode_rows=lambda rows, seeds: decode(rows, seeds)[1:])


@pytest.mark.parametrize(
    "fields", [{"kind": "logits"}, {"width": 0}, {"dtype": "bfloat16"}, {"kind": "hidden", "dtype": "float64"}]
)
def test_impossible_distributions_are_refused(fields):
    with pytest.raises(FewstepError):
        Distribution(**fields)


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", math.nan), ("float16", 1e5)])
def test_a_distribution_that_is_not_finite_is_refused(tmp_path, dtype, value):
    made = output([10], [1], hidden_GD=torch.tensor([[1.0, value]]))
    distribution = Distribution(kind="hidden", width=2, dtype=dtype)
    with pytest.raises(FewstepError, match=f"hidden of shard 0 cannot be stored: .* not finite as {dtype}"):
        gather(tmp_path, decode_rows=lambda rows, seeds: [made] * len(rows), distribution=distribution)


def test_wide_vocabularies_store_wide_ids(tmp_path):
    def decode_wide(rows, seeds):
        top_k = TopK(torch.tensor([[40_000]]), torch.tensor([[-0.5]]), torch.tensor([0.0]))
        return [output([40_000], [1], top_k=top_k) for _ in rows]

    teacher = Teacher(hash="a", vocab_size=50_000, mask_token_id=MASK)
    gather(tmp_path / "t", decode_rows=decode_wide, teacher=teacher, distribution=Distribution(width=1))
    arrays = TrajectoryStore(tmp_path / "t").load()
    assert arrays.topk_ids.dtype == np.int32
    assert arrays.topk_ids.shape == (10, 1)
    assert (arrays.topk_ids == 40_000).all()
    assert (arrays.log_tail == -65504).all()  # an empty tail is finite


def teacher_rows() -> list[PromptRow]:
    return [PromptRow(f"q{i}", list(range(20, 23 + i))) for i in range(5)]


def collect_from_teacher(folder: Path, network, distribution, **changes):
    decoder = Diffusion(role=network.role, block_size=4)
    options = {
        "max_new_tokens": 10,
        "batch_size": 2,
        "distribution": distribution,
        "sampling": Sampling(temperature=1.0),
    }
    decode_rows = decode_with(network, decoder, **options)
    return collect(
        decode_rows,
        teacher_rows(),
        folder,
        teacher=teacher_of(network),
        settings={"temperature": 1.0},
        distribution=distribution,
        shard_size=2,
        **changes,
    )


def test_the_manifest_names_the_end_tokens(tmp_path):
    folder = tmp_path / "t"
    gather(folder, worker=(0, 2), stop_token_ids=(5, 7))
    assert json.loads((folder / "manifest.json").read_text())["stop_token_ids"] == [5, 7]
    gather(folder, stop_token_ids=(5, 7))
    for others in ((5,), (5, 8), (7, 5)):
        with pytest.raises(FewstepError, match=r"stop_token_ids is \[5, 7\] there and"):
            gather(folder, stop_token_ids=others)
    network = tiny_network("bidirectional")
    collect_from_teacher(tmp_path / "own", network, distribution_of(network, top_k=8))
    manifest = json.loads((tmp_path / "own" / "manifest.json").read_text())
    assert manifest["stop_token_ids"] == list(network.stop_token_ids)


def test_a_store_without_end_tokens_goes_on_where_the_model_has_one(tmp_path):
    folder = tmp_path / "t"
    gather(folder, worker=(0, 2), stop_token_ids=(5,))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["stop_token_ids"]  # as an older version began it
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FewstepError, match=r"stop_token_ids is not set there and \[5, 7\] here"):
        gather(folder, stop_token_ids=(5, 7))
    assert gather(folder, stop_token_ids=(5,)).num_records == 10


@pytest.mark.parametrize("kind", ["top_k", "hidden"])
def test_stored_distributions_are_what_the_teacher_says_of_the_state_before(tmp_path, kind):
    network = tiny_network("bidirectional", head_scale=8.0)
    collect_from_teacher(tmp_path / "t", network, distribution_of(network, kind, top_k=8))
    store = TrajectoryStore(tmp_path / "t", teacher_hash=network_hash(network))
    assert len(store) == 5
    arrays = store.load()
    for record in (arrays[i] for i in range(5)):
        assert record.num_forwards == record.step_rank.max() <= 12
        assert record.step_rank.any()
        for position in np.flatnonzero(record.step_rank):
            state = np.full(record.canvas_length, record.mask_token_id)
            known = record.step_rank < record.step_rank[position]
            state[: len(known)][known] = record.final_ids[known]
            assert state[position] == network.role.mask_token_id
            tokens = torch.tensor([*record.prompt_ids.tolist(), *state.tolist()])[None]
            positions = torch.arange(tokens.shape[1])[None]
            plan = Plan("full", tokens, positions, torch.zeros_like(tokens), None, positions)
            with torch.no_grad():
                scores = network.score(plan)
            row = len(record.prompt_ids) + position
            expected = scores.logits_RSV[0, row].log_softmax(-1)
            if kind == "hidden":
                assert_close(
                    torch.from_numpy(record.hidden[position]).float(), scores.hidden_RSD[0, row], atol=2e-3, rtol=2e-3
                )
                continue
            ids = torch.from_numpy(record.topk_ids[position]).long()
            assert_close(torch.from_numpy(record.topk_logp[position]).float(), expected[ids], atol=2e-3, rtol=2e-3)
            tail = 1 - expected[ids].exp().sum()
            assert math.exp(record.log_tail[position]) == pytest.approx(float(tail), abs=2e-3)


def test_workers_and_reruns_of_a_real_teacher_make_the_same_bytes(tmp_path):
    network = tiny_network("bidirectional", head_scale=8.0)
    distribution = distribution_of(network)
    assert distribution.width == network.vocab_size
    collect_from_teacher(tmp_path / "one", network, distribution)
    for k in (1, 0):
        collect_from_teacher(tmp_path / "two", network, distribution, worker=(k, 2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    (tmp_path / "two" / "shard-00001.parquet").unlink()
    collect_from_teacher(tmp_path / "two", network, distribution)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_causal_model_has_no_diffusion_trajectories():
    with pytest.raises(FewstepError, match="has no mask token"):
        teacher_of(tiny_network("autoregressive"))
