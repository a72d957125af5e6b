"""`fewstep generate --show-iterations`: what Jacobi decoding guesses, pass by pass, and how it settles.

Axes: N = positions of a window, P = its states.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from fewstep.decode.jacobi_windows import Window
    from fewstep.decode.requests import Output
    from fewstep.engine.language_model import LanguageModel

Standing = Literal["fixed", "right", "wrong"]
"""Of a guess: right with all before it, right behind a wrong one, or wrong."""

_COLOURS: dict[Standing, str] = {"fixed": "green", "right": "yellow", "wrong": "red"}


def complete_in_view(lm: "LanguageModel", prompt: str, *, raw: bool = False, **settings: Any) -> "Output":
    """Print every state of every window, then the answer. FewstepError for another decoder than jacobi.

    In a terminal tokens are coloured; elsewhere "|" ends what is fixed, and wrong tokens stand in brackets.
    """
    from fewstep.decode.jacobi import Jacobi
    from fewstep.decode.jacobi_windows import jacobi_trajectories
    from fewstep.engine.settings import GenerationSettings
    from fewstep.models.text import decode_text

    decoder, chosen = lm.decoder(**settings), GenerationSettings.of(**settings)
    if not isinstance(decoder, Jacobi):
        if lm.role.name != "autoregressive":
            raise FewstepError("--show-iterations shows jacobi decoding, which needs a causal model, such as gsm-cllm")
        raise FewstepError(f"--show-iterations shows jacobi decoding, not {decoder.name}; add --decoder jacobi")
    request = chosen.request(lm.encode(prompt, raw=raw))
    trajectory = jacobi_trajectories(lm.network, [request], decoder)[0]
    output = replace(trajectory.output, text=decode_text(lm.network.tokenizer, trajectory.output.token_ids))
    draw_row = _coloured if sys.stdout.isatty() else _plain
    console = Console(highlight=False, soft_wrap=True)
    for window in trajectory.windows:
        num_passes, num_tokens = len(window.states_PN) - 1, window.states_PN.shape[1]
        console.print(Text(f"tokens {window.start + 1} to {window.start + num_tokens}, {num_passes} passes"))
        for number, (standings, tokens) in enumerate(_states(lm, window)):
            console.print(Text(f"{number:4}  ") + draw_row(standings, tokens))
    console.print(Text(f"\n{output.text}"))
    return output


def _states(lm: "LanguageModel", window: "Window") -> list[tuple[list[Standing], list[str]]]:
    """The standing and the text of every token, state by state."""
    right_PN = window.states_PN == window.states_PN[-1]
    fixed_PN = right_PN.cumprod(1).bool()
    return [
        (
            ["fixed" if fixed else "right" if right else "wrong" for fixed, right in zip(*rows, strict=True)],
            [str(lm.network.tokenizer.decode([token])).replace("\n", "↵") for token in tokens],
        )
        for tokens, *rows in zip(window.states_PN.tolist(), fixed_PN.tolist(), right_PN.tolist(), strict=True)
    ]


def _coloured(standings: Sequence[Standing], tokens: Sequence[str]) -> Text:
    return Text.assemble(*((token, _COLOURS[standing]) for standing, token in zip(standings, tokens, strict=True)))


def _plain(standings: Sequence[Standing], tokens: Sequence[str]) -> Text:
    marked = [f"[{token}]" if standing == "wrong" else token for standing, token in zip(standings, tokens, strict=True)]
    marked.insert(standings.count("fixed"), "|")
    return Text("".join(marked))
