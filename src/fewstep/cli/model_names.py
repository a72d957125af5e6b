"""Names of models, checked before torch and transformers are imported, which takes seconds."""

from fewstep.models.names import local_folder


def check_model_name(name: str) -> None:
    """FewstepError with the closest bundled name or folder unless `name` is bundled, a folder, or can be a hub id."""
    local_folder(name)
