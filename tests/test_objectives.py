"""Objectives: the packed training forward against plain unpacked ones, losses against hand-worked numbers, and the
tables and labels that the CDLM objective trains on.
"""

import math
from collections import Counter
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.packed import batch_of, forward_of, unpacked_logits
from torch.testing import assert_close

from fewstep.decode.block import Block
from fewstep.decode.diffusion import Diffusion
from fewstep.decode.loop import decode
from fewstep.decode.policies import Threshold
from fewstep.decode.requests import Record, Request
from fewstep.errors import FewstepError
from fewstep.models.load import network_hash
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.train import losses
from fewstep.train.cdlm import BlockOrders, CDLMObjective, CDLMSettings
from fewstep.train.collect import collect, decode_with, distribution_of, teacher_of
from fewstep.train.corruption import BlockCorruption, Corruption, later_state, stratified_uniform
from fewstep.train.documents import CanvasLengths, PackedDocuments
from fewstep.train.examples import Examples
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective
from fewstep.train.packing import best_fit, pack
from fewstep.train.records import PromptRow
from fewstep.train.relabel import Labelling, label, labelled, of_student
from fewstep.train.stream import PreparedStream
from fewstep.train.trajectories import TrajectoryStore, read_table
from fewstep.train.trajectory_table import TopDistributions, TrajectoryTable, join

PROMPTS = [[3, 10, 11, 4], [3, 12, 13, 14, 15, 4], [3, 9, 4]]
ANSWERS = [[20, 21, 22, 23, 24, 1], [30, 31, 1], [40, 41, 42, 43, 44, 45, 46, 47, 48, 1]]


@pytest.fixture
def examples() -> Examples:
    return Examples.from_ids(PROMPTS, ANSWERS)


def test_best_fit_takes_the_fullest_row_and_ends_at_the_first_document_without_room():
    assert best_fit(np.array([3, 8, 4, 1, 3, 1]), 2, 9).tolist() == [0, 9, 3, 17]
    assert best_fit(np.array([9, 9]), 3, 9).tolist() == [0, 9]
    with pytest.raises(ValueError, match="does not fit"):
        best_fit(np.array([10]), 1, 9)


