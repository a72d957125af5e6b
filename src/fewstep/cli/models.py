"""`fewstep models`: what ships with the package."""

import re
from pathlib import Path
from typing import Any

from fewstep.cli.options import Json
from fewstep.cli.report import print_table, write_report


def models(json: Json = None) -> None:
    """Lists the bundled models."""
    rows = _bundled()
    write_report(json, rows)
    if not rows:
        print("no model is bundled with this installation")
        return
    print_table(
        ["name", "role", "what it is", "block", "MB"],
        [[row["name"], row["role"], row["description"], row["block_size"] or "", row["megabytes"]] for row in rows],
        num_texts=3,
    )


def _bundled() -> list[dict[str, Any]]:
    from fewstep.json_files import read_json
    from fewstep.models.names import BUNDLED, bundled_names

    rows = []
    for name in bundled_names():
        folder = BUNDLED / name
        config = read_json(folder / "config.json")
        role = config.get("role", "autoregressive")
        rows.append(
            {
                "name": name,
                "role": role,
                "block_size": None if role == "autoregressive" else config.get("block_size"),
                "context_attention": None if role == "autoregressive" else config.get("context_attention"),
                "megabytes": round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 1),
                "description": _description(folder / "README.md"),
            }
        )
    return rows


def _description(card: Path) -> str:
    """How the text of a model card begins, up to the first comma; empty if there is none."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    _, _, body = text.partition("\n# ")
    return next((re.split("[.:,]", line)[0].replace("`", "") for line in body.splitlines()[1:] if line), "")
