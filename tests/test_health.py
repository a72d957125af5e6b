"""Hand-worked health statistics."""

import json
import math

import numpy as np
import pytest
import torch

from fewstep.decode.health import distinct, entropy, longest_run, measure_health, repetition


def array(*tokens):
    return np.array(tokens, dtype=np.int64)


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        ((1, 2, 1, 2, 1), 2, 0.5),  # 12 21 12 21: two of four occurred before
        ((1, 1, 1, 1, 1), 4, 0.5),
        ((1, 1, 1, 1), 1, 0.75),
        ((1, 2, 3, 4, 5), 4, 0.0),
        ((1, 2), 4, 0.0),
        ((), 4, 0.0),
    ],
)
def test_repetition(tokens, n, share):
    assert repetition(array(*tokens), n) == share


@pytest.mark.parametrize(
    ("tokens", "length"), [((), 0), ((5,), 1), ((1, 2, 1), 1), ((1, 2, 2, 2, 1, 1), 3), ((7, 7), 2), ((1, 2, 2), 2)]
)
def test_longest_run(tokens, length):
    assert longest_run(array(*tokens)) == length


def test_distinct_counts_over_all_outputs_and_never_across_them():
    outputs = [array(1, 2, 1), array(1, 2)]
    assert distinct(outputs, 1) == 2 / 5
    assert distinct(outputs, 2) == 2 / 3  # 12 21 | 12, and no 11 in between
    assert distinct([array(1)], 2) == 0


def test_entropy_in_nats():
    assert entropy([array(1, 2), array(3, 4)]) == pytest.approx(math.log(4))
    assert entropy([array(1, 1), array(1)]) == pytest.approx(0)
    assert entropy([array(1, 1, 1, 2)]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert entropy([array()]) == 0


def test_health_of_a_set():
    health = measure_health([[1, 1, 1, 1, 1, 9], torch.tensor([2, 3]), [9], []], ignored_ids=[9])
    assert health.num_outputs == 4
    assert health.mean_length == 7 / 4
    assert health.empty == 0.5
    assert health.repetition == 0.5 / 4
    assert health.longest_run == 5
    assert health.distinct_1 == 3 / 7
    assert health.distinct_2 == 2 / 5
    assert json.loads(json.dumps(health.to_json()))["longest_run"] == 5


def test_nothing_at_all_is_refused_and_empty_outputs_are_counted():
    assert measure_health([[]]).empty == 1
    with pytest.raises(ValueError, match="at least one output"):
        measure_health([])
