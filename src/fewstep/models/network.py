"""A stock causal-LM module from transformers, played in a role.

Axes: R = requests, Q = rows of a forward, S = scored rows, D = hidden width, V = vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fewstep.errors import FewstepError
from fewstep.models.architectures import LongRope, adjust_logits, examine, within_sliding_window
from fewstep.models.cache import KVCache
from fewstep.models.masks import added_to_scores, cached_mask, show_tree
from fewstep.models.noise_conditioning import attach
from fewstep.models.roles import INVISIBLE, Role
from fewstep.models.vocabulary import ids_without_token, token_ids

if TYPE_CHECKING:
    from fewstep.models.calibration import Calibration
    from fewstep.models.gated import GatedAdapter


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, arXiv 2207.12598: the same rows once more, what they answer masked in `tokens_RQ`.

    The logits are u + (1 + scale) (c - u), from c with the condition and u without; LLaDA calls it `cfg_scale`.
    """

    tokens_RQ: Tensor
    scale: float


@dataclass(frozen=True)
class Plan:
    """What a decoder wants scored in one forward; every `kind` has fixed shapes, so that each is one capturable graph.

    `tokens_RQ`, `positions_RQ`, `blocks_RQ`: the rows. `slots_RQ`: cache slot of each row's key and value (the scratch
    slot for inert rows); None for an uncached forward. `scored_RS`: indices into Q of the rows that stand at the
    positions to be scored (diffusion), neighbours from left to right, or whose next token is wanted (causal).
    `guidance`: for uncached forwards only; its rows join the same forward. `tree_TT`, boolean: the last T rows of a
    cached forward are guesses that branch, and row t also sees the rows marked in its line. No other row sees them, nor
    does a later forward. `network`: whose forward it is, "target" or "draft". `context_length_R`: of cached forwards.
    `adapted_RQ`, boolean: the rows to which the network's gated adapter applies; None for a forward of the base alone.
    """

    kind: str
    tokens_RQ: Tensor
    positions_RQ: Tensor
    blocks_RQ: Tensor
    slots_RQ: Tensor | None
    scored_RS: Tensor
    network: str = "target"
    guidance: Guidance | None = None
    tree_TT: Tensor | None = None
    context_length_R: Tensor | None = None
    adapted_RQ: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """`logits_RSV` in float32, what is never drawn at -inf; `hidden_RSD` the rows after the final norm that gave them.

    `settled_RS` marks positions whose row does not see their own block, so that no later pass scores them differently;
    None if there are none. With shifted logits this is the first position of a block.
    """

    logits_RSV: Tensor
    hidden_RSD: Tensor
    settled_RS: Tensor | None = None


