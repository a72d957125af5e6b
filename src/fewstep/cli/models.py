"""`fewstep models`: what ships with the package."""

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
        ["name", "what it is", "role", "block", "context", "MB"],
        [
            [
                row["name"],
                row["title"],
                row["role"],
                row["block_size"] or "",
                row["context_attention"] or "",
                row["megabytes"],
            ]
            for row in rows
        ],
        num_texts=2,
    )


def _bundled() -> list[dict[str, Any]]:
    from fewstep.files import read_json
    from fewstep.models.load import BUNDLED, bundled_names

    rows = []
    for name in bundled_names():
        folder = BUNDLED / name
        config = read_json(folder / "config.json")
        rows.append(
            {
                "name": name,
                "role": config.get("role", "autoregressive"),
                "block_size": config.get("block_size"),
                "context_attention": config.get("context_attention"),
                "megabytes": round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 1),
                "title": _card_title(folder / "README.md"),
            }
        )
    return rows


def _card_title(card: Path) -> str:
    """First heading of a model card without its front matter; empty if there is no card."""
    if not card.exists():
        return ""
    headings = [line[2:].strip() for line in card.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return headings[0] if headings else ""
