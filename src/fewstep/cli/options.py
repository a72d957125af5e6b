"""Options that several commands share, in groups: a command takes `model: ModelOptions`, typer sees its fields."""

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from fewstep.cli.decoding import DecodingOptions
from fewstep.cli.interruption import spoken_interrupts
from fewstep.cli.option_names import naming_options, option_name
from fewstep.cli.sources import Touched, Touches, check_sources
from fewstep.errors import FewstepError
from fewstep.models.names import CORRECTOR
from fewstep.tasks.registry import TASKS, task_named
from fewstep.values import Count, fitted, plain_type

if TYPE_CHECKING:
    from fewstep.engine.language_model import LanguageModel
    from fewstep.models.roles import RoleName
    from fewstep.tasks.problems import Problem
    from fewstep.tasks.task import Task

_MODEL, _PROBLEMS = "Model", "Problems"
_DEFAULT_TASK = "gsm-symbolic"

_ModelName = Annotated[
    str,
    typer.Option(metavar="NAME", help="A bundled name, a folder, or a hub id.", rich_help_panel=_MODEL),
    Touches.READS_MODEL,
]


def written_file_check(option: str) -> Callable[[Path | None], Path | None]:
    """A callback of an option that names a file to write: FewstepError for a file that could not be written, before the
    work whose result it is for.
    """

    def check(path: Path | None) -> Path | None:
        if path is not None and os.path.isdir(path):
            raise FewstepError(f"{option} {path} is a folder, not a file; name a file")
        if path is not None and not os.path.isdir(path.parent):
            raise FewstepError(f"the folder of {option} {path} does not exist; make it first, or name another")
        return path

    return check


Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the report to this file as JSON.", callback=written_file_check("--json")
    ),
    Touches.WRITES,
]


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where weights live and in which numbers."""

    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MODEL)] = "auto"
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Weights of the layers in 8 bits: int8 on a CPU, fp8 on a GPU.", metavar="KIND", rich_help_panel=_MODEL
        ),
    ] = None

    def load(self, name: str, role: "RoleName | None" = None) -> "LanguageModel":
        """The model `name` in this place; FewstepError if it cannot be loaded."""
        import fewstep

        return fewstep.load(name, role=role, dtype=self.dtype, device=self.device, quantize=self.quantize)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PlaceOptions):
    """One model, its role and its place."""

    model: _ModelName = "gsm-student"
    role: Annotated[
        str | None,
        typer.Option(
            help="autoregressive, bidirectional or block_causal; the checkpoint says which by default.",
            rich_help_panel=_MODEL,
        ),
    ] = None

    def load_model(self) -> "LanguageModel":
        """The model; FewstepError if it cannot be loaded."""
        return self.load(self.model, cast("RoleName | None", self.role))


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(ModelOptions):
    """The same, by default the bundled teacher."""

    model: _ModelName = "gsm-teacher"


@dataclass(frozen=True, kw_only=True)
class CorrectorOptions(ModelOptions):
    """The same, by default the model that corrects English."""

    model: _ModelName = CORRECTOR


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which task, and where its problems are."""

    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(TASKS)}; by default jsonl if --data is given, else {_DEFAULT_TASK}.",
            rich_help_panel=_PROBLEMS,
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Problems: JSON lines {"id", "question", "answer"}; for gsm8k its folder.',
            rich_help_panel=_PROBLEMS,
        ),
        Touches.READS,
    ] = None
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Split of the task, if it has several, such as dev, test or heldout of gsm-symbolic (default test). A "
            "file given by --data without --task has none.",
            rich_help_panel=_PROBLEMS,
        ),
    ] = None
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="When an answer to --data counts as right: number (default), exact, restored, normalised or contains.",
            rich_help_panel=_PROBLEMS,
        ),
    ] = None

    @property
    def label(self) -> str:
        """The name that reports give the task: of a file of the user's own that of the file."""
        name = self._task_name
        return self.data.stem if self.data is not None and name == "jsonl" else name

    @property
    def source(self) -> str | None:
        """The file that the problems are from, unless they are bundled."""
        return None if self.data is None else str(self.data)

    @property
    def chosen(self) -> "Task":
        """The task, judged by the metric. FewstepError for an unknown name of one of the two."""
        task = task_named(self._task_name)
        return task if self.metric is None else task.judged_by(self.metric)

    @property
    def _task_name(self) -> str:
        if self.task is not None:
            return self.task
        return _DEFAULT_TASK if self.data is None else "jsonl"

    def read(self, limit: int | None = None) -> "list[Problem]":
        """The first problems, or all. FewstepError for a damaged file, or for more problems than are bundled."""
        split = self.split
        if self.task is None and self.data is not None and split is not None:
            task_named(_DEFAULT_TASK).check_split(split)  # as scripts may say it: the file takes the split's place
            split = None
        return self.chosen.problems(split, limit, data=self.data)


