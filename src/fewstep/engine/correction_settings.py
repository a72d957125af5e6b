"""What is corrected of a text. Nothing here imports torch or transformers, which takes seconds."""

from dataclasses import dataclass
from typing import Annotated

from fewstep.values import Count, check_fields


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings:
    """What is corrected, and how many sentences at once."""

    longest: Annotated[Count, "Tokens of the longest sentence that is corrected; longer ones stay as they are."] = 96
    batch_size: Annotated[Count, "Sentences corrected together."] = 1

    def __post_init__(self) -> None:
        check_fields(self)
