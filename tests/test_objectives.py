"""The packed training forward against plain unpacked ones, and losses against hand-worked numbers."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fewstep.errors import FewstepError
from fewstep.models.masks import Layout
from fewstep.models.network import Plan
from fewstep.models.tiny import tiny_network
from fewstep.train import losses
from fewstep.train.cdlm import CDLMObjective, CDLMSettings, TopDistributions, TrajectoryTable, blockwise_ranks
from fewstep.train.corruption import later_state, stratified_uniform
from fewstep.train.examples import Examples
from fewstep.train.objectives import (
    Batch,
    CanvasLengths,
    CausalObjective,
    Corruption,
    MaskedDiffusionObjective,
    PackedDocuments,
)
from fewstep.train.packing import next_fit, pack

PROMPTS = [[3, 10, 11, 4], [3, 12, 13, 14, 15, 4], [3, 9, 4]]
ANSWERS = [[20, 21, 22, 23, 24, 1], [30, 31, 1], [40, 41, 42, 43, 44, 45, 46, 47, 48, 1]]


@pytest.fixture
def examples() -> Examples:
    return Examples.from_ids(PROMPTS, ANSWERS)


def batch_of(objective, num_rows=2, row_length=40, order=(0, 1, 2)) -> Batch:
    chosen = np.array(order)
    lengths = objective.segment_lengths(chosen, np.random.default_rng(0))
    starts = next_fit(lengths.sum(1), num_rows, row_length)
    assert len(starts) == len(order)
    segments = torch.from_numpy(lengths)
    return Batch(torch.from_numpy(chosen), segments, pack(torch.from_numpy(starts), segments, num_rows, row_length))


def forward_of(network, calls=None):
    """The network as objectives call it, dense and in evaluation mode; `calls` collects the arguments."""

    def forward(tokens_RT, positions_RT, layout: Layout, rows_S, *, gradient=True):
        if calls is not None:
            calls.append((tokens_RT, positions_RT, layout, rows_S))
        hidden = network.module.base_model(
            input_ids=tokens_RT, attention_mask=layout.dense(), position_ids=positions_RT, use_cache=False
        ).last_hidden_state
        logits = network.module.get_output_embeddings()(hidden.flatten(0, 1)[rows_S])
        return logits if gradient else logits.detach()

    return forward


def unpacked_logits(network, tokens: list[int], context: int) -> torch.Tensor:
    """Logits [T, V] of one plain uncached forward in the network's role."""
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    blocks = network.role.blocks(positions, torch.tensor([[context]]))
    hidden = network.hidden(Plan("full", ids, positions, blocks, None, positions))
    return network.module.get_output_embeddings()(hidden)[0]


def test_next_fit_fills_rows_in_order_and_reports_how_many_it_placed():
    assert next_fit(np.array([3, 4, 5, 9, 1]), 2, 9).tolist() == [0, 3, 9]
    with pytest.raises(ValueError, match="does not fit"):
        next_fit(np.array([10]), 1, 9)


