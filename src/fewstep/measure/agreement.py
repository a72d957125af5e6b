"""How similar the answers of two decoders or models are, token by token; this does not say which are better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

import torch

from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel, Prompt
from fewstep.errors import FewstepError
from fewstep.measure.metrics import Interval, wilson_interval
from fewstep.models.network import Network, Plan

Tokens = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of `n` answers with their references.

    `identical`: share of answers equal to the reference. `common_prefix`: mean share of a reference's tokens that stand
    before the first difference. `similarity`: mean of `similarity`.
    """

    n: int
    identical: Interval
    common_prefix: float
    similarity: float

    def to_json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "identical": self.identical.estimate,
            "identical_ci95": [self.identical.low, self.identical.high],
            "common_prefix": self.common_prefix,
            "similarity": self.similarity,
        }


def check_same_tokens(networks: Mapping[str, Network]) -> None:
    """FewstepError naming the first network whose tokens are not those of the first of all: neither the same, nor some
    of them, nor the same and more.
    """
    (first, ours), *others = ((name, network.tokenizer.get_vocab().items()) for name, network in networks.items())
    for name, theirs in others:
        if not (theirs <= ours or ours <= theirs):
            raise FewstepError(f"{name} has other tokens than {first}; agreement compares token by token")


def same_answers(outputs: Sequence[Output], expected: Sequence[Output]) -> dict[str, Any]:
    """Of `n` outputs how many have the `same` tokens as those expected, and tokens per forward of all of them.

    ValueError unless there are as many of the one as of the other.
    """
    same = sum(one.token_ids == other.token_ids for one, other in zip(outputs, expected, strict=True))
    tokens, passes = (sum(getattr(one, key) for one in outputs) for key in ("num_tokens", "num_forwards"))
    return {"n": len(outputs), "same": same, "tokens_per_forward": tokens / passes}


def margins(
    lm: LanguageModel, prompts: Sequence[Prompt], outputs: Sequence[Output], expected: Sequence[Output]
) -> list[float]:
    """Of each output that parts from the expected one: by how much the log-probability of the expected token exceeds
    that of the other where they part, in nats, in one forward of the causal model.

    Where that is nearly 0, rounding decides which token is the more probable. An output that is a beginning of the
    expected one, or continues it, has no such token and is left out.
    """
    network, found = lm.network, list[float]()
    for prompt, output, other in zip(prompts, outputs, expected, strict=True):
        pairs = zip(output.token_ids, other.token_ids, strict=False)
        part = next((index for index, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
        if part is None:
            continue
        ids = [*lm.encode(prompt), *other.token_ids[:part]]
        row_1Q = torch.arange(len(ids), device=network.device)[None]
        plan = Plan(
            kind="decode",
            tokens_RQ=torch.tensor([ids], device=network.device),
            positions_RQ=row_1Q,
            blocks_RQ=row_1Q,
            slots_RQ=None,
            scored_RS=row_1Q[:, -1:],
            context_length_R=row_1Q[:, 0],
        )
        with torch.no_grad():
            logits_V = network.score(plan).logits_RSV[0, 0]
        found.append(float(logits_V[other.token_ids[part]] - logits_V[output.token_ids[part]]))
    return found


def measure_agreement(answers: Sequence[Tokens], references: Sequence[Tokens]) -> Agreement:
    """The agreement of each answer with its reference. ValueError unless there are as many references as answers, and
    at least one.

    The interval assumes that the answers are independent.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"agreement needs a reference for each answer, got {len(answers)} and {len(references)}")
    pairs = [(list(answer), list(reference)) for answer, reference in zip(answers, references, strict=True)]
    return Agreement(
        n=len(pairs),
        identical=wilson_interval(sum(answer == reference for answer, reference in pairs), len(pairs)),
        common_prefix=fmean(common_prefix(answer, reference) for answer, reference in pairs),
        similarity=fmean(similarity(answer, reference) for answer, reference in pairs),
    )


def common_prefix(answer: Tokens, reference: Tokens) -> float:
    """Share of the reference's tokens before the first difference; 1 if the reference is empty."""
    if not reference:
        return 1.0
    same = [mine == theirs for mine, theirs in zip(answer, reference, strict=False)]
    return (same.index(False) if False in same else len(same)) / len(reference)


def similarity(answer: Tokens, reference: Tokens) -> float:
    """difflib's ratio: twice the tokens in matching blocks over the tokens of both; 1 if both are empty."""
    return SequenceMatcher(None, answer, reference, autojunk=False).ratio()
