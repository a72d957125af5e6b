"""Text that is safe to show in a terminal."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Line ends and tabs as they are, and the other characters by which a text could steer a terminal, or write in
    another direction, by their escapes (such as \\x1b).
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
