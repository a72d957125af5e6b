"""What only a GPU can show: the kernels of attention, and captured graphs. Skipped where there is none."""

import pytest
import torch

from fewstep.engine.attention import attend, attend_cached
from fewstep.engine.captured import CapturedLoop
from fewstep.engine.language_model import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

QUESTIONS = ["What is 3 + 4?", "Tom has 3 apples and buys 4 more. How many apples does he have?", "What is 12 - 5?"]


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def mask(requests: int, num_rows: int, slots: int) -> torch.Tensor:
    """Rows see three quarters of the slots, the first half of them one half."""
    seen = torch.zeros((requests, 1, num_rows, slots), device="cuda", dtype=torch.bfloat16)
    seen[..., slots * 3 // 4 :] = float("-inf")
    seen[:, :, : num_rows // 2, slots // 2 :] = float("-inf")
    return seen


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=seen.float(), scale=0.1, enable_gqa=True
    )
    return out.transpose(1, 2)


SHAPES = [
    (1, 28, 4, 32, 512, 128),
    (1, 28, 4, 1, 512, 128),
    (8, 8, 8, 64, 320, 32),
    (5, 9, 3, 33, 200, 64),
    (2, 4, 2, 7, 70, 80),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_by_parts_is_attention(shape: tuple[int, ...]) -> None:
    R, H, heads, Q, K, E = shape
    q, k, v, seen = rows(R, H, Q, E), rows(R, heads, K, E), rows(R, heads, K, E), mask(R, Q, K)
    torch.testing.assert_close(attend(q, k, v, seen, 0.1).float(), expected(q, k, v, seen), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("part", [False, True])
def test_rows_are_written_to_their_slots_before_they_are_read(part: bool) -> None:
    R, H, heads, Q, K, E = 2, 4, 2, 3, 96, 64
    keys, values = rows(4, heads, K, E), rows(4, heads, K, E)
    q, new_k, new_v = rows(R, H, Q, E), rows(R, heads, Q, E), rows(R, heads, Q, E)
    slots = torch.tensor([[5, 6, 7], [20, 95, 21]], device="cuda")
    requests = torch.tensor([3, 1], device="cuda") if part else None
    which = [3, 1] if part else [0, 1]
    after_k, after_v = keys.clone(), values.clone()
    for r, request in enumerate(which):
        after_k[request, :, slots[r]], after_v[request, :, slots[r]] = new_k[r], new_v[r]
    if not part:
        keys, values = keys[:2], values[:2]
    seen = mask(R, Q, 80)
    read_next = rows(300, H * E) if part else None
    found = attend_cached(q, new_k, new_v, seen, 0.1, keys, values, slots, requests, 80, read_next)
    wanted = expected(q, after_k[which, :, :80], after_v[which, :, :80], seen)
    torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0.02)
    assert torch.equal(keys, after_k[: len(keys)])
    assert torch.equal(values, after_v[: len(values)])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["gsm-student", "gsm-ar", "gsm-cllm", "gsm-draft"])
def test_captured_passes_give_the_tokens_of_the_plain_path(name: str, batch_size: int) -> None:
    lm = load(name, device="cuda", dtype="float32")
    asked = {"max_new_tokens": 64, "batch_size": batch_size}
    plain = lm.generate(QUESTIONS, engine="off", **asked)
    assert lm.choice().engine == "cuda"
    for _ in range(2):
        for output, other in zip(lm.generate(QUESTIONS, **asked), plain, strict=True):
            assert (output.token_ids, output.num_forwards) == (other.token_ids, other.num_forwards)
        assert isinstance(lm._kept, CapturedLoop)
        lm._kept.compile_passes()


def test_a_model_in_float8_runs_in_the_engine() -> None:
    lm = load("gsm-student", device="cuda", dtype="bfloat16", quantize="fp8")
    assert lm.choice().engine == "cuda"
    outputs = lm.generate(QUESTIONS, max_new_tokens=64, batch_size=1)
    plain = lm.generate(QUESTIONS, max_new_tokens=64, batch_size=1, engine="off")
    assert sum(one.token_ids == other.token_ids for one, other in zip(outputs, plain, strict=True)) >= 2
