"""Writes the tables of settings in docs/decoders.md from the declarations of the decoders and policies.

python tests/option_tables.py
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fewstep.cli.decoding import SHARED, with_options
from fewstep.cli.option_names import option_name
from fewstep.decode.declarations import Declared, declared_settings
from fewstep.decode.registry import DECODERS, GENERATORS, POLICIES, Entry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "decoders.md"


def written() -> str:
    """The page with its tables made anew."""
    page = PAGE.read_text(encoding="utf-8")
    for name, lines in tables().items():
        marks = f"<!-- {name}: written by tests/option_tables.py -->", f"<!-- end of {name} -->"
        block = re.compile(f"{re.escape(marks[0])}\n.*?{re.escape(marks[1])}", re.S)
        assert block.search(page), f"{PAGE.name} lacks {marks[0]}"
        page = block.sub(lambda _, lines=lines, marks=marks: "\n".join([marks[0], *lines, marks[1]]), page)
    return page


def tables() -> dict[str, list[str]]:
    return {
        "settings of all decoders": table({"": declared_settings(SHARED)}, first=None),
        "settings of decoders": table(declared_by(DECODERS), first="decoder"),
        "settings of policies": table(declared_by(POLICIES), first="policy"),
        "settings of roles": table(declared_by(GENERATORS), first="role"),
    }


def declared_by(entries: Mapping[str, Entry]) -> dict[str, dict[str, Declared]]:
    return {name: declared_settings(entry) for name, entry in entries.items()}


def table(owners: Mapping[str, Mapping[str, Declared]], *, first: str | None) -> list[str]:
    """A row for each setting, in the order of declaration."""
    head = [*([first] if first else []), "option", "what it says", "default"]
    rows = [
        [*([f"`{owner}`"] if first else []), names(declared), *map(with_options, said(declared))]
        for owner, settings in owners.items()
        for declared in settings.values()
    ]
    return ["", line(head), "|---" * len(head) + "|", *map(line, rows), ""]


def said(declared: Declared) -> tuple[str, str]:
    """The help, and what holds unless the setting is set."""
    return declared.help, declared.told_default or ""


def names(declared: Declared) -> str:
    return ", ".join(f"`{option_name(name)}`" for name in (declared.name, *declared.details.aliases))


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
