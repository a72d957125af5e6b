"""Policies on hand-written confidences."""

import math
from itertools import combinations, permutations
from typing import ClassVar

import pytest
import torch

from fewstep.decode.own_policies import _reads, as_policy, reads
from fewstep.decode.policies import (
    BUILT_IN,
    DreamSchedule,
    EntropyBelow,
    EvenSplit,
    Factor,
    FixedCount,
    Margin,
    Origin,
    Policy,
    Scheduled,
    Threshold,
    certainty,
    perturbed,
)
from fewstep.decode.sampling import noise_keys, uniform
from fewstep.errors import FewstepError

ALL = torch.ones(1, 4, dtype=torch.bool)
POLICIES: list[Policy] = [
    Threshold(at_least=0.9),
    Threshold(at_least=0.9, gaps=1),
    Margin(at_least=0.5),
    EntropyBelow(nats=0.1),
    Factor(factor=0.5),
    FixedCount(num_tokens=1),
    EvenSplit(),
]


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def chosen(policy: Policy, certainty_RB: torch.Tensor, masked_RB: torch.Tensor = ALL) -> list[int]:
    return policy(certainty_RB, masked_RB)[0].nonzero()[:, 0].tolist()


def test_threshold_takes_every_masked_position_that_reaches_it() -> None:
    masked = torch.tensor([[True, False, True, True]])
    assert chosen(Threshold(at_least=0.9), row(0.9, 0.99, 0.89, 0.95), masked) == [0, 3]


@pytest.mark.parametrize(("gaps", "positions"), [(0, [0]), (1, [0, 2]), (2, [0, 2, 4]), (None, [0, 2, 4, 6])])
def test_what_has_more_uncertain_positions_before_it_than_the_gaps_waits(
    gaps: int | None, positions: list[int]
) -> None:
    confidence = row(0.95, 0.5, 0.96, 0.4, 0.97, 0.3, 0.98)
    assert chosen(Threshold(at_least=0.9, gaps=gaps), confidence, torch.ones(1, 7, dtype=torch.bool)) == positions


@pytest.mark.parametrize(("gaps", "positions"), [(0, [0]), (1, [2]), (2, [2, 5]), (None, [2, 5])])
def test_open_positions_are_no_gaps(gaps: int | None, positions: list[int]) -> None:
    masked = torch.tensor([[True, False, True, True, False, True]])
    confidence = row(0.5, 0.1, 0.95, 0.4, 0.2, 0.99)
    assert chosen(Threshold(at_least=0.9, gaps=gaps), confidence, masked) == positions


@pytest.mark.parametrize(("gaps", "position"), [(0, 1), (1, 1), (2, 3), (None, 4)])
def test_where_nothing_is_certain_the_best_within_the_gaps_is_taken_alone(gaps: int | None, position: int) -> None:
    masked = torch.tensor([[False, True, True, True, True]])
    assert chosen(Threshold(at_least=0.9, gaps=gaps), row(0.99, 0.3, 0.2, 0.5, 0.8), masked) == [position]


def test_a_certain_position_beyond_the_gaps_does_not_make_up_for_those_before_it() -> None:
    confidence = row(0.5, 0.6, 0.99, 0.99)
    assert chosen(Threshold(at_least=0.9, gaps=0), confidence) == [0]
    assert chosen(Threshold(at_least=0.9, gaps=1), confidence) == [1]
    assert chosen(Threshold(at_least=0.9, gaps=2), confidence) == [2, 3]


def by_hand(confidence: list[float], masked: list[bool], at_least: float, gaps: int) -> list[int]:
    """Left to right over the masked positions, until more uncertain ones than the gaps have been passed."""
    within: list[int] = []
    uncertain = 0
    for position in (i for i, is_masked in enumerate(masked) if is_masked):
        if uncertain > gaps:
            break
        within.append(position)
        uncertain += confidence[position] < at_least
    certain = [i for i in within if confidence[i] >= at_least]
    return certain or [max(within, key=lambda i: confidence[i])]


@pytest.mark.parametrize("gaps", [0, 1, 3, 16])
def test_gaps_on_random_rows(gaps: int) -> None:
    generator = torch.Generator().manual_seed(gaps)
    confidence = torch.rand(300, 16, generator=generator)
    masked = torch.rand(300, 16, generator=generator) < torch.rand(300, 1, generator=generator).clamp_min(0.2)
    masked[:, 3] = True
    picked = Threshold(at_least=0.6, gaps=gaps)(confidence, masked)
    assert picked.any(-1).all()
    assert not (picked & ~masked).any()
    for chosen_B, confidence_B, masked_B in zip(picked, confidence, masked, strict=True):
        expected = by_hand(confidence_B.tolist(), masked_B.tolist(), 0.6, gaps)
        assert chosen_B.nonzero()[:, 0].tolist() == expected
    if gaps == 16:
        assert torch.equal(picked, Threshold(at_least=0.6)(confidence, masked)), "as many as the block: no limit"


