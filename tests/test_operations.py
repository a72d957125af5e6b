"""Operations of a training step are counted by the formula that is printed with them."""

import pytest
import torch

from fewstep.measure.timing import matmul_flops_per_second
from fewstep.models.tiny import tiny_network
from fewstep.train.examples import Examples
from fewstep.train.objectives import CausalObjective
from fewstep.train.operations import Work, count_work, flops_per_token


def test_operations_are_counted_by_the_formula() -> None:
    network = tiny_network("autoregressive", hidden=16, layers=2)
    examples = Examples.from_ids([[3, 5, 6]], [[7, 8, 1]])
    objective = CausalObjective(network.role, examples, network.eos_token_id)
    work, without = count_work(
        objective, network.vocab_size, rows=1, row_length=8, device=torch.device("cpu"), batches=2
    )
    assert without == Work()
    assert (work.real_tokens, work.scored, work.visible_keys) == (12, 6, 2 * 21)  # 1 + 2 + ... + 6 keys
    weights = network.num_parameters - 2 * 64 * 16
    expected = 6 * weights + 6 * 64 * 16 * 0.5 + 12 * 2 * 16 * 3.5
    assert flops_per_token(network, (work, without)) == pytest.approx(expected)


def test_a_forward_without_gradient_counts_a_third_and_frozen_weights_two_thirds() -> None:
    network = tiny_network("autoregressive", hidden=16, layers=2)
    one, none = Work(real_tokens=6, scored=3, visible_keys=21), Work()
    alone = flops_per_token(network, (one, none))
    assert flops_per_token(network, (one, one)) == pytest.approx(alone * 4 / 3)
    attention = 12 * 2 * 16 * 3.5
    frozen = (alone - attention) * 4 / 6 + attention
    assert flops_per_token(network, (one, none), adapter_parameters=100) == pytest.approx(frozen + 6 * 100)


def test_the_rate_of_matrix_products_is_measured() -> None:
    assert matmul_flops_per_second(16, torch.device("cpu"), torch.float32, repeats=2) > 0
