"""Stored trajectories read as the flat tensors that the CDLM objective trains on. Needs pyarrow (extra `train`)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.models.load import network_hash
from fewstep.models.network import Network
from fewstep.train.examples import Examples, Origin
from fewstep.train.relabel import OF_STUDENT
from fewstep.train.trajectories import TrajectoryArrays, TrajectoryStore
from fewstep.train.trajectory_table import HiddenDistributions, TopDistributions, TrajectoryTable


def read_table(folder: str | Path, teacher: Network) -> tuple[TrajectoryTable, Examples | None]:
    """The trajectories in `folder`, and the reference answers stored beside them (None if there are none).

    Hidden rows are read by the head of `teacher`, which must therefore not be the network in training. FewstepError for
    a store that is damaged, unfinished, empty, of another schema, or made (or labelled) by another teacher.
    """
    return table_from_store(TrajectoryStore(folder, teacher_hash=network_hash(teacher)), teacher)


def table_from_store(store: TrajectoryStore, teacher: Network | None = None) -> tuple[TrajectoryTable, Examples | None]:
    """As `read_table`, of an open store. `teacher` is needed for hidden rows only. ValueError if it is missing then."""
    store.check_not_empty()
    arrays = store.load()
    examples = Examples(
        torch.from_numpy(arrays.prompt_ids),
        torch.from_numpy(arrays.prompt_offsets),
        torch.from_numpy(arrays.final_ids),
        torch.from_numpy(arrays.offsets),
        (Origin(str(store.folder), "record", arrays.ids),),
    )
    if teacher is not None:
        examples.check_tokens(teacher.vocab_size)
    table = TrajectoryTable(
        examples,
        torch.from_numpy(arrays.step_rank),
        _distributions(arrays, teacher),
        of_student=OF_STUDENT in store.manifest["decoding"],
    )
    return table, _references(arrays)


def _distributions(arrays: TrajectoryArrays, teacher: Network | None) -> TopDistributions | HiddenDistributions:
    if arrays.topk_ids is not None and arrays.topk_logp is not None and arrays.log_tail is not None:
        return TopDistributions(
            torch.from_numpy(arrays.topk_ids), torch.from_numpy(arrays.topk_logp), torch.from_numpy(arrays.log_tail)
        )
    if teacher is None:
        raise ValueError("hidden rows are read by the teacher's head; give the teacher")
    dtype, head = teacher.dtype, teacher.head
    return HiddenDistributions(arrays.hidden_tensor(), lambda hidden_ND: head(hidden_ND.to(dtype)))


def _references(arrays: TrajectoryArrays) -> Examples | None:
    if not arrays.has_reference.any():
        return None
    prompts = _rows(arrays.prompt_ids, arrays.prompt_offsets, arrays.has_reference)
    answers = _rows(arrays.reference_ids, arrays.reference_offsets, arrays.has_reference)
    return Examples(*prompts, *answers)


def _rows(ids: np.ndarray, offsets: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """The chosen rows of a ragged array, again as values and offsets."""
    lengths = np.diff(offsets)
    chosen_offsets = np.concatenate([[0], lengths[chosen].cumsum()])
    return torch.from_numpy(ids[np.repeat(chosen, lengths)]), torch.from_numpy(chosen_offsets)