def test_a_requests_own_threshold_says_what_a_gap_is() -> None:
    confidence = row(0.7, 0.5, 0.95, 0.2).expand(2, 4)
    picked = Threshold(at_least=0.9, gaps=0)(confidence, ALL.expand(2, 4), torch.tensor([[0.6, 0], [0.4, 0]]))
    assert [one.nonzero()[:, 0].tolist() for one in picked] == [[0], [0, 1, 2]]


def test_margin_and_entropy_bounds_are_inclusive() -> None:
    assert chosen(Margin(at_least=0.5), row(0.5, 0.4, 0.6, 0.0)) == [0, 2]
    assert chosen(EntropyBelow(nats=0.5), row(-0.5, -0.6, -0.1, -2.0)) == [0, 2]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_ties_below_every_bound_finalise_exactly_one(policy: Policy) -> None:
    level = -3.0 if isinstance(policy, EntropyBelow) else 0.2
    setting = torch.tensor([[4.0]]) if policy.paced else None
    assert policy(torch.full((1, 4), level), ALL, setting).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("policy", [*POLICIES, Origin()], ids=repr)
def test_nothing_is_chosen_where_nothing_is_masked(policy: Policy) -> None:
    masked = torch.tensor([[False] * 4, [False, False, True, False]])
    picked = policy(torch.tensor([[0.99] * 4, [0.99, 0.99, 0.1, 0.99]]), masked, torch.ones(2, 2))
    assert not picked[0].any()
    assert picked[1].tolist() == [False, False, True, False]


def test_the_numbers_of_a_request_override_the_policys_own() -> None:
    confidence = row(0.3, 0.5, 0.7, 0.95).expand(2, 4)
    picked = Threshold(at_least=0.9)(confidence, ALL.expand(2, 4), torch.tensor([[0.6, 16], [0.4, 16]]))
    assert picked.sum(-1).tolist() == [2, 3]


def test_fixed_count_takes_the_most_certain_and_of_equals_the_earlier() -> None:
    assert chosen(FixedCount(num_tokens=2), row(0.5, 0.9, 0.5, 0.1)) == [0, 1]
    assert chosen(FixedCount(num_tokens=9), row(0.5, 0.9, 0.5, 0.1)) == [0, 1, 2, 3]


def test_factor_by_hand() -> None:
    # (n + 1)(1 - c_n) for c = 0.9, 0.8, 0.6, 0.1: 0.2, 0.6, 1.6, 4.5
    confidence = row(0.8, 0.1, 0.9, 0.6)
    assert chosen(Factor(factor=0.5), confidence) == [2]
    assert chosen(Factor(factor=0.7), confidence) == [0, 2]
    assert chosen(Factor(factor=2.0), confidence) == [0, 2, 3]
    assert chosen(Factor(factor=0.1), confidence) == [2], "always one"


@pytest.mark.parametrize(("masks", "steps", "counts"), [(10, 4, [3, 3, 2, 2]), (8, 4, [2] * 4), (3, 5, [1, 1, 1])])
def test_even_split_gives_the_first_steps_the_remainder(masks: int, steps: int, counts: list[int]) -> None:
    masked = torch.ones(1, masks, dtype=torch.bool)
    taken = []
    for left in range(steps, 0, -1):
        picked = EvenSplit()(torch.rand(1, masks), masked, torch.tensor([[left]]))
        if not masked.any():
            break
        taken.append(int(picked.sum()))
        masked &= ~picked
    assert taken == counts


def test_origin_chooses_each_mask_with_one_over_the_steps_left_and_all_at_last() -> None:
    noise = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0))
    masked = torch.ones_like(noise, dtype=torch.bool)
    for left in (2, 5, 10):
        share = Origin()(noise, masked, torch.tensor([[left]])).float().mean()
        assert abs(share - 1 / left) < 0.01
    assert Origin()(noise, masked, torch.tensor([[1]])).all()


def probability_of_set(weights: dict[int, float], positions: tuple[int, ...]) -> float:
    """That these are drawn one after the other in any order, none put back, by weight."""
    total = 0.0
    for order in permutations(positions):
        left, probability = sum(weights.values()), 1.0
        for position in order:
            probability *= weights[position] / left
            left -= weights[position]
        total += probability
    return total


