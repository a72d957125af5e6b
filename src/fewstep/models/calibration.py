"""What a calibrated checkpoint promises: with its threshold and gaps it is at most slightly worse than a named
reference.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from fewstep.errors import FewstepError
from fewstep.json_files import write_json_whole
from fewstep.models.checkpoint_files import ADAPTER_CONFIG, CONFIG, read_object
from fewstep.models.names import BUNDLED, local_folder
from fewstep.models.roles import Gaps, Role
from fewstep.values import Count, Share, check_fields

KEY = "calibration"
"""Of a config.json."""

OpenShare = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The student's loss (accuracy of `reference` minus its own) is below `eps`, with `confidence` over the draw of the
    `n` problems of `task` that it was calibrated on. FewstepError for a value of another type, or outside its range.

    It speaks of the weights `weights` under `threshold`, `gaps` and `max_new_tokens`, greedily decoded, and of a
    reference with the weights `reference_weights` (both as `load.weights_hash`). `loss` is what was observed and
    `bound` what it was below under this setting alone, not corrected for the choice among several.
    """

    reference: str
    reference_weights: str
    weights: str
    eps: OpenShare
    confidence: OpenShare
    n: Count
    task: str
    split: str | None
    metric: str
    max_new_tokens: Count
    threshold: Annotated[float, Gt(0), Le(1)]
    gaps: Gaps | None
    loss: Annotated[float, Ge(-1), Le(1)]
    bound: Share

    def __post_init__(self) -> None:
        check_fields(self, KEY)

    def sentence(self) -> str:
        """What it promises, in words that follow the name of the model."""
        gaps = "any number of" if self.gaps is None else self.gaps
        asked = self.task if self.split is None else f"{self.task} ({self.split})"
        return (
            f"is calibrated on {self.n} problems of {asked}: with threshold {self.threshold:g} and {gaps} gaps its "
            f"accuracy is less than {100 * self.eps:g} points below that of {self.reference}, with "
            f"{100 * self.confidence:g} % confidence"
        )


def calibration_in(folder: Path, role: Role) -> Calibration | None:
    """What the config.json of a folder promises, if anything, and if it still names the threshold and gaps for which
    that holds. FewstepError naming the file if it is damaged.
    """
    path = folder / CONFIG
    stored = read_object(path).get(KEY) if path.exists() else None
    if stored is None:
        return None
    names = {field.name for field in fields(Calibration)}
    if not isinstance(stored, Mapping) or not names <= stored.keys():
        raise FewstepError(f"{path}: {KEY} must name {', '.join(sorted(names))}; remove it, or calibrate again")
    try:
        found = Calibration(**{name: stored[name] for name in names})
    except FewstepError as error:
        raise FewstepError(f"{path}: {error}") from error
    return found if (found.threshold, found.gaps) == (role.threshold, role.gaps) else None


def calibrated_config(config: Path, calibration: Calibration) -> dict[str, Any]:
    """The content of this config.json with the threshold and gaps that were chosen, and what they promise."""
    chosen = {"threshold": calibration.threshold, "gaps": calibration.gaps, KEY: asdict(calibration)}
    return {**read_object(config), **chosen}


def copy_calibrated(source: Path, config: Path, folder: Path, calibration: Calibration) -> None:
    """Copy the files of a model folder into an empty one, its `config`, which may be its base's, as calibrated.

    An adapter goes on to name its base: a folder relative to `folder`, or to the place beside it.
    """
    for entry in os.scandir(source):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            shutil.copyfile(entry, folder / entry.name)
        elif "chat_template" in entry.name:
            shutil.copytree(entry, folder / entry.name)
    write_json_whole(folder / CONFIG, calibrated_config(config, calibration))
    if (folder / ADAPTER_CONFIG).exists():
        adapter = read_object(folder / ADAPTER_CONFIG)
        name = str(adapter["base_model_name_or_path"])
        write_json_whole(
            folder / ADAPTER_CONFIG, {**adapter, "base_model_name_or_path": _base_from(source, name, folder)}
        )


def _base_from(source: Path, name: str, folder: Path) -> str:
    """How an adapter in another folder names the base that the one in `source` calls `name`."""
    beside = Path(os.path.realpath(source / name))
    base = beside if beside.is_dir() else local_folder(name)
    if base is None:
        return name  # a hub id
    base = Path(os.path.realpath(base))
    return base.name if base.parent == BUNDLED else os.path.relpath(base, os.path.realpath(folder))
