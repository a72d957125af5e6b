"""Roles: how a network's rows see each other, and which row scores which token.

A role is stored in a checkpoint's `config.json` and absorbed here, so that no decoder and no objective asks which
family it runs.

Every visibility rule of ours is one comparison of block numbers: row q sees key k when `blocks[k] <= blocks[q]`.
Causal attention numbers each position by itself, full attention gives all positions the same number, block-causal
attention one number per block.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.models.embedding_space import EmbeddingSpace
from fewstep.values import MOST_INTEGER, Count, check_fields, fitted

RoleName = Literal["autoregressive", "bidirectional", "block_causal", "embedding"]
ContextAttention = Literal["bidirectional", "block_causal", "causal"]

Gaps = Annotated[int, Ge(0), Le(MOST_INTEGER)]

_Length = TypeVar("_Length", int, Tensor)

INVISIBLE = 1 << 30
"""Block number of padding and of unwritten cache slots: no real row sees it. A row that carries it sees everything."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """Attention and alignment of one set of weights. FewstepError if a field has no meaning.

    `block_size` is structural (the attention's block) for `block_causal`; for the other roles it is the default
    schedule. `right_shift_logits`: row t scores token t + 1 (Dream); otherwise a diffusion network's row t scores
    token t. A causal network's rows always score the next token. `threshold` and `gaps`, of a block-causal student: the
    probability from which its tokens are finalised, and how many less probable positions of a block they may leave
    before them (None: any), both chosen on development data. `jacobi_window`, of a causal network
    trained on its Jacobi trajectories (CLLM): tokens of the windows that it is decoded in. `embedding_space`, of the
    role embedding: what its canvas is noised with. Its context never sees the canvas.
    """

    name: RoleName
    block_size: Count = 32
    mask_token_id: Annotated[int, Ge(0), Le(MOST_INTEGER)] | None = None
    right_shift_logits: bool = False
    context_attention: ContextAttention = "bidirectional"
    threshold: float = 0.9
    gaps: Gaps | None = None
    jacobi_window: Count | None = None
    embedding_space: EmbeddingSpace | None = None

    def __post_init__(self) -> None:
        fitted(self.name, RoleName, "role")
        check_fields(self)
        if not 0 < self.threshold <= 1:
            raise FewstepError(f"threshold is a probability in (0, 1], got {self.threshold}")
        if self.gaps is not None and self.name != "block_causal":
            raise FewstepError(
                f"gaps counts positions left open in a block_causal network's blocks, got {self.gaps} for the role "
                f"{self.name}"
            )
        if self.jacobi_window is not None and self.name != "autoregressive":
            raise FewstepError(
                f"jacobi_window counts tokens of an autoregressive network's windows, got {self.jacobi_window} for the "
                f"role {self.name}"
            )
        if (self.name == "embedding") != (self.embedding_space is not None):
            raise FewstepError(
                "the role embedding, and no other, has an embedding_space, which its training decides; make such a "
                "model with fewstep train embedding"
            )
        if self.name != "autoregressive" and self.mask_token_id is None:
            raise FewstepError(
                f"the role {self.name} needs a mask token, which the checkpoint does not name; "
                "give one with fewstep import --mask-token"
            )

    @property
    def scores_next_token(self) -> bool:
        """Whether the row at position t scores the token at t + 1."""
        return self.name == "autoregressive" or self.right_shift_logits

    @property
    def context_unit(self) -> int | None:
        """Keys and values of a context depend, up to each multiple of so many positions, on the tokens before it alone;
        None: on the whole context.
        """
        if self.name == "autoregressive" or self.context_attention == "causal":
            return 1
        return self.block_size if self.context_attention == "block_causal" else None

    def blocks(self, positions: Tensor, context_length: Tensor) -> Tensor:
        """Block number of each position; integers that broadcast, e.g. positions [R, Q] and context_length [R, 1]."""
        if self.name == "autoregressive":
            return torch.broadcast_tensors(positions, context_length)[0]
        in_context = positions < context_length
        response = positions - context_length
        if self.name in ("bidirectional", "embedding"):
            within_response = torch.zeros_like(response)
        else:
            within_response = response.div(self.block_size, rounding_mode="floor")
        match self.context_attention:
            case "bidirectional":
                return torch.where(in_context, 0, within_response + (self.name != "bidirectional"))
            case "causal":
                return torch.where(in_context, positions, context_length + within_response)
            case "block_causal":
                absolute = positions.div(self.block_size, rounding_mode="floor")
                if self.name == "block_causal":
                    return absolute.expand_as(response)
                if self.name == "embedding":
                    return torch.where(in_context, absolute, context_length)
                return torch.minimum(absolute, context_length.div(self.block_size, rounding_mode="floor"))

    def first_block_start(self, context_length: _Length) -> _Length:
        """Position at which the first response block begins, of one request or of several.

        It is the end of the context, except with `context_attention="block_causal"`, whose blocks are absolute
        (SDAR): there the first block also holds what is left of the context past the last whole block.
        """
        if self.name == "block_causal" and self.context_attention == "block_causal":
            return context_length // self.block_size * self.block_size
        return context_length

    def to_config(self) -> dict[str, Any]:
        """The keys stored in a checkpoint's config.json."""
        return {
            **self.decoding_config(),
            "role": self.name,
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "right_shift_logits": self.right_shift_logits,
            "context_attention": self.context_attention,
            "is_causal": self.name == "autoregressive",
            **({} if self.embedding_space is None else {EMBEDDING_SPACE: self.embedding_space.to_config()}),
        }

    def decoding_config(self) -> dict[str, Any]:
        """Those of them that only say how the network is decoded."""
        own = {"threshold": self.threshold} if self.name == "block_causal" else {"block_size": self.block_size}
        return {**own, "gaps": self.gaps, "jacobi_window": self.jacobi_window}

    def playing(self, name: RoleName) -> "Role":
        """The same weights' role by another name, without what only another role is decoded by."""
        return replace(
            self,
            name=name,
            gaps=self.gaps if name == "block_causal" else None,
            jacobi_window=self.jacobi_window if name == "autoregressive" else None,
            embedding_space=self.embedding_space if name == "embedding" else None,
        )

    @classmethod
    def from_config(cls, config: Any) -> "Role":
        """Read what `to_config` stored; a config without our keys is a plain causal model.

        A key that is null counts as absent. FewstepError naming one whose value is of another type than the field.
        """
        given = {name: value for name in CONFIG_KEYS if (value := getattr(config, name, None)) is not None}
        if EMBEDDING_SPACE in given:
            given[EMBEDDING_SPACE] = EmbeddingSpace.from_config(given[EMBEDDING_SPACE])
        return cls(name=given.pop("role", "autoregressive"), **given)


EMBEDDING_SPACE = "embedding_space"

CONFIG_KEYS = (
    "role",
    "block_size",
    "mask_token_id",
    "right_shift_logits",
    "context_attention",
    "threshold",
    "gaps",
    "jacobi_window",
    EMBEDDING_SPACE,
)
"""Under which a config.json holds what a Role is made from."""