def test_pack_names_document_segment_and_index_of_every_position():
    packed = pack(torch.tensor([0, 3, 6]), torch.tensor([[1, 2], [2, 1], [1, 1]]), 2, 6)
    assert packed.document_RT.tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, -1, -1, -1, -1]]
    assert packed.segment_RT.tolist() == [[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert packed.index_RT.tolist() == [[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("context_attention", ["bidirectional", "causal"])
def test_noisy_blocks_of_the_packed_forward_equal_unpacked_forwards(examples, context_attention):
    network = tiny_network("block_causal", context_attention=context_attention, head_scale=20)
    objective = MaskedDiffusionObjective(network.role, examples, eos_token_id=1)
    batch, calls = batch_of(objective, range(3)), []
    generator = torch.Generator().manual_seed(5)
    objective.loss(forward_of(network, calls), objective.prepare(batch, generator))
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


def test_with_shifted_logits_a_block_is_scored_from_one_row_earlier_and_its_first_position_from_a_clean_row(examples):
    network = tiny_network("block_causal", context_attention="causal", right_shift_logits=True, head_scale=20)
    objective = MaskedDiffusionObjective(network.role, examples, 1, corruption=Corruption(untouched=0.3))
    whole = 0
    for seed in range(8):
        batch, calls = batch_of(objective, range(3)), []
        loss = objective.loss(forward_of(network, calls), objective.prepare(batch, torch.Generator().manual_seed(seed)))
        tokens = calls[0][0]
        documents = PackedDocuments(network.role, examples, batch, 1)
        terms = []
        for document, prompt in enumerate(PROMPTS[i] for i in batch.examples_N):
            here = documents.packed.document_RT == document
            noisy = tokens[here & (documents.packed.segment_RT == 1)].tolist()
            clean = tokens[here & (documents.packed.segment_RT == 2)].tolist()
            for start in range(0, len(noisy), 4):
                block = noisy[start : start + 4]
                assert block[0] != 2 or block == [2] * 4, "the first position is unmasked first"
                whole += block == [2] * 4
                rows = unpacked_logits(network, prompt + clean[:start] + block, len(prompt)).log_softmax(-1)[-5:-1]
                scored = [j for j in range(4) if j == 0 or block[j] == 2]
                terms += [-rows[j, clean[start + j]] for j in scored]
        assert_close(loss.total, torch.stack(terms).mean(), atol=1e-4, rtol=1e-4)
    assert whole


def test_causal_objective_is_the_mean_next_token_loss_of_the_completions(examples):
    network = tiny_network("autoregressive", head_scale=20)
    objective = CausalObjective(network.role, examples, 1)
    loss = objective.loss(forward_of(network), objective.prepare(batch_of(objective, range(3)), torch.Generator()))
    terms = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logp = unpacked_logits(network, prompt + answer, len(prompt)).log_softmax(-1)
        terms += [-logp[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
    assert_close(loss.total, torch.stack(terms).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("canvases", "shape"),
    [(1, {}), (1, {"context_attention": "causal", "right_shift_logits": True})]
    + [(3, {"context_attention": "causal", "right_shift_logits": shift}) for shift in (False, True)],
)
def test_bidirectional_loss_equals_unpacked_forwards(examples, canvases, shape):
    network = tiny_network("bidirectional", head_scale=20, **shape)
    objective = MaskedDiffusionObjective(
        network.role,
        examples,
        1,
        canvas=CanvasLengths(block_size=4, weights=(0, 0, 1, 1)),
        corruption=Corruption(leftward=0.5, frontier=0.3, late=0.3, late_tokens=(21, 42, 43)),
        canvases=canvases,
    )
    batch, calls = batch_of(objective, range(3), num_rows=3, row_length=60), []
    loss = objective.loss(forward_of(network, calls), objective.prepare(batch, torch.Generator().manual_seed(1)))
    tokens, _, _, rows = calls[0]
    documents = PackedDocuments(network.role, examples, batch, 1, canvases=canvases)
    shift = int(network.role.right_shift_logits)
    terms, states = [], set()
    for document, prompt in enumerate(PROMPTS):
        for canvas in range(1, 1 + canvases):
            here = (documents.packed.document_RT == document) & (documents.packed.segment_RT == canvas)
            noisy, answer = tokens[here].tolist(), documents.clean_RT[here].tolist()
            states.add(tuple(noisy))
            logp = unpacked_logits(network, prompt + noisy, len(prompt)).log_softmax(-1)
            if shift:
                first = int(here.flatten().nonzero()[0])
                # The rows that score canvas positions: one earlier, for the first the context's last.
                context = ((documents.packed.document_RT == document) & (documents.packed.segment_RT == 0)).flatten()
                of_row = {first + i - 1 if i else int(context.nonzero()[-1]): i for i in range(len(noisy))}
            else:
                of_row = {int(row): i for i, row in enumerate(here.flatten().nonzero()[:, 0])}
            found = [of_row[row] for row in rows.tolist() if row in of_row]
            assert all(noisy[i] == 2 for i in found if i)
            scored_here = {i for i in found if noisy[i] == 2}
            terms += [-logp[len(prompt) + i - shift, answer[i]] for i in scored_here]
            assert set(answer[len(ANSWERS[document]) :]) <= {1}
    assert len(terms) == len(rows)
    assert len(states) == 3 * canvases
    assert_close(loss.total, torch.stack(terms).mean(), atol=1e-4, rtol=1e-4)


def test_canvases_share_a_context_only_if_it_does_not_see_them(examples):
    for shape in ({}, {"context_attention": "block_causal"}):
        with pytest.raises(FewstepError, match="share a context only"):
            MaskedDiffusionObjective(tiny_network("bidirectional", **shape).role, examples, 1, canvases=2)


def test_leftward_corruption_unmasks_earlier_blocks_masks_later_ones_and_scores_the_active_one(examples):
    network = tiny_network("bidirectional")
    objective = MaskedDiffusionObjective(
        network.role,
        examples,
        1,
        corruption=Corruption(leftward=1.0),
        canvas=CanvasLengths(block_size=4, weights=(0, 0, 1)),
    )
    batch, calls = batch_of(objective, range(3), num_rows=3, row_length=30), []
    objective.loss(forward_of(network, calls), objective.prepare(batch, torch.Generator().manual_seed(3)))
    tokens, _, _, rows = calls[0]
    documents = PackedDocuments(network.role, examples, batch, 1)
    block = documents.block_of_response().flatten()
    for document in range(3):
        here = (documents.packed.document_RT == document).flatten()
        masked = here & (tokens.flatten() == 2)
        scored = torch.zeros_like(masked)
        scored[rows] = True
        active = block[scored & here].unique()
        assert len(active) <= 1
        for later in block[here & documents.is_noisy_RT.flatten()].unique():
            inside = here & documents.is_noisy_RT.flatten() & (block == later)
            if len(active) and later > active:
                assert masked[inside].all()
            if len(active) and later < active:
                assert not masked[inside].any()


def test_visited_states_unmask_the_networks_most_confident_positions_and_score_the_rest(examples):
    network = tiny_network("bidirectional")
    objective = MaskedDiffusionObjective(
        network.role,
        examples,
        1,
        corruption=Corruption(leftward=0.8, visited=0.8),
        canvas=CanvasLengths(block_size=4, weights=(0, 0, 1)),
    )
    unmasked_counts = []
    for seed in range(20):
        batch, calls = batch_of(objective, range(3), num_rows=3, row_length=30), []
        prepared = objective.prepare(batch, torch.Generator().manual_seed(seed))
        loss = objective.loss(forward_of(network, calls), prepared)
        (before, _, _, rows), (after, _, _, same_rows) = calls
        assert rows.tolist() == same_rows.tolist()
        truth = dict(zip(prepared.unmasking.targets_S.tolist(), prepared.truth_S.tolist(), strict=True))
        logp = forward_of(network)(*prepared.inputs).log_softmax(-1).amax(-1)
        confidence = dict(zip(prepared.unmasking.targets_S.tolist(), logp.tolist(), strict=True))
        unmasked = [i for i in truth if before.flatten()[i] != after.flatten()[i]]
        assert (before != after).sum() == len(unmasked)
        assert all(after.flatten()[i] == truth[i] for i in unmasked)
        units = dict(zip(prepared.unmasking.targets_S.tolist(), prepared.unmasking.unit_S.tolist(), strict=True))
        for canvas in set(units.values()):
            mine = sorted((i for i in units if units[i] == canvas), key=lambda i: -confidence[i])
            count = sum(i in unmasked for i in mine)
            assert set(mine[:count]) == {i for i in mine if i in unmasked}
            assert count < len(mine)
            assert count == 0 or canvas < 3
        left = [k for k, i in enumerate(truth) if i not in unmasked]
        scored = forward_of(network)(*prepared.inputs._replace(tokens_RT=after)).log_softmax(-1)
        expected = -torch.stack([scored[k, prepared.truth_S[k]] for k in left]).mean()
        assert_close(loss.total, expected, atol=1e-5, rtol=1e-5)
        unmasked_counts.append(len(unmasked))
    assert sum(unmasked_counts) > 5


def test_late_tokens_are_masked_from_a_point_on_and_others_seldom():
    late = (20, 21, 22, 23, 24)
    network = tiny_network("bidirectional")
    examples = Examples.from_ids([[3, 9]], [[20, 30, 21, 31, 22, 32, 23, 33, 24, 34, 20, 35]])
    objective = MaskedDiffusionObjective(
        replace(network.role, block_size=12),
        examples,
        1,
        corruption=Corruption(leftward=1.0, late=1.0, late_tokens=late),
        canvas=CanvasLengths(block_size=12, weights=(1,)),
    )
    counts = torch.zeros(12)
    for seed in range(200):
        batch, calls = batch_of(objective, [0], num_rows=1, row_length=32), []
        objective.loss(forward_of(network, calls), objective.prepare(batch, torch.Generator().manual_seed(seed)))
        masked = calls[0][0].flatten()[2:14] == 2
        of_late = masked[0::2].tolist()
        assert of_late == sorted(of_late)
        counts += masked
    assert counts[10] > 180  # open only if the point lies in the last tenth
    assert (counts[1::2] / 200 < 0.4).all()  # a quarter is expected


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ({"leftward": 1.5}, "leftward must be at most 1, got 1.5"),
        ({"leftward": 0.5, "frontier": 0.6, "late": 0.6, "late_tokens": (7,)}, "shares of the same states"),
        ({"leftward": 0.5, "late": 0.5}, "set both or none"),
        ({"leftward": 1.0, "visited": 0.5, "weighting": "inverse_ratio"}, "no mask ratio to weight by"),
    ],
)
def test_shares_that_mean_nothing_are_refused(shares, sentence):
    with pytest.raises(FewstepError, match=sentence):
        Corruption(**shares)


@pytest.mark.parametrize(
    ("role", "shares", "sentence"),
    [
        ("bidirectional", {"frontier": 0.5}, "set leftward too"),
        ("bidirectional", {"visited": 0.5}, "set leftward too"),
        ("block_causal", {"leftward": 0.5}, "leftward states are for the role bidirectional"),
    ],
)
def test_shares_that_mean_nothing_for_a_role_are_refused(examples, role, shares, sentence):
    with pytest.raises(FewstepError, match=sentence):
        MaskedDiffusionObjective(tiny_network(role).role, examples, 1, corruption=Corruption(**shares))


def test_blocks_of_a_block_causal_network_mask_late_tokens_or_all_after_a_point():
    late = (20, 21, 22, 23, 24)
    role = replace(tiny_network("block_causal").role, block_size=6)
    examples = Examples.from_ids([[3, 9]], [[20, 30, 21, 31, 22, 32, 23, 33, 24, 34, 20, 35]])

    def masked_blocks(**shares):
        objective = MaskedDiffusionObjective(role, examples, 1, corruption=Corruption(untouched=0, **shares))
        for seed in range(100):
            batch = batch_of(objective, [0], num_rows=1, row_length=32)
            inputs = objective.prepare(batch, torch.Generator().manual_seed(seed)).inputs
            yield from (inputs.tokens_RT.flatten()[2:14] == 2).view(2, 6)

    seen = torch.stack(list(masked_blocks(late=1.0, late_tokens=late)))
    assert all(block[0::2].tolist() == sorted(block[0::2].tolist()) for block in seen)
    assert seen[:, 4].float().mean() > 0.75
    assert (seen[:, 1::2].float().mean(0) < 0.4).all()
    assert all(block.tolist() == sorted(block.tolist()) for block in masked_blocks(frontier=1.0))


def test_a_block_causal_network_goes_on_from_a_state_of_each_block(examples):
    network = tiny_network("block_causal", right_shift_logits=True)
    objective = MaskedDiffusionObjective(network.role, examples, 1, corruption=Corruption(visited=1.0))
    went_on = 0
    for seed in range(10):
        batch, calls = batch_of(objective, range(3), num_rows=3, row_length=40), []
        prepared = objective.prepare(batch, torch.Generator().manual_seed(seed))
        loss = objective.loss(forward_of(network, calls), prepared)
        documents = PackedDocuments(network.role, examples, batch, 1)
        before, after = calls[0][0], calls[1][0]
        unmasked_RT = before != after
        # All that stays masked is learned, and the settled positions in every state.
        left_S = ~unmasked_RT.flatten()[prepared.unmasking.targets_S] | prepared.unmasking.settled_S
        logp_SV = forward_of(network)(*prepared.inputs._replace(tokens_RT=after)).log_softmax(-1)
        expected_S = -logp_SV.gather(1, prepared.truth_S[:, None])[:, 0]
        assert_close(loss.total, expected_S[left_S].mean(), atol=1e-5, rtol=1e-5)
        went_on += int(unmasked_RT.sum())
        assert (documents.clean_RT[unmasked_RT] == after[unmasked_RT]).all()
        # A state that shows anything of a block shows its settled first position.
        unit_RT, _ = documents.block_units(3, torch.Generator().manual_seed(0))
        masked_RT = (after == network.role.mask_token_id) & documents.is_noisy_RT
        for unit in unit_RT[documents.is_noisy_RT].unique():
            block = (unit_RT == unit) & documents.is_noisy_RT
            assert masked_RT[block].all() or not (masked_RT & documents.settled_RT)[block].any()
            assert masked_RT[block].any() or not unmasked_RT[block].any()
    assert went_on > 10


def test_canvas_lengths_are_whole_blocks_that_hold_the_answer():
    lengths = CanvasLengths(block_size=4, weights=(1, 1, 0, 1)).draw(
        np.array([1, 4, 5, 9, 16] * 50), np.random.default_rng(0)
    )
    needed = np.array([1, 4, 5, 9, 16] * 50)
    assert (lengths >= needed).all()
    assert set(lengths) == {4, 8, 16}
    with pytest.raises(FewstepError, match="exceeds the longest canvas"):
        CanvasLengths(block_size=4, weights=(1.0,)).draw(np.array([5]), np.random.default_rng(0))


def test_block_orders_sort_within_blocks_count_recorded_positions_and_keep_passes_together():
    ranks = np.array([3, 1, 3, 0, 5, 6, 4])
    orders = BlockOrders.of(np.array([0, 5, 7]), ranks, block_size=4)
    biggest = np.iinfo(np.int32).max
    assert orders.rank_P.tolist() == [1, 3, 3, biggest, 5, 4, 6]
    assert orders.after_P.tolist() == [1, 3, 3, 4, 1, 1, 2]
    assert orders.count_P.tolist() == [3, 3, 3, 3, 1, 2, 2]


def test_positions_of_one_pass_open_together_and_a_later_state_is_another_one():
    """Ranks as a student leaves them, several tokens a pass: the states are those before each pass, and no others."""
    network = tiny_network("block_causal")
    ranks = [1, 3, 1, 1, 4, 4, 4, 5]
    table = TrajectoryTable(
        Examples.from_ids([[3, 9, 4]], [[20, 21, 22, 23, 24, 25, 26, 27]]), torch.tensor(ranks), None
    )
    objective = CDLMObjective(network.role, table, 1, settings=CDLMSettings(direction="hard", denoising=0))
    seen: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    for seed in range(300):
        batch, calls = batch_of(objective, [0], num_rows=1, row_length=32), []
        objective.loss(forward_of(network, calls), objective.prepare(batch, torch.Generator().manual_seed(seed)))
        now, later = (call[0][0, 3:11].tolist() for call in calls)
        for block in range(2):
            inside = range(4 * block, 4 * block + 4)
            masked, masked_later = (sum(tokens[i] == 2 for i in inside) for tokens in (now, later))
            seen[block][masked, masked_later] += 1
    # (masked now, masked in y*): three of four draws name the pass that finalises three tokens.
    assert seen[0].keys() == seen[1].keys() == {(4, 1), (1, 0)}
    assert all(0.7 < block[4, 1] / 300 < 0.8 for block in seen)


def cdlm(network, settings, *, references=None, distributions=True, corruption=None):
    rng = np.random.default_rng(0)
    finals = [[20, 21, 22, 23, 24, 1], [30, 31, 1], [40, 41, 42, 43, 44, 45, 46, 47, 48, 1]]
    ranks = [[2, 1, 4, 3, 6, 5], [3, 1, 2], [4, 3, 2, 1, 5, 6, 7, 8, 10, 9]]
    table_examples = Examples.from_ids(PROMPTS, finals)
    count = sum(map(len, finals))
    top = torch.from_numpy(np.stack([rng.permutation(50)[:3] for _ in range(count)]))
    probability = torch.tensor([0.6, 0.2, 0.1])
    dist = TopDistributions(top, probability.log().expand(count, 3), torch.full((count,), math.log(0.1)))
    table = TrajectoryTable(
        table_examples, torch.tensor([rank for document in ranks for rank in document]), dist if distributions else None
    )
    objective = CDLMObjective(network.role, table, 1, references=references, settings=settings, corruption=corruption)
    return objective, finals, ranks


def test_cdlm_states_are_prefixes_of_each_blocks_own_order_and_y_star_is_later():
    network = tiny_network("block_causal")
    objective, finals, ranks = cdlm(network, CDLMSettings(denoising=0.0))
    for seed in range(20):
        batch, calls = batch_of(objective, range(3)), []
        objective.loss(forward_of(network, calls), objective.prepare(batch, torch.Generator().manual_seed(seed)))
        documents = PackedDocuments(network.role, objective.examples, batch, 1)
        (tokens, *_), (later_tokens, *_) = calls
        for document, final in enumerate(finals):
            noisy = documents.is_noisy_RT & (documents.packed.document_RT == document)
            now, later = tokens[noisy].tolist(), later_tokens[noisy].tolist()
            for start in range(0, len(final), 4):
                block = list(range(start, min(start + 4, len(final))))
                by_rank = sorted(block, key=lambda i: ranks[document][i])
                unmasked = [i for i in by_rank if now[i] != 2]
                unmasked_later = [i for i in by_rank if later[i] != 2]
                assert unmasked == by_rank[: len(unmasked)]
                assert unmasked_later == by_rank[: len(unmasked_later)]
                assert len(unmasked) < len(unmasked_later)
                assert len(unmasked) < len(block)
                assert all(now[i] == final[i] for i in unmasked)


def test_cdlm_states_with_shifted_logits_open_a_blocks_first_position_first():
    network = tiny_network("block_causal", context_attention="causal", right_shift_logits=True)
    objective, finals, _ = cdlm(network, CDLMSettings(denoising=0.0))
    unmasked_early = 0
    for seed in range(20):
        batch, calls = batch_of(objective, range(3)), []
        objective.loss(forward_of(network, calls), objective.prepare(batch, torch.Generator().manual_seed(seed)))
        documents = PackedDocuments(network.role, objective.examples, batch, 1)
        for tokens, *_ in calls:
            for document, final in enumerate(finals[i] for i in batch.examples_N):
                noisy = tokens[documents.is_noisy_RT & (documents.packed.document_RT == document)].tolist()
                for start in range(0, len(final), 4):
                    block = noisy[start : min(start + 4, len(final))]
                    assert block[0] != 2 or set(block) == {2}
                    unmasked_early += block[0] != 2 and set(block[1:]) == {2}
    assert unmasked_early, "states in which the first position is unmasked although the teacher took it later"


def test_cdlm_losses_equal_plain_sums():
    network = tiny_network("block_causal", head_scale=20)
    settings = CDLMSettings(distillation=1.0, consistency=0.5, denoising=0.0)
    objective, _, _ = cdlm(network, settings)
    batch, calls = batch_of(objective, range(3)), []
    loss = objective.loss(forward_of(network, calls), objective.prepare(batch, torch.Generator().manual_seed(7)))
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
    mine = dict(zip(rows.tolist(), logp, strict=True))
    pairs = [(t.exp() * (t - mine[row])).sum() for row, t in zip(later_rows.tolist(), target, strict=True)]
    assert_close(loss.parts["consistency"], torch.stack(pairs).mean(), atol=1e-4, rtol=1e-4)
    assert_close(loss.total, loss.parts["distillation"] + 0.5 * loss.parts["consistency"])


def test_cdlm_trains_references_beside_trajectories(examples):
    network = tiny_network("block_causal")
    objective, _, _ = cdlm(network, CDLMSettings(denoising=0.1), references=examples)
    assert objective.num_examples == 6
    loss = objective.loss(
        forward_of(network),
        objective.prepare(batch_of(objective, range(6), num_rows=6, row_length=40), torch.Generator().manual_seed(0)),
    )
    assert set(loss.parts) == {"distillation", "consistency", "denoising"}
    assert loss.total.isfinite()


def test_in_cdlm_references_go_on_by_themselves_and_trajectories_stay_as_they_are(examples):
    network = tiny_network("block_causal")
    settings = CDLMSettings(denoising=1.0, consistency=0.5)
    objective, _, _ = cdlm(network, settings, references=examples, corruption=BlockCorruption(visited=1.0))
    batch, calls = batch_of(objective, range(6), num_rows=6, row_length=40), []
    prepared = objective.prepare(batch, torch.Generator().manual_seed(1))
    loss = objective.loss(forward_of(network, calls), prepared)
    (before, _, _, _), (after, _, _, _), _ = calls
    documents = PackedDocuments(network.role, objective.examples, batch, 1)
    unmasked_RT = before != after
    assert unmasked_RT.any()
    assert (batch.examples_N[documents.document_RT[unmasked_RT]] >= objective.num_trajectories).all()
    logp = forward_of(network)(*prepared.inputs._replace(tokens_RT=after)).log_softmax(-1)
    unmasked_rows = set(unmasked_RT.flatten().nonzero()[:, 0].tolist())
    left = [i for i in prepared.denoised.tolist() if prepared.unmasking.targets_S[i].item() not in unmasked_rows]
    assert_close(loss.parts["denoising"], -torch.stack([logp[i, prepared.truth_S[i]] for i in left]).mean())


def test_untouched_blocks_of_trajectories_and_of_references_are_counted_apart(examples):
    network = tiny_network("block_causal")
    for of_trajectories, of_references in ((1.0, 0.0), (0.0, 1.0)):
        settings = CDLMSettings(denoising=1.0, consistency=0.0, untouched=of_trajectories)
        corruption = BlockCorruption(untouched=of_references)
        objective, _, _ = cdlm(network, settings, references=examples, corruption=corruption)
        batch = batch_of(objective, range(6), num_rows=6, row_length=40)
        documents = PackedDocuments(network.role, objective.examples, batch, 1)
        reference_RT = batch.examples_N[documents.document_RT] >= objective.num_trajectories
        whole = {True: [], False: []}
        for seed in range(5):
            tokens_RT = objective.prepare(batch, torch.Generator().manual_seed(seed)).inputs.tokens_RT
            masked_RT = (tokens_RT == network.role.mask_token_id)[documents.is_noisy_RT]
            for reference in (True, False):
                whole[reference].append(masked_RT[reference_RT[documents.is_noisy_RT] == reference].all().item())
        assert all(whole[True]) == bool(of_references)
        assert all(whole[False]) == bool(of_trajectories)


def test_consistency_alone_is_refused_unless_forced():
    with pytest.raises(FewstepError, match="may collapse"):
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
    stored = losses.divergence_from_top(
        torch.tensor([[0]]), torch.tensor([[0.75]]).log(), torch.tensor([0.25]).log(), student
    )
    assert_close(stored, torch.tensor(forward))
    with pytest.raises(ValueError, match="at least one position"):
        losses.divergence(teacher[:0], student[:0])


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    assert_close(losses.cross_entropy(torch.zeros(5, 7), torch.arange(5)), torch.tensor(math.log(7)))


def test_stratified_draws_cover_every_part_once():
    draws = stratified_uniform((8,), torch.Generator().manual_seed(0))
    assert sorted((draws * 8).long().tolist()) == list(range(8))


# Awkward values in losses


def student_logits(count: int, vocab_size: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed))


def stored(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the collector stores a distribution: float16, the tail formed as 1 - sum in float32."""
    best = logits.log_softmax(-1).topk(width)
    tail = (1 - best.values.exp().sum(-1)).clamp(min=0).log().clamp_min(-65504)
    return best.indices, best.values.half(), tail.half()


@pytest.mark.parametrize("scale", [1.0, 5.0, 30.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_stored_distribution_costs_nothing_against_itself(scale, direction):
    logits = student_logits(50, 100, scale)
    loss = losses.divergence_from_top(*stored(logits, 8), logits, direction=direction)
    assert 0 <= loss < 2e-5


def test_a_stored_distribution_approaches_the_full_divergence_from_below():
    teacher, student = student_logits(20, 100, 4.0).double(), student_logits(20, 100, 4.0, seed=1)
    exact = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.double().log_softmax(-1))).sum(-1).mean()
    found = [float(losses.divergence_from_top(*stored(teacher.float(), width), student)) for width in (1, 4, 16, 100)]
    assert found == sorted(found)
    assert found[0] < exact
    assert_close(torch.tensor(found[-1]).double(), exact, atol=2e-3, rtol=1e-3)


def test_the_tail_of_a_sure_student_keeps_its_digits_and_its_gradient():
    """A tail of e-30, far below what 1 - sum resolves in float32, against a teacher that gives it a quarter."""
    student = torch.tensor([[30.0, 0.0, -100.0]], requires_grad=True)
    top_logp, tail = torch.tensor([[0.75]]).log(), torch.tensor([0.25]).log()
    loss = losses.divergence_from_top(torch.tensor([[0]]), top_logp, tail, student)
    assert_close(loss, torch.tensor(0.75 * math.log(0.75) + 0.25 * (math.log(0.25) + 30)))
    loss.backward()
    assert_close(student.grad, torch.tensor([[0.25, -0.25, 0.0]]))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_an_empty_tail_is_finite_in_both_directions(direction):
    """A teacher all of whose mass is stored (log tail -65504), and a student who puts half of his elsewhere."""
    student = torch.zeros(1, 2, requires_grad=True)
    loss = losses.divergence_from_top(
        torch.tensor([[0]]), torch.zeros(1, 1), torch.tensor([-65504.0]).half(), student, direction=direction
    )
    expected = math.log(2) if direction == "forward" else 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 24 * math.log(2))
    assert_close(loss, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("who", ["teacher", "student", "both"])
def test_a_token_that_one_rules_out_is_ruled_out_for_both(who, direction):
    """The mask token at -inf gives no NaN: the divergence is that of the other tokens alone."""
    teacher, student = student_logits(3, 6), student_logits(3, 6, seed=1)
    expected = losses.divergence(teacher[:, :5], student[:, :5], direction=direction)
    if who != "student":
        teacher[:, 5] = -math.inf
    if who != "teacher":
        student[:, 5] = -math.inf
    student.requires_grad_()
    loss = losses.divergence(teacher, student, direction=direction)
    assert_close(loss, expected)
    loss.backward()
    assert student.grad.isfinite().all()
    assert (student.grad[:, 5] == 0).all()


def test_temperature_softens_both_and_scales_by_its_square():
    teacher, student = student_logits(4, 9), student_logits(4, 9, seed=1)
    softened = losses.divergence(teacher / 2, student / 2)
    assert_close(losses.divergence(teacher, student, temperature=2.0), 4 * softened)


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="unknown direction 'sideways'"):
        losses.divergence(torch.zeros(1, 2), torch.zeros(1, 2), direction="sideways")


def test_a_batch_with_nothing_to_score_costs_nothing_and_has_a_gradient():
    network = tiny_network("block_causal")
    objective, *_ = cdlm(network, CDLMSettings(denoising=0.1), references=Examples.from_ids(PROMPTS, ANSWERS))
    objective.rank_P.zero_()
    objective.orders.count_P.zero_()
    loss = objective.loss(
        forward_of(network), objective.prepare(batch_of(objective, range(3)), torch.Generator().manual_seed(0))
    )
    assert {name: float(part) for name, part in loss.parts.items()} == dict.fromkeys(
        ("distillation", "denoising", "consistency"), 0.0
    )
    loss.total.backward()


# From stored trajectories to the objective


def rows_of(prompts: list[list[int]], references: bool = True) -> list[PromptRow]:
    return [
        PromptRow(str(i), prompt, [*range(20, 23 + i), 1] if references and i != 1 else None)
        for i, prompt in enumerate(prompts)
    ]


def collected(folder, network: Network, kind="top_k", *, decoder=None, seeds=(), **changes) -> None:
    distribution = distribution_of(network, kind, top_k=5)
    decoder = decoder or Diffusion(role=network.role, block_size=4, canvas_length=12)
    decode_rows = decode_with(network, decoder, max_new_tokens=10, batch_size=2, distribution=distribution)
    collect(
        decode_rows,
        rows_of(PROMPTS),
        folder,
        teacher=teacher_of(network),
        settings={},
        distribution=distribution,
        **changes,
    )


@pytest.mark.parametrize("kind", ["top_k", "hidden"])
def test_a_table_is_what_the_teacher_did_and_said(kind, tmp_path):
    teacher = tiny_network("bidirectional", head_scale=20)
    collected(tmp_path / "store", teacher, kind)
    table, references = read_table(tmp_path / "store", teacher)
    student = tiny_network("block_causal", head_scale=20)
    objective = CDLMObjective(student.role, table, 1, references=references)
    assert references is not None
    assert len(references) == 2
    assert references.lengths().tolist() == [[4, 4], [3, 6]]
    decoder = Diffusion(role=teacher.role, block_size=4, canvas_length=12)
    requests = [Request(prompt_ids=prompt, max_new_tokens=10) for prompt in PROMPTS]
    outputs = decode(teacher, requests, decoder, record=Record(hidden=True))
    steps = [output.step_G[: (output.step_G > 0).nonzero().max() + 1] for output in outputs]
    assert table.rank_P.tolist() == torch.cat(steps).clamp_min(0).tolist()
    recorded = (table.rank_P > 0).nonzero()[:, 0]
    hidden = torch.cat([output.hidden_GD[output.step_G > 0] for output in outputs])
    exact = teacher.head(hidden).log_softmax(-1)
    assert table.distributions is not None
    uniform = torch.zeros(len(recorded), 64)
    uniform[:, 2] = -math.inf
    stored = table.distributions.at(recorded)
    found = stored.divergence(uniform, "forward")
    if kind == "hidden":
        entropy_gap = (exact.exp() * (exact.clamp_min(-99) + math.log(63))).sum(-1).mean()
        assert_close(found, entropy_gap, atol=2e-2, rtol=1e-2)
        assert_close(stored.divergence(exact, "reverse"), torch.tensor(0.0), atol=1e-2, rtol=0)
    else:
        assert found > 0
        assert_close(stored.divergence(exact, "forward"), torch.tensor(0.0), atol=1e-4, rtol=0)
    loss = objective.loss(
        forward_of(student),
        objective.prepare(batch_of(objective, range(5), num_rows=4, row_length=60), torch.Generator().manual_seed(1)),
    )
    assert loss.total.isfinite()


def test_trajectories_of_another_teacher_are_refused(tmp_path):
    collected(tmp_path / "store", tiny_network("bidirectional"))
    with pytest.raises(FewstepError, match="made by another teacher"):
        read_table(tmp_path / "store", tiny_network("bidirectional", seed=1))


def test_given_positions_are_open_from_the_start_and_unfinished_ones_never():
    network = tiny_network("block_causal")
    table = TrajectoryTable(Examples.from_ids([[3, 9, 4]], [[20, 21, 2, 23]]), torch.tensor([0, 2, 0, 1]), None)
    objective = CDLMObjective(network.role, table, 1, settings=CDLMSettings(direction="hard", denoising=0))
    seen = set()
    for seed in range(10):
        batch, calls = batch_of(objective, [0], num_rows=1, row_length=16), []
        objective.loss(forward_of(network, calls), objective.prepare(batch, torch.Generator().manual_seed(seed)))
        seen.add((tuple(calls[0][0][0, 3:7].tolist()), tuple((calls[0][3] - 3).tolist())))
    assert seen == {((20, 2, 2, 2), (1, 3)), ((20, 2, 2, 23), (1,))}


# The student's own states


def plain_labels(teacher: Network, prompt, final, steps, canvas_length) -> dict[int, torch.Tensor]:
    """Position -> the teacher's log-probabilities at the state before the pass that finalised it, one by one."""
    labels = {}
    for number in sorted({step for step in steps if step > 0}):
        state = [token if 0 <= step < number else 2 for token, step in zip(final, steps, strict=True)]
        state = (state + [2] * canvas_length)[:canvas_length]
        logits = unpacked_logits(teacher, prompt + state, len(prompt)).clone()
        if teacher.role.right_shift_logits:
            logits = logits.roll(1, 0)
        logits[:, 2] = -math.inf
        for position, step in enumerate(steps):
            if step == number:
                labels[position] = logits[len(prompt) + position].log_softmax(-1)
    return labels


@pytest.mark.parametrize(
    ("kind", "tokens_per_forward", "shift"),
    [("top_k", 1, False), ("top_k", 64, False), ("top_k", 10_000, False), ("hidden", 64, False), ("top_k", 64, True)],
)
def test_labels_are_the_teachers_at_the_states_that_the_student_visited(kind, tokens_per_forward, shift):
    teacher = tiny_network("bidirectional", head_scale=20, context_attention="causal", seed=1)
    teacher.role = replace(teacher.role, right_shift_logits=shift)
    student = tiny_network("block_causal", head_scale=20, context_attention="causal")
    decoder = Block(role=student.role, policy=Threshold(at_least=0.2))
    outputs = decode(student, [Request(prompt_ids=prompt, max_new_tokens=10) for prompt in PROMPTS], decoder)
    assert any((output.step_G.bincount(minlength=2)[1:] > 1).any() for output in outputs if (output.step_G >= 0).all())
    labelling = Labelling(
        distribution=distribution_of(teacher, kind, top_k=5), canvas_length=20, tokens_per_forward=tokens_per_forward
    )
    for prompt, before, after in zip(PROMPTS, outputs, label(teacher, PROMPTS, outputs, labelling), strict=True):
        assert after.canvas_ids_G.equal(before.canvas_ids_G)
        labels = plain_labels(teacher, prompt, before.canvas_ids_G.tolist(), before.step_G.tolist(), 20)
        assert labels
        for position, expected in labels.items():
            if kind == "hidden":
                found = teacher.head(after.hidden_GD[position].float()).log_softmax(-1)
                assert_close(found, expected, atol=5e-2, rtol=1e-2)
            else:
                best = expected.topk(5)
                assert after.top_k.ids_GK[position].tolist() == best.indices.tolist()
                assert_close(after.top_k.log_probs_GK[position], best.values, atol=1e-4, rtol=1e-4)
                rest = (1 - best.values.exp().sum()).clamp(min=0)
                assert_close(after.top_k.tail_mass_G[position], rest, atol=1e-5, rtol=0)


def test_a_relabelled_store_trains_the_student_and_names_both(tmp_path):
    teacher = tiny_network("bidirectional", head_scale=20, seed=1)
    student = tiny_network("block_causal", head_scale=20)
    decoder = Block(role=student.role, policy=Threshold(at_least=0.2))
    collected(tmp_path / "visited", student, decoder=decoder, shard_size=2)
    labelling = Labelling(distribution=distribution_of(teacher, top_k=5), canvas_length=16)
    both = labelled(
        decode_with(student, decoder, max_new_tokens=10, batch_size=2, distribution=distribution_of(student, top_k=5)),
        teacher,
        labelling,
    )
    report = collect(
        both,
        rows_of(PROMPTS),
        tmp_path / "labelled",
        teacher=teacher_of(teacher),
        settings=of_student(student),
        distribution=labelling.distribution,
    )
    assert report.num_records == 3
    visited, labelled_store = TrajectoryStore(tmp_path / "visited"), TrajectoryStore(tmp_path / "labelled")
    assert labelled_store.manifest["teacher_hash"] == network_hash(teacher)
    assert labelled_store.manifest["decoding"]["states_of"] == network_hash(student)
    for before, after in zip(visited, labelled_store, strict=True):
        assert before.final_ids.tolist() == after.final_ids.tolist()
        assert before.step_rank.tolist() == after.step_rank.tolist()
        assert before.num_forwards == after.num_forwards
    table, references = read_table(tmp_path / "labelled", teacher)
    assert table.of_student
    objective = CDLMObjective(student.role, table, 1, references=references)
    loss = objective.loss(
        forward_of(student),
        objective.prepare(batch_of(objective, range(5), num_rows=4, row_length=60), torch.Generator().manual_seed(0)),
    )
    assert loss.total.isfinite()
    with pytest.raises(FewstepError, match="direction hard would teach the student its own tokens"):
        CDLMObjective(student.role, table, 1, settings=CDLMSettings(direction="hard", denoising=0))


def test_a_canvas_that_does_not_fit_is_refused():
    teacher, student = tiny_network("bidirectional", max_positions=24), tiny_network("block_causal")
    outputs = decode(student, [Request(prompt_ids=PROMPTS[0], max_new_tokens=10)], Block(role=student.role))
    for canvas_length, sentence in ((4, "longer than the teacher's canvas of 4"), (40, "exceed the 24 positions")):
        labelling = Labelling(distribution=distribution_of(teacher, top_k=5), canvas_length=canvas_length)
        with pytest.raises(FewstepError, match=sentence):
            label(teacher, PROMPTS[:1], outputs, labelling)


def test_batches_prepared_ahead_are_those_prepared_when_asked_for(examples):
    network = tiny_network("bidirectional")

    def stream(ahead: int) -> PreparedStream:
        objective = MaskedDiffusionObjective(network.role, examples, 1)
        return PreparedStream(
            objective, rows=1, row_length=64, seed=3, process=(0, 1), device=torch.device("cpu"), ahead=ahead
        )

    plain, states = stream(0), []
    expected = []
    for _ in range(7):
        states.append(plain.state_dict())
        expected.append(plain.next())
    with closing(stream(2)) as early:
        for state, scored in zip(states, expected, strict=True):
            assert early.state_dict() == state
            assert_close(early.next().inputs.tokens_RT, scored.inputs.tokens_RT)
        assert early.num_tokens == plain.num_tokens
    with closing(stream(2)) as continued:
        continued.load_state_dict(states[4])
        for scored in expected[4:]:
            assert_close(continued.next().inputs.tokens_RT, scored.inputs.tokens_RT)


def test_a_document_too_long_for_a_row_is_reported_from_the_thread_too(examples):
    objective = MaskedDiffusionObjective(tiny_network("bidirectional").role, examples, 1)
    stream = PreparedStream(
        objective, rows=1, row_length=8, seed=0, process=(0, 1), device=torch.device("cpu"), ahead=1
    )
    with closing(stream), pytest.raises(FewstepError, match="use longer rows"):
        stream.next()


def test_only_trajectories_with_as_many_top_tokens_are_joined():
    def table(top_k: int) -> TrajectoryTable:
        dist = TopDistributions(torch.zeros(3, top_k, dtype=torch.long), torch.zeros(3, top_k), torch.zeros(3))
        return TrajectoryTable(Examples.from_ids([[5]], [[6, 7, 1]]), torch.tensor([2, 1, 3]), dist)

    joined = join(table(2), table(2))
    assert joined.examples.completion_offsets.tolist() == [0, 3, 6]
    assert joined.rank_P.tolist() == [2, 1, 3, 2, 1, 3]
    with pytest.raises(FewstepError, match="the top 2 tokens of a position cannot be joined with others that have 3"):
        join(table(2), table(3))
