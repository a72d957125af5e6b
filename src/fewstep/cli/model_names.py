"""Names of models, checked before torch and transformers are imported, which takes seconds."""

import os

from fewstep.cli.sources import BUNDLED
from fewstep.errors import FewstepError, suggestion


def check_model_name(name: str) -> None:
    """FewstepError with the closest bundled name unless `name` is bundled, a folder, or looks like a hub id."""
    bundled = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
    looks_like_hub_id = name.count("/") == 1 and all(name.split("/")) and name[0] not in ".~/"
    if name in bundled or os.path.isdir(name) or looks_like_hub_id:
        return
    hint = suggestion(name, bundled or ["none"], otherwise="bundled are")
    raise FewstepError(f"no model {name!r}, neither a folder nor a bundled name; {hint}")
