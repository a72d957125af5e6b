"""The one mask predicate against the rule spelt out, row by row."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from fewstep.models.masks import Layout, cached_mask
from fewstep.models.roles import INVISIBLE, Role


def test_layout_is_the_rule_spelt_out():
    torch.manual_seed(0)
    document = torch.randint(-1, 3, (2, 30)).sort(-1).values
    block, noisy = torch.randint(0, 5, (2, 30)), torch.rand(2, 30) < 0.4
    mask = Layout(document, block, noisy).dense()[:, 0]
    for row in range(2):
        for query in range(30):
            for key in range(30):
                if document[row, query] != document[row, key]:
                    expected = False
                elif noisy[row, key]:
                    expected = bool(noisy[row, query] and block[row, query] == block[row, key])
                elif noisy[row, query]:
                    expected = bool(block[row, key] < block[row, query])
                else:
                    expected = bool(block[row, key] <= block[row, query])
                assert mask[row, query, key] == expected


def test_the_mask_for_flex_attention_is_the_dense_one():
    torch.manual_seed(1)
    document = torch.randint(-1, 3, (2, 30)).sort(-1).values
    layout = Layout(document, torch.randint(0, 5, (2, 30)), torch.rand(2, 30) < 0.4)
    mask = create_mask(layout.flex().mask_mod, 2, None, 30, 30, device="cpu")
    assert torch.equal(mask, layout.dense())


def test_invisible_slots_are_seen_by_inert_rows_only():
    mask = cached_mask(torch.tensor([[0, 5, INVISIBLE]]), torch.tensor([[0, 5, 6, INVISIBLE]]))
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("role", "context_attention", "expected"),
    [
        ("autoregressive", "bidirectional", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("bidirectional", "bidirectional", [0, 0, 0, 0, 0, 0, 0, 0]),
        ("bidirectional", "causal", [0, 1, 2, 3, 3, 3, 3, 3]),
        ("block_causal", "bidirectional", [0, 0, 0, 1, 1, 2, 2, 3]),
        ("block_causal", "causal", [0, 1, 2, 3, 3, 4, 4, 5]),
        ("block_causal", "block_causal", [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_block_numbers_of_every_role(role, context_attention, expected):
    spec = Role(name=role, block_size=2, mask_token_id=2, context_attention=context_attention)
    assert spec.blocks(torch.arange(8)[None], torch.tensor([[3]])).tolist() == [expected]