class Network:
    """Weights, role and tokenizer, perhaps with a gated `adapter` in the weights. Nothing here decides what to decode.

    `never_drawn`: ids at -inf in all logits, which are the mask token and the rows of the head that no token has.
    `calibration`: what the checkpoint promises of its threshold, set when it is loaded as it is.
    `quantized`: the kind of its weights, if they were rounded when it was loaded.
    `may_round`: nobody asked for these numbers, so that an engine may compute in coarser ones.
    `base`: the network without the adapter, whose parameters this one shares; None if it has none.
    `end_of_tokens`: rows of the head up to the last that a token has. `most_recorded`: tokens of a whole distribution,
    all rows, or without those never drawn where some stand for no token.
    """

    cache_kind: ClassVar[type[KVCache]] = KVCache

    def __init__(
        self,
        module: PreTrainedModel,
        role: Role,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "model",
        adapter: "GatedAdapter | None" = None,
    ) -> None:
        self.module = module.eval()
        self.role = role
        self.tokenizer = tokenizer
        self.name = name
        self.adapter = adapter
        self.calibration: Calibration | None = None
        self.may_round = False
        self.quantized: str | None = None
        self.base: Network | None = None
        self.architecture = examine(module, name)
        self.vocab_size: int = module.config.vocab_size
        self._check()
        pad = tokenizer.pad_token_id
        # A pad token that was added has no row; what stands in its place is never looked at.
        self.pad_token_id: int = self.eos_token_id if pad is None or not 0 <= pad < self.vocab_size else pad
        without_token = ids_without_token(tokenizer, self.vocab_size)
        masked = {role.mask_token_id} - {None}
        self.never_drawn = torch.tensor(sorted(masked.union(without_token)), dtype=torch.long, device=self.device)
        self.most_recorded = self.vocab_size - (len(self.never_drawn) if without_token else 0)
        self.end_of_tokens = 1 + max(set(range(self.vocab_size)).difference(without_token), default=-1)
        if role.embedding_space is not None:
            assert role.mask_token_id is not None
            part = attach(module, role.embedding_space, role.mask_token_id, shifted=role.right_shift_logits)
            part.rule_out(self.never_drawn, self.vocab_size)

    def _check(self) -> None:
        """FewstepError for special tokens without a row, and for what is defined for causal attention alone in another
        role.
        """
        mask, vocab_size = self.role.mask_token_id, self.vocab_size
        if mask is not None and not 0 <= mask < vocab_size:
            raise FewstepError(f"{self.name}: mask_token_id {mask} is outside the vocabulary of {vocab_size} tokens")
        if self.tokenizer.eos_token_id is None:
            raise FewstepError(
                f"{self.name}: the tokenizer has no end-of-text token; set eos_token in its configuration"
            )
        self.check_ids([self.tokenizer.eos_token_id])
        if self.role.name == "autoregressive":
            return
        if self.architecture.sliding_window is not None:
            raise FewstepError(
                f"{self.name} has layers with a sliding window of {self.architecture.sliding_window} positions, which "
                f"is defined for the role autoregressive, not for {self.role.name}; choose a model without one"
            )
        if self.architecture.long_from is not None:
            raise FewstepError(
                f"{self.name} has rotary factors that depend on how far a text has been written (longrope), which is "
                f"defined for the role autoregressive, not for {self.role.name}; choose a model without them"
            )

    def check_ids(self, ids: Iterable[int]) -> None:
        """FewstepError naming the first token that has no row in the network's embeddings."""
        outside = next((one for one in ids if not 0 <= one < self.vocab_size), None)
        if outside is not None and not 0 <= outside < len(self.tokenizer):
            raise FewstepError(
                f"{self.name} has embeddings for {self.vocab_size} tokens, and none for the id {outside}, which is no "
                "token of its tokenizer either"
            )
        if outside is not None:
            raise FewstepError(
                f"{self.name} has embeddings for {self.vocab_size} tokens, and none for the token "
                f"{self.tokenizer.convert_ids_to_tokens(outside)!r} with the id {outside} of its tokenizer, which has "
                f"{len(self.tokenizer)} tokens; load the tokenizer that the weights were trained with, or resize them"
            )

    def with_role(self, role: Role) -> "Network":
        """The same weights and tokenizer in another role."""
        network = Network(self.module, role, self.tokenizer, name=self.name, adapter=self.adapter)
        network.may_round = self.may_round
        return network

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def max_positions(self) -> int:
        return self.module.config.max_position_embeddings

    @property
    def attention_dtype(self) -> torch.dtype:
        """The numbers of attention and of the KV cache."""
        return self.dtype

    @property
    def eos_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: `eos_token_id`, then those of the module's settings that the head has."""
        named = token_ids((self.module.generation_config or self.module.config).eos_token_id, "eos_token_id")
        ends = dict.fromkeys([self.tokenizer.eos_token_id, *(one for one in named if 0 <= one < self.vocab_size)])
        return tuple(one for one in ends if one != self.role.mask_token_id)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    def new_cache(self, num_requests: int, length: int) -> KVCache:
        """An empty cache for positions 0 .. length - 1 of each request."""
        kind = self.cache_kind
        return kind(self.module.config, num_requests, length, device=self.device, dtype=self.attention_dtype)

    def hidden(self, plan: Plan, cache: KVCache | None = None) -> Tensor:
        """Run the backbone: rows after the final norm, [R, Q, D]."""
        if plan.slots_RQ is not None:
            if cache is None:
                raise ValueError(f"a plan of kind {plan.kind!r} writes to a cache, and none was given")
            cache.place(plan.slots_RQ, plan.blocks_RQ if plan.tree_TT is None else _lasting_blocks(plan, plan.tree_TT))
        whole, sliding_window = self._mask(plan, cache, None), self.architecture.sliding_window
        sliding = None if sliding_window is None else self._mask(plan, cache, sliding_window)
        rotary = self.module.base_model.rotary_emb
        if isinstance(rotary, LongRope):
            rotary.context_length_R = plan.context_length_R
        rows = {
            "attention_mask": self.architecture.attention_mask(whole, sliding),
            "position_ids": plan.positions_RQ,
            "past_key_values": cache if plan.slots_RQ is not None else None,
            "use_cache": plan.slots_RQ is not None,
        }
        if plan.adapted_RQ is None:
            return self._backbone(input_ids=plan.tokens_RQ, **rows)
        if self.adapter is None:
            raise ValueError(f"a plan of kind {plan.kind!r} has adapted rows, and {self.name} has no gated adapter")
        embedded_RQD = self.adapter.embed(plan.tokens_RQ, plan.adapted_RQ)
        with self.adapter.open_for(plan.adapted_RQ):
            return self._backbone(inputs_embeds=embedded_RQD, **rows)

    def hidden_of(self, embedded_RQD: Tensor, positions_RQ: Tensor, blocks_RQ: Tensor, cache: KVCache) -> Tensor:
        """The same of rows that are embedded already, whose places in the cache are announced (`KVCache.place`)."""
        mask = added_to_scores(cached_mask(blocks_RQ, cache.blocks_RK), cache.keys.dtype)
        return self._backbone(
            inputs_embeds=embedded_RQD,
            attention_mask=self.architecture.attention_mask(mask, None),
            position_ids=positions_RQ,
            past_key_values=cache,
            use_cache=True,
        )

    def _backbone(self, **rows: Any) -> Tensor:
        """The stock module's rows after the final norm; an engine has a forward of its own here."""
        return self.module.base_model(**rows).last_hidden_state

    def _mask(self, plan: Plan, cache: KVCache | None, sliding_window: int | None) -> Tensor:
        """What attention adds to its scores, [R, 1, Q, K]: given as numbers, it is not converted in every layer."""
        cached = plan.slots_RQ is not None
        mask = cached_mask(plan.blocks_RQ, plan.blocks_RQ if cache is None or not cached else cache.blocks_RK)
        tree_TT = plan.tree_TT
        if sliding_window is not None:
            positions_RQ = plan.positions_RQ
            # Slot p holds position p, but for the guesses of a tree, which are shown below.
            slots_1K = torch.arange(mask.shape[-1], device=mask.device)[None]
            mask &= within_sliding_window(positions_RQ, slots_1K if cached else positions_RQ, sliding_window)
            if tree_TT is not None:
                guessed_RT = positions_RQ[:, -len(tree_TT) :]
                tree_TT = tree_TT & within_sliding_window(guessed_RT, guessed_RT, sliding_window)[:, 0]
        if tree_TT is not None and plan.slots_RQ is not None:
            show_tree(mask, plan.slots_RQ, tree_TT)
        return added_to_scores(mask, cache.keys.dtype if cached and cache is not None else self.attention_dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in float32 of rows after the final norm, [..., D] -> [..., V]; what is never drawn gets -inf."""
        logits = self.module.get_output_embeddings()(hidden)
        if self.architecture.scales_logits:
            logits = adjust_logits(self.module, logits)
        return self._rule_out(logits.float())

    def _rule_out(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.never_drawn.device != logits.device:  # the module was moved
            self.never_drawn = self.never_drawn.to(logits.device)
        return logits.index_fill_(-1, self.never_drawn, float("-inf"))

    def score(self, plan: Plan, cache: KVCache | None = None) -> Scores:
        """One forward: logits for the positions of `plan.scored_RS`.

        A diffusion network with shifted logits is read one row earlier, so that the caller always names the position it
        wants. With guidance the hidden rows are those of the condition alone.
        """
        if plan.guidance is not None:
            return self._guided(plan, plan.guidance)
        hidden_RQD = self.hidden(plan, cache)
        if self.role.right_shift_logits and self.role.name != "autoregressive":
            # Position 0 is given, so what would score it is never read. In a cached forward the row before a block is
            # present only while the context or the previous block is pending. No later pass needs it: the position that
            # it scores is settled, and so final from that pass on.
            hidden_RSD = _rows(hidden_RQD, (plan.scored_RS - 1).clamp(min=0))
            return Scores(self.head(hidden_RSD), hidden_RSD, _settled(plan))
        hidden_RSD = _rows(hidden_RQD, plan.scored_RS)
        return Scores(self.head(hidden_RSD), hidden_RSD)

    def _guided(self, plan: Plan, guidance: Guidance) -> Scores:
        scores = self.score(_with_guidance(plan, guidance))
        with_RSV, without_RSV = scores.logits_RSV.chunk(2)
        logits_RSV = self._rule_out(without_RSV + (1 + guidance.scale) * (with_RSV - without_RSV))
        settled_RS = None if scores.settled_RS is None else scores.settled_RS.chunk(2)[0]
        return Scores(logits_RSV, scores.hidden_RSD.chunk(2)[0], settled_RS)


def check_draft(target: Network, draft: Network) -> None:
    """FewstepError unless `draft` can propose tokens to `target`."""
    if draft.role.name == "bidirectional":
        raise FewstepError(
            f"the draft {draft.name} has the role bidirectional; a draft model must be causal or block-causal"
        )
    if draft.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise FewstepError(
            f"the draft {draft.name} has another vocabulary than {target.name}; draft with a model that shares it"
        )
    for one, other in ((draft, target), (target, draft)):
        if one.end_of_tokens > other.vocab_size:
            raise FewstepError(
                f"{one.name} can draw {one.end_of_tokens} tokens, {other.name} has rows for {other.vocab_size} only; "
                "draft with a model that has as many"
            )


def _lasting_blocks(plan: Plan, tree_TT: Tensor) -> Tensor:
    """Block numbers under which the rows stay in the cache: guesses that branch are INVISIBLE there."""
    blocks_RQ = plan.blocks_RQ.clone()
    blocks_RQ[:, -len(tree_TT) :] = INVISIBLE
    return blocks_RQ


def _with_guidance(plan: Plan, guidance: Guidance) -> Plan:
    """The rows of both, requests with the condition first."""
    assert plan.slots_RQ is None, "a cache holds the rows of the condition only"
    return replace(
        plan,
        tokens_RQ=torch.cat([plan.tokens_RQ, guidance.tokens_RQ]),
        positions_RQ=plan.positions_RQ.repeat(2, 1),
        blocks_RQ=plan.blocks_RQ.repeat(2, 1),
        scored_RS=plan.scored_RS.repeat(2, 1),
        guidance=None,
    )


def _rows(hidden_RQD: Tensor, rows_RS: Tensor) -> Tensor:
    return hidden_RQD.gather(1, rows_RS[:, :, None].expand(-1, -1, hidden_RQD.shape[-1]))


def _settled(plan: Plan) -> Tensor:
    """Scored positions whose row, one earlier, does not see their block."""
    before_RS = plan.blocks_RQ.gather(1, (plan.scored_RS - 1).clamp(min=0))
    settled_RS = before_RS < plan.blocks_RQ.gather(1, plan.scored_RS)
    if plan.slots_RQ is not None:
        settled_RS[:, 0] = True  # scored by a row of the context or of the block being committed
    return settled_RS


def added_bytes(network: Network, known: set[int]) -> int:
    """Bytes of its parameters that no network before it has in memory; `known` are their addresses, to which its own
    are added.
    """
    adapter = [] if network.adapter is None else list(network.adapter.parameters())
    parameters = [*network.module.parameters(), *adapter]
    new = {one.data_ptr(): one.nbytes for one in parameters if one.data_ptr() not in known}
    known.update(new)
    return sum(new.values())
