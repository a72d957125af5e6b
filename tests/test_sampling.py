"""Sampling: the generator against plain integers, the filters by hand, the distribution by counting."""

import pytest
import torch

from fewstep.decode.sampling import Sampling, confidence, draw, keep_top, noise_keys, uniform
from fewstep.errors import FewstepError

MASK64 = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The published generator, in Python integers."""
    z = state & MASK64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK64
    return z ^ (z >> 31)


def unsigned(value: int) -> int:
    return value & MASK64


def test_uniform_is_splitmix64() -> None:
    keys = torch.tensor([0, 1, -5, 1 << 62])
    for key, numbers in zip(keys.tolist(), uniform(keys, 3).tolist(), strict=True):
        expected = [((splitmix64(unsigned(key) + 0x9E3779B97F4A7C15 * n) >> 11) + 0.5) * 2.0**-53 for n in (1, 2, 3)]
        assert numbers == expected


def test_keys_differ_in_seed_position_and_step() -> None:
    seeds = torch.arange(-8, 8)
    positions = torch.arange(50).expand(16, 50)
    keys = torch.stack([noise_keys(seeds, positions, torch.full((16,), step)) for step in range(20)])
    assert keys.unique().numel() == keys.numel()


def test_noise_does_not_depend_on_the_batch() -> None:
    seeds, steps = torch.tensor([3, 4, 5]), torch.tensor([7, 1, 2])
    positions = torch.arange(6).expand(3, 6)
    together = noise_keys(seeds, positions, steps)
    alone = noise_keys(seeds[1:2], positions[1:2, 2:], steps[1:2])
    assert torch.equal(together[1:2, 2:], alone)


def test_temperature_zero_is_argmax_whatever_the_noise() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits, torch.arange(10).view(2, 5), torch.tensor([0.0, 0.0]))
    assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    num_draws = 40_000
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    keys = noise_keys(torch.tensor([0]), torch.arange(num_draws)[None], torch.tensor([1]))
    drawn = draw(logits.expand(1, num_draws, 4), keys, torch.tensor([temperature]))
    shares = drawn.flatten().bincount(minlength=4) / num_draws
    torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.01, rtol=0)


def test_the_mask_token_is_never_drawn() -> None:
    logits = torch.zeros(1, 5_000, 3)
    logits[..., 1] = float("-inf")
    keys = noise_keys(torch.tensor([9]), torch.arange(5_000)[None], torch.tensor([1]))
    assert set(draw(logits, keys, torch.tensor([5.0])).flatten().tolist()) == {0, 2}


def kept(top_k: int, top_p: float) -> list[int]:
    logits = torch.tensor([[[0.1, 0.4, 0.05, 0.3, 0.15]]]).log()
    return keep_top(logits, torch.tensor([top_k]), torch.tensor([top_p])).isfinite()[0, 0].nonzero()[:, 0].tolist()


def test_top_k_and_top_p_by_hand() -> None:
    assert kept(2, 1.0) == [1, 3]
    assert kept(99, 0.65) == [1, 3]
    assert kept(99, 0.75) == [1, 3, 4]
    assert kept(99, 0.01) == [1], "at least one"
    assert kept(2, 0.5) == [1], "top-p counts what top-k leaves: 0.4 / 0.7 > 0.5"
    assert kept(99, 1.0) == [0, 1, 2, 3, 4]


def test_requests_with_different_settings_share_a_batch() -> None:
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().expand(2, 1, 5)
    assert keep_top(logits, torch.tensor([1, 3]), torch.tensor([1.0, 1.0])).isfinite().sum(-1).tolist() == [[1], [3]]


def test_confidence_is_the_untempered_probability() -> None:
    logits = torch.tensor([[[0.25, 0.75]]]).log()
    torch.testing.assert_close(confidence(logits, torch.tensor([[0]])), torch.tensor([[0.25]]))


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_without_meaning_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(FewstepError):
        Sampling(**settings)  # type: ignore[arg-type]