@dataclass(frozen=True, kw_only=True)
class ProblemOptions(TaskOptions):
    """The same, how many problems, and how many at once."""

    limit: Annotated[
        Count | None, typer.Option(help="Use only this many problems, from the first.", rich_help_panel=_PROBLEMS)
    ] = None
    batch_size: Annotated[Count, typer.Option(help="Problems decoded together.", rich_help_panel=_PROBLEMS)] = 1


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer expects it: each parameter that is a group of options replaced by the group's fields."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _group_parameters(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    _check_apart(command.__name__.strip("_"), parameters)
    options = _option_names(parameters)
    touching = _touching(parameters)
    declared = {parameter.name: parameter.annotation for parameter in parameters}
    parameters = [parameter.replace(annotation=_without_bounds(parameter.annotation)) for parameter in parameters]

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        for name, value in values.items():
            values[name] = fitted(value, declared[name], options.get(name, name.upper()))
        check_sources(
            [
                Touched(option, touches, Path(values[name]))
                for name, (option, touches) in touching.items()
                if values[name] is not None
            ]
        )
        for name, group in groups.items():
            values[name] = _built(group, values)
        with spoken_interrupts(), naming_options(options):
            command(**values)

    vars(flat)["__signature__"] = inspect.Signature(parameters)
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _without_bounds(declared: Any) -> Any:
    """The type as typer takes it: `int | None` with the option, where `Count | None` is declared."""
    beside = get_args(declared)[1:] if get_origin(declared) is Annotated else ()
    return Annotated[(plain_type(declared), *beside)] if beside else plain_type(declared)


def _names(parameter: inspect.Parameter) -> tuple[str, ...]:
    """The names of its option, none for an argument."""
    for info in get_args(parameter.annotation):
        if isinstance(info, OptionInfo):
            # In an Annotated the first name that an option was given stands in the place of its default.
            named = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
            return tuple(name.split("/")[0] for name in named) or (option_name(parameter.name),)
    return ()


def _check_apart(command: str, parameters: Sequence[inspect.Parameter]) -> None:
    """FewstepError, for whoever declares settings, if two options or arguments of the command have one name."""
    seen = set[str]()
    for parameter in parameters:
        if twice := seen & (own := {parameter.name, *_names(parameter)}):
            raise FewstepError(
                f"{command} would have {sorted(twice)[0]} twice: a setting of a decoder or policy is named like "
                f"another option or argument of it; give that setting another name"
            )
        seen |= own


def _option_names(parameters: Iterable[inspect.Parameter]) -> dict[str, str]:
    """Parameter -> option, without the arguments."""
    options = {}
    for parameter in parameters:
        if names := _names(parameter):
            options[parameter.name] = names[0]
            if len(names) > 1:
                _SYNONYMS.add(names)
    return options


def _touching(parameters: Iterable[inspect.Parameter]) -> dict[str, tuple[str, Touches]]:
    """Parameter -> option or argument, and what the command does to the path that it names."""
    touching = {}
    options = _option_names(parameters)
    for parameter in parameters:
        for touches in get_args(parameter.annotation):
            if isinstance(touches, Touches):
                touching[parameter.name] = options.get(parameter.name, parameter.name.upper()), touches
    return touching


_SYNONYMS: set[tuple[str, ...]] = set()
"""Names of one option, of those commands that have been set up."""


def check_synonyms(arguments: Sequence[str]) -> None:
    """FewstepError if an option is typed under two of its names, of which click would take the last in silence."""
    ends = arguments.index("--") if "--" in arguments else len(arguments)
    typed = {argument.split("=")[0] for argument in arguments[:ends]}
    for names in _SYNONYMS:
        twice = [name for name in names if name in typed]
        if len(twice) > 1:
            raise FewstepError(f"{twice[1]} is another name of {twice[0]}; give one of them")


def _built(group: Any, values: dict[str, Any]) -> Any:
    """The group, of its values, which are taken out."""
    if issubclass(group, DecodingOptions):
        return group({parameter.name: values.pop(parameter.name) for parameter in group.parameters()})
    return group(**{field.name: values.pop(field.name) for field in fields(group)})


def _group_parameters(group: Any) -> list[inspect.Parameter]:
    if issubclass(group, DecodingOptions):
        return group.parameters()
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_as_option(hints[field.name])
        )
        for field in fields(group)
    ]


def _as_option(declared: Any) -> Any:
    """The text that a settings class has beside a type, as the help of an option."""
    if get_origin(declared) is not Annotated:
        return declared
    kind, *beside = get_args(declared)
    return Annotated[(kind, *(typer.Option(help=one) if isinstance(one, str) else one for one in beside))]
