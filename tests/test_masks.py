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


def layout_with_windows() -> Layout:
    torch.manual_seed(2)
    document = torch.randint(-1, 3, (2, 40)).sort(-1).values
    block = torch.randint(0, 12, (2, 40))
    return Layout(document, block, torch.rand(2, 40) < 0.5, block // 4 * 4)


def test_in_a_layout_with_windows_noisy_rows_are_causal_in_their_window():
    layout = layout_with_windows()
    mask = layout.dense()[:, 0]
    document, block, noisy = layout.document_RT, layout.block_RT, layout.noisy_RT
    for row in range(2):
        for query in range(40):
            for key in range(40):
                of_query, of_key = block[row, query], block[row, key]
                if document[row, query] != document[row, key]:
                    expected = False
                elif noisy[row, key]:
                    same_window = of_query // 4 == of_key // 4
                    expected = bool(noisy[row, query] and same_window and of_key <= of_query)
                elif noisy[row, query]:
                    expected = bool(of_key < of_query // 4 * 4)
                else:
                    expected = bool(of_key <= of_query)
                assert mask[row, query, key] == expected


def test_with_windows_too_the_mask_for_flex_attention_is_the_dense_one():
    layout = layout_with_windows()
    mask = create_mask(layout.flex().mask_mod, 2, None, 40, 40, device="cpu")
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
