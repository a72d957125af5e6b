"""`fewstep serve`: the server. Its options are the settings of `ServerSettings`, and of what is declared here."""

import inspect
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

import fewstep
from fewstep.cli.compare import read_specification
from fewstep.cli.extras import EXTRAS, require
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import PlaceOptions
from fewstep.cli.run_settings import Built, Groups, with_settings
from fewstep.cli.sources import Touched, Touches, check_sources
from fewstep.errors import FewstepError
from fewstep.serve.settings import ServerSettings
from fewstep.values import check_fields

if TYPE_CHECKING:
    from fewstep.models.roles import RoleName
    from fewstep.serve.catalogue import Served

KEY_VARIABLE = "FEWSTEP_API_KEY"
CORRECTION = "correction"
"""The task of a model that answers a sentence with the corrected one: a page offers it for that alone."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Models to serve, and where their weights live."""

    models: Annotated[tuple[str, ...], "Models."] = ("gsm-student", "gsm-teacher")
    dtype: Annotated[str, "auto, float32, bfloat16 or float16."] = "auto"
    device: Annotated[str, "auto, cpu, cuda or cuda:N."] = "auto"
    quantize: Annotated[str | None, "Weights of the layers in 8 bits: int8 on a CPU, fp8 on a GPU."] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.models:
            raise FewstepError("there is no model to serve; name one, such as gsm-student")


def _serve(built: Built) -> None:
    """Serves models through OpenAI's API, with a web page."""
    for module in EXTRAS["serve"].values():
        require(module)
    chosen: Models = built[Models]
    served = [_served(one) for one in chosen.models]
    for one in served:
        check_model_name(one.model)
    settings: ServerSettings = built[ServerSettings]
    if settings.votes is not None:
        touched = [Touched("MODEL", Touches.READS_MODEL, Path(one.model)) for one in served]
        check_sources([*touched, Touched("--votes", Touches.WRITES, settings.votes)])
    if settings.api_key is None and (key := os.environ.get(KEY_VARIABLE)):
        settings = replace(settings, api_key=key)
    from fewstep.measure.metrics import wilson_interval
    from fewstep.serve.catalogue import load_all
    from fewstep.serve.run import bound_socket, make_server, run_server
    from fewstep.serve.votes import Votes

    def interval(num_right: int, n: int) -> tuple[float, float]:
        found = wilson_interval(num_right, n)
        return found.low, found.high

    votes = Votes(interval, settings.votes)
    with bound_socket(settings) as listening:
        place = PlaceOptions(dtype=chosen.dtype, device=chosen.device, quantize=chosen.quantize)
        catalogue = load_all(served, place.load)
        run_server(make_server(settings, catalogue, votes, fewstep.__version__), listening)


def _served(specification: str) -> "Served":
    """A model as it was typed: `MODEL[,name=NAME][,role=ROLE][,task=correction][,setting=value...]`. Its name is that
    of its folder.
    """
    from fewstep.serve.catalogue import Served

    model, settings = read_specification(specification, texts=("role", "name", "task"))
    name = settings.pop("name", None)
    if name == "":
        raise FewstepError(f"the name in {specification!r} is empty; give some letters, or leave it out")
    task = settings.pop("task", None)
    if task not in (None, CORRECTION):
        raise FewstepError(f"the task in {specification!r} must be {CORRECTION}; give that, or leave it out")
    role = cast("RoleName | None", settings.pop("role", None))
    return Served(model=model, name=name or _short_name(model), role=role, settings=settings, corrects=task is not None)


def _short_name(model: str) -> str:
    """Of a folder its last part, since its path is no business of clients; of a hub id all of it."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model


_MODELS = inspect.Parameter(
    "models",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL[,name=NAME][,setting=value...]",
            help="Bundled names, folders or hub ids; settings hold unless a request sets others.",
        ),
    ],
)

GROUPS: Groups = {Models: "", ServerSettings: ""}

serve = with_settings(_serve, GROUPS, arguments={"models": _MODELS}, reports=False)
