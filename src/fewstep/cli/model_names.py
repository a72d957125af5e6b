"""Names of models, checked before torch and transformers are imported, which takes seconds."""

from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.models.names import CORRECTOR, bundled_names, local_folder


def check_model_name(name: str) -> None:
    """FewstepError with the closest bundled name or folder unless `name` is bundled, a folder, or can be a hub id."""
    local_folder(name)


def check_corrector(name: str) -> None:
    """The same of the model that corrects, whose default may not be among the bundled ones."""
    if name == CORRECTOR and name not in bundled_names() and not Path(name).is_dir():
        raise FewstepError(
            "no correction model ships with fewstep yet; name one with --model, such as a folder that "
            "recipes/correction.py has trained"
        )
    check_model_name(name)