@pytest.mark.parametrize("alg_temp", [0.3, 0.5, 2.0])
def test_dream_draws_positions_in_turn_and_puts_none_back(alg_temp: float) -> None:
    """20,000 draws of 3 of 6 masks against the probability of each set, by a chi-square test at 1 %."""
    num_draws, confidence = 20_000, [0.9, 0.35, 0.99, 0.5, 0.1, 0.55, 0.3]
    masked = torch.tensor([[True, True, False, True, True, True, True]])
    schedule = DreamSchedule(alg="maskgit_plus", num_steps=2, eps=0.0, alg_temp=alg_temp)
    keys = noise_keys(torch.arange(num_draws), torch.arange(7).expand(num_draws, 7), torch.ones(num_draws).long())
    stirred = perturbed(row(*confidence).expand(num_draws, 7), schedule.temperature, lambda: uniform(keys, 1)[..., 0])
    picked = schedule(stirred, masked.expand(num_draws, 7), torch.full((num_draws, 1), 2))
    assert (picked.sum(-1) == 3).all()

    def statistic(temperature: float) -> float:
        weights = {p: math.exp(confidence[p] / temperature) for p in range(7) if masked[0, p]}
        total = 0.0
        for positions in combinations(weights, 3):
            expected = num_draws * probability_of_set(weights, positions)
            observed = int(picked[:, list(positions)].all(-1).sum())
            assert expected > 5
            total += (observed - expected) ** 2 / expected
        return total

    degrees = torch.tensor((math.comb(6, 3) - 1) / 2.0)
    assert torch.special.gammaincc(degrees, torch.tensor(statistic(alg_temp) / 2)) > 0.01
    assert torch.special.gammaincc(degrees, torch.tensor(statistic(alg_temp * 1.5) / 2)) < 0.01, "it tells 1.5 times it"


@pytest.mark.parametrize("alg_temp", [None, 0.0])
def test_no_noise_is_made_where_none_is_asked_for(alg_temp: float | None) -> None:
    def refuse() -> torch.Tensor:
        raise AssertionError

    given = row(0.3, 0.2)
    schedule = DreamSchedule(alg="entropy", num_steps=2, alg_temp=alg_temp)
    for policy in (*POLICIES, Origin(), schedule):
        assert perturbed(given, policy.temperature, refuse) is given


@pytest.mark.parametrize("alg_temp", [1e-300, 1e-12, 1e300])
def test_no_temperature_overflows(alg_temp: float) -> None:
    noise = torch.rand(1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = -8 * torch.rand(1, 50, generator=torch.Generator().manual_seed(1))
    ranked = perturbed(given, alg_temp, lambda: noise).argsort(-1)
    assert torch.equal(ranked, (noise if alg_temp > 1 else given).argsort(-1))


def test_certainty_by_hand() -> None:
    logits = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
    logits = torch.cat([logits, torch.full((1, 1, 1), float("-inf"))], dim=-1)
    given = row(0.3)
    entropy = -(0.5 * torch.tensor(0.5).log() + 0.3 * torch.tensor(0.3).log() + 0.2 * torch.tensor(0.2).log())
    noise = row(0.123)
    assert certainty("low_confidence", logits, given, lambda: noise) is given
    assert certainty("random", logits, given, lambda: noise) is noise
    torch.testing.assert_close(certainty("margin", logits, given, lambda: noise), row(0.2))
    torch.testing.assert_close(certainty("entropy", logits, given, lambda: noise), -entropy[None, None])


@pytest.mark.parametrize("at_least", [0.0, -0.1, 1.01])
def test_a_threshold_outside_0_to_1_is_refused(at_least: float) -> None:
    with pytest.raises(FewstepError, match="probability in"):
        Threshold(at_least=at_least)
    with pytest.raises(FewstepError, match="probabilities in"):
        Margin(at_least=at_least)


def test_other_settings_without_meaning_are_refused() -> None:
    with pytest.raises(FewstepError, match="num_tokens must be at least 1"):
        FixedCount(num_tokens=0)
    with pytest.raises(FewstepError, match="above 0"):
        Factor(factor=0)
    with pytest.raises(FewstepError, match="in nats"):
        EntropyBelow(nats=0)
    with pytest.raises(FewstepError, match="gaps must be at least 0, got -1"):
        Threshold(gaps=-1)
    with pytest.raises(FewstepError, match="unknown order"):
        EvenSplit(order="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", sorted(BUILT_IN, key=lambda kind: kind.__name__))
def test_what_is_known_of_a_built_in_policy_is_what_is_read_of_others(kind: type) -> None:
    settings = {DreamSchedule: {"num_steps": 4}, Scheduled: {"counts": (1,)}}
    assert _reads(kind) == reads(kind(**settings.get(kind, {})))


def test_a_policy_made_from_a_built_in_one_is_checked_as_any_other() -> None:
    class Odd(Threshold):
        temperature: ClassVar[float] = -1.0

    with pytest.raises(FewstepError, match=r"has the temperature -1\.0"):
        as_policy(Odd())
