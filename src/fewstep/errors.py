"""The one error that users see: one sentence saying what was wrong and what to do."""

import difflib
from collections.abc import Iterable


class FewstepError(ValueError):
    """Bad input, settings or files. The command line prints the message as one line and exits with 2."""


def suggestion(name: str, choices: Iterable[str], *, otherwise: str = "choose one of") -> str:
    """What to do about a name that is none of `choices`: the closest one, or all of them."""
    known = list(choices)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise} {', '.join(known)}"