def test_pack_names_document_segment_and_index_of_every_position():
    packed = pack(torch.tensor([0, 3, 6]), torch.tensor([[1, 2], [2, 1], [1, 1]]), 2, 6)
    assert packed.document_RT.tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, -1, -1, -1, -1]]
    assert packed.segment_RT.tolist() == [[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert packed.index_RT.tolist() == [[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("context_attention", ["bidirectional", "causal"])
def test_noisy_blocks_of_the_packed_forward_equal_unpacked_forwards(examples, context_attention):
    network = tiny_network("block_causal", context_attention=context_attention, head_scale=20)
    objective = MaskedDiffusionObjective(network.role, examples, eos_token_id=1)
    batch, calls = batch_of(objective), []
    generator = torch.Generator().manual_seed(5)
    objective.loss(forward_of(network, calls), batch, generator)
    tokens, positions, layout, _ = calls[0]
    hidden = network.module.base_model(
        input_ids=tokens, attention_mask=layout.dense(), position_ids=positions, use_cache=False
    ).last_hidden_state
    packed_logits = network.module.get_output_embeddings()(hidden)
    documents = PackedDocuments(network.role, examples, batch, 1)
    compared = 0
    for document, prompt in enumerate(PROMPTS):
        here = documents.packed.document_RT == document
        noisy = tokens[here & (documents.packed.segment_RT == 1)]
        clean = tokens[here & (documents.packed.segment_RT == 2)]
        packed_noisy = packed_logits[here & (documents.packed.segment_RT == 1)]
        for start in range(0, len(noisy), 4):
            sequence = prompt + clean[:start].tolist() + noisy[start : start + 4].tolist()
            expected = unpacked_logits(network, sequence, len(prompt))[-4:]
            assert_close(packed_noisy[start : start + 4], expected, atol=1e-4, rtol=1e-4)
            compared += 1
    assert compared == 2 + 1 + 3


def test_causal_objective_is_the_mean_next_token_loss_of_the_completions(examples):
    network = tiny_network("autoregressive", head_scale=20)
    objective = CausalObjective(network.role, examples, 1)
    loss = objective.loss(forward_of(network), batch_of(objective), torch.Generator())
    terms = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logp = unpacked_logits(network, prompt + answer, len(prompt)).log_softmax(-1)
        terms += [-logp[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
    assert_close(loss.total, torch.stack(terms).mean(), atol=1e-4, rtol=1e-4)


def test_bidirectional_loss_equals_an_unpacked_forward(examples):
    network = tiny_network("bidirectional", head_scale=20)
    objective = MaskedDiffusionObjective(network.role, examples, 1, canvas=CanvasLengths(block_size=4, weights=(0, 0, 1, 1)))
    batch, calls = batch_of(objective, 3, 30), []
    loss = objective.loss(forward_of(network, calls), batch, torch.Generator().manual_seed(1))
    tokens, _, _, rows = calls[0]
    documents = PackedDocuments(network.role, examples, batch, 1)
    terms = []
    for document, prompt in enumerate(PROMPTS):
        here = documents.packed.document_RT == document
        sequence = tokens[here].tolist()
        answer = documents.clean_RT[here].tolist()
        logp = unpacked_logits(network, sequence, len(prompt)).log_softmax(-1)
        terms += [-logp[i, answer[i]] for i, token in enumerate(sequence) if token == 2]
        assert set(answer[len(prompt) + len(ANSWERS[document]) :]) <= {1}
    assert len(terms) == len(rows)
    assert_close(loss.total, torch.stack(terms).mean(), atol=1e-4, rtol=1e-4)


def test_leftward_corruption_opens_earlier_blocks_hides_later_ones_and_scores_the_active_one(examples):
    network = tiny_network("bidirectional")
    objective = MaskedDiffusionObjective(
        network.role, examples, 1, corruption=Corruption(leftward=1.0), canvas=CanvasLengths(block_size=4, weights=(0, 0, 1))
    )
    batch, calls = batch_of(objective, 3, 30), []
    objective.loss(forward_of(network, calls), batch, torch.Generator().manual_seed(3))
    tokens, _, _, rows = calls[0]
    documents = PackedDocuments(network.role, examples, batch, 1)
    block = documents.block_of_response().flatten()
    for document in range(3):
        here = (documents.packed.document_RT == document).flatten()
        hidden = here & (tokens.flatten() == 2)
        scored = torch.zeros_like(hidden)
        scored[rows] = True
        active = block[scored & here].unique()
        assert len(active) <= 1
        for later in block[here & documents.is_noisy_RT.flatten()].unique():
            inside = here & documents.is_noisy_RT.flatten() & (block == later)
            if len(active) and later > active:
                assert hidden[inside].all()
            if len(active) and later < active:
                assert not hidden[inside].any()


def test_canvas_lengths_are_whole_blocks_that_hold_the_answer():
    lengths = CanvasLengths(block_size=4, weights=(1, 1, 0, 1)).draw(np.array([1, 4, 5, 9, 16] * 50), np.random.default_rng(0))
    needed = np.array([1, 4, 5, 9, 16] * 50)
    assert (lengths >= needed).all() and set(lengths) == {4, 8, 16}
    with pytest.raises(FewstepError, match="exceeds the longest canvas"):
        CanvasLengths(block_size=4, weights=(1.0,)).draw(np.array([5]), np.random.default_rng(0))


def test_blockwise_ranks_sort_within_blocks_and_count_recorded_positions():
    ranks = np.array([3, 1, 2, 0, 5, 6, 4])
    sorted_ranks, counts = blockwise_ranks(np.array([0, 5, 7]), ranks, block_size=4)
    biggest = np.iinfo(np.int32).max
    assert sorted_ranks.tolist() == [1, 2, 3, biggest, 5, 4, 6]
    assert counts.tolist() == [3, 3, 3, 3, 1, 2, 2]


def cdlm(network, settings, *, references=None, distributions=True):
    rng = np.random.default_rng(0)
    finals = [[20, 21, 22, 23, 24, 1], [30, 31, 1], [40, 41, 42, 43, 44, 45, 46, 47, 48, 1]]
    ranks = [[2, 1, 4, 3, 6, 5], [3, 1, 2], [4, 3, 2, 1, 5, 6, 7, 8, 10, 9]]
    table_examples = Examples.from_ids(PROMPTS, finals)
    count = sum(map(len, finals))
    top = torch.from_numpy(np.stack([rng.permutation(50)[:3] for _ in range(count)]))
    probability = torch.tensor([0.6, 0.2, 0.1])
    dist = TopDistributions(top, probability.log().expand(count, 3), torch.full((count,), math.log(0.1)))
    table = TrajectoryTable(table_examples, torch.tensor(sum(ranks, [])), dist if distributions else None)
    return CDLMObjective(network.role, table, 1, references=references, settings=settings), finals, ranks


def test_cdlm_states_are_prefixes_of_each_blocks_own_order_and_y_star_is_later():
    network = tiny_network("block_causal")
    objective, finals, ranks = cdlm(network, CDLMSettings(denoising=0.0))
    for seed in range(20):
        batch, calls = batch_of(objective), []
        objective.loss(forward_of(network, calls), batch, torch.Generator().manual_seed(seed))
        documents = PackedDocuments(network.role, objective.examples, batch, 1)
        (tokens, *_), (later_tokens, *_) = calls
        for document, final in enumerate(finals):
            noisy = documents.is_noisy_RT & (documents.packed.document_RT == document)
            now, later = tokens[noisy].tolist(), later_tokens[noisy].tolist()
            for start in range(0, len(final), 4):
                block = list(range(start, min(start + 4, len(final))))
                by_rank = sorted(block, key=lambda i: ranks[document][i])
                opened = [i for i in by_rank if now[i] != 2]
                opened_later = [i for i in by_rank if later[i] != 2]
                assert opened == by_rank[: len(opened)] and len(opened) < len(block)
                assert opened_later == by_rank[: len(opened_later)] and len(opened_later) > len(opened)
                assert all(now[i] == final[i] for i in opened)


def test_cdlm_losses_equal_plain_sums():
    network = tiny_network("block_causal", head_scale=20)
    settings = CDLMSettings(distillation=1.0, consistency=0.5, denoising=0.0)
    objective, finals, _ = cdlm(network, settings)
    batch, calls = batch_of(objective), []
    loss = objective.loss(forward_of(network, calls), batch, torch.Generator().manual_seed(7))
    (tokens, positions, layout, rows), (later_tokens, _, _, later_rows) = calls
    documents = PackedDocuments(network.role, objective.examples, batch, 1)
    logp = forward_of(network)(tokens, positions, layout, rows).log_softmax(-1)
    dist = objective.distributions
    terms = []
    for row, student in zip(rows.tolist(), logp, strict=True):
        at = documents.source_RT.flatten()[row]
        p = torch.cat([dist.logp_PK[at].exp(), dist.tail_P[at : at + 1].exp()])
        q = torch.cat([student[dist.ids_PK[at]].exp(), (1 - student[dist.ids_PK[at]].exp().sum())[None]])
        terms.append((p * (p.log() - q.log())).sum())
    assert_close(loss.parts["distillation"], torch.stack(terms).mean(), atol=1e-4, rtol=1e-4)
    target = forward_of(network)(later_tokens, positions, layout, later_rows).log_softmax(-1)
    mine = {row: values for row, values in zip(rows.tolist(), logp, strict=True)}
    pairs = [(t.exp() * (t - mine[row])).sum() for row, t in zip(later_rows.tolist(), target, strict=True)]
    assert_close(loss.parts["consistency"], torch.stack(pairs).mean(), atol=1e-4, rtol=1e-4)
    assert_close(loss.total, loss.parts["distillation"] + 0.5 * loss.parts["consistency"])


def test_cdlm_trains_references_beside_trajectories(examples):
    network = tiny_network("block_causal")
    objective, _, _ = cdlm(network, CDLMSettings(denoising=0.1), references=examples)
    assert objective.num_examples == 6
    loss = objective.loss(forward_of(network), batch_of(objective, 6, 40, range(6)), torch.Generator().manual_seed(0))
    assert set(loss.parts) == {"distillation", "consistency", "denoising"}
    assert loss.total.isfinite()


def test_consistency_alone_is_refused_unless_forced():
    with pytest.raises(FewstepError, match="collapses"):
        CDLMSettings(distillation=0, denoising=0)
    CDLMSettings(distillation=0, denoising=0, allow_unanchored=True)


def test_later_states_by_sampler():
    cut, count = torch.tensor([0, 2, 3, 0]), torch.tensor([4, 4, 4, 0])
    draw = torch.tensor([0.99, 0.5, 0.5, 0.5])
    assert later_state(cut, count, "next", draw).tolist() == [1, 3, 4, 0]
    assert later_state(cut, count, "last", draw).tolist() == [3, 3, 4, 0]
    assert later_state(cut, count, "uniform", draw).tolist() == [3, 3, 4, 0]


def test_divergences_by_hand():
    teacher, student = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert_close(losses.divergence(teacher, student), torch.tensor(forward))
    assert_close(losses.divergence(teacher, student, direction="reverse"), torch.tensor(reverse))
    stored = losses.divergence_from_top(torch.tensor([[0]]), torch.tensor([[0.75]]).log(), torch.tensor([0.25]).log(), student)
    assert_close(stored, torch.tensor(forward))
    with pytest.raises(ValueError, match="at least one position"):
        losses.divergence(teacher[:0], student[:0])


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    assert_close(losses.cross_entropy(torch.zeros(5, 7), torch.arange(5)), torch.tensor(math.log(7)))


def test_stratified_draws_cover_every_part_once():
    draws = stratified_uniform((8,), torch.Generator().manual_seed(0))
    assert sorted((draws * 8).long().tolist()) == list(range(8))
