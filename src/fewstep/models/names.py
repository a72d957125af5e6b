"""Names of models: bundled ones, folders, hub ids. Nothing here imports torch or transformers, which takes seconds."""

import re
from pathlib import Path

from fewstep.errors import FewstepError, suggestion

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"

CORRECTOR = "correction"
"""The bundled model that corrects English."""


def bundled_names() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def is_bundled(name: str | Path) -> bool:
    """Whether it names a model that ships with the package."""
    folder = local_folder(name)
    return folder is not None and folder.resolve().parent == BUNDLED


def local_folder(name: str | Path) -> Path | None:
    """The folder of a bundled name or a path; None for what can only be a hub id. FewstepError for all else."""
    path = Path(name)
    try:
        if path.name == str(name) and (BUNDLED / path / "config.json").is_file():
            return BUNDLED / path
        if name != "" and path.is_dir():
            return path
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise FewstepError(f"no model {str(name)[:100]!r}: it cannot be the name of a folder ({error})") from error
    if is_file:
        raise FewstepError(f"{name} is a file, and a model is a folder; a GGUF file becomes one by `fewstep import`")
    if _HUB_ID.fullmatch(str(name)) and not re.search(r"--|\.\.", str(name)):
        return None
    hint = suggestion(str(name), bundled_names() or ["none"], otherwise="bundled are")
    raise FewstepError(f"no model {str(name)!r}, neither a folder nor a bundled name; {_similar(path) or hint}")


_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(f"{_PART}/{_PART}", re.ASCII)


def not_found(name: str, reason: str) -> FewstepError:
    """The error for a name that is neither a folder here nor available from the hub."""
    hint = _similar(Path(name)) or "check the name"
    return FewstepError(f"no model {name!r}: no folder of this name is here, and {reason}; {hint}")


def _similar(path: Path) -> str | None:
    try:
        folders = [str(inside) for inside in path.parent.iterdir() if inside.is_dir()]
    except (OSError, ValueError):
        return None
    hint = suggestion(str(path), folders) if folders else ""
    return hint if hint.startswith("did you mean") else None
