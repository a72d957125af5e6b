"""Options and YAML keys that mirror settings classes, so that a setting is declared once, beside its reader.

The help of an option is the text in its field's type: `rows: Annotated[int, "Packed rows of a micro-batch."] = 16`.
A run file's keys are the option names with underscores; options override it. Unknown keys are errors.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from fewstep.cli.interruption import spoken_interrupts
from fewstep.cli.option_names import naming_options, option_name
from fewstep.cli.options import Json
from fewstep.cli.sources import Touched, Touches, check_sources
from fewstep.cli.spelling import in_type, read_yaml, spelt_in
from fewstep.errors import FewstepError, suggestion
from fewstep.json_files import read_text
from fewstep.values import described, shown

Groups = Mapping[type, str]
"""Settings class -> prefix of its options' names."""


class Built(dict[type, Any]):
    """Settings class -> its instance; `given` names the settings that an option or the run file set."""

    def __init__(self, instances: Mapping[type, Any], given: Collection[str]) -> None:
        super().__init__(instances)
        self.given = given

    def refuse(self, names: Iterable[str], because: str) -> None:
        """FewstepError if one of these settings was given, since nothing would read it."""
        for name in names:
            if name in self.given:
                raise FewstepError(f"{option_name(name)} has no effect {because}")


@dataclass(frozen=True)
class Setting:
    """One field of a settings class, as an option and as a key of a run file; `declared`: its type with its bounds."""

    name: str
    group: type
    field: "Field[Any]"
    type: Any
    declared: Any

    @property
    def option(self) -> str:
        return option_name(self.name)

    @property
    def touches(self) -> Touches | None:
        """What the command does to the path that it names."""
        return next((part for part in getattr(self.declared, "__metadata__", ()) if isinstance(part, Touches)), None)

    @property
    def default(self) -> Any:
        """The field's default; MISSING if it has none."""
        factory = self.field.default_factory
        return self.field.default if factory is MISSING else factory()

    def parameter(self) -> inspect.Parameter:
        """An option that is None unless given; what is not bool arrives as text and is read by `read`."""
        option = typer.Option(
            help=escape(self._help()),
            metavar=described(self.type),
            show_default=False,
            rich_help_panel=_panel(self.group),
        )
        annotation = bool | None if self.type in (bool, bool | None) else str | None
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
        )

    def read(self, value: Any, where: str) -> Any:
        """A run file's value in the field's type; FewstepError naming `where` if it is none, or outside its range."""
        return in_type(value, self.declared, where)

    def read_option(self, text: Any) -> Any:
        """What an option's text spells; text stays text where text is wanted."""
        return spelt_in(text, self.declared, self.option)

    def _help(self) -> str:
        """What the setting is; where that is None unless given, the description says what holds then."""
        texts = getattr(self.declared, "__metadata__", ())
        description = "".join(text for text in texts if isinstance(text, str))
        if self.default is None:
            return description
        default = "Required." if self.default is MISSING else f"Default: {self.default}."
        return f"{description} {default}"


def settings_of(groups: Groups) -> dict[str, Setting]:
    """Name -> setting, over all fields that the groups' constructors take. No two may have the same name."""
    found: dict[str, Setting] = {}
    for group, prefix in groups.items():
        hints, declared = get_type_hints(group), get_type_hints(group, include_extras=True)
        for field in fields(group):
            name = f"{prefix}{field.name}"
            assert name not in found, f"{group.__name__} and {found[name].group.__name__} share {name}"
            if field.init:
                found[name] = Setting(name, group, field, hints[field.name], declared[field.name])
    return found


def build_settings(groups: Groups, config: Path | None, given: Mapping[str, Any]) -> Built:
    """Group -> its instance: defaults, overridden by the run file, overridden by the options that were `given`.

    FewstepError for an unknown key, a value of another type, or a required setting that is nowhere.
    """
    known = settings_of(groups)
    values = _read_run_file(config, known) if config is not None else {}
    for name, value in given.items():
        if value is not None:
            values[name] = known[name].read_option(value)
    missing = [setting for name, setting in known.items() if setting.default is MISSING and name not in values]
    if missing:
        raise FewstepError(f"{missing[0].option} is missing; give it as an option or in --config")
    instances = {}
    for group in groups:
        own = [setting for setting in known.values() if setting.group is group]
        with naming_options({setting.field.name: setting.option for setting in own}):
            instances[group] = group(
                **{setting.field.name: values[setting.name] for setting in own if setting.name in values}
            )
    return Built(instances, [name for name, value in values.items() if value is not None])


def _read_run_file(path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    content = read_yaml(read_text(path), str(path))
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise FewstepError(f"{path} must hold lines of the form 'key: value'")
    for key in content:
        if key not in known:
            hint = suggestion(str(key), known, otherwise="known keys:")
            raise FewstepError(f"{path} has an unknown key {shown(key)}; {hint}")
    return {key: known[key].read(value, f"{key!r} in {path}") for key, value in content.items()}


def _panel(group: type) -> str:
    first_sentence = (inspect.getdoc(group) or group.__name__).replace("\n", " ").split(". ")[0]
    return re.split(r"[;:.,(]", first_sentence)[0].strip()


def with_settings(
    command: Callable[..., None],
    groups: Groups,
    *,
    arguments: Mapping[str, inspect.Parameter] | None = None,
    reports: bool = True,
) -> Callable[..., None]:
    """A typer command whose options are the settings of `groups`, `--config` and, if it `reports`, `--json`; it is
    given the settings and the path of the report. `arguments`: settings that are no options but arguments.
    """
    of_settings = {name: setting.parameter() for name, setting in settings_of(groups).items()} | dict(arguments or {})
    parameters = [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_Config),
        *of_settings.values(),
    ]
    if reports:
        parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Json))

    options = {name: setting.option for name, setting in settings_of(groups).items()}

    @functools.wraps(command)
    def flat(*, config: Path | None, json: Path | None = None, **given: Any) -> None:
        with spoken_interrupts():
            built = build_settings(groups, config, given)
            check_sources(_touched(built, groups, config, json))
            with naming_options(options):
                command(built, *([json] if reports else []))

    vars(flat)["__signature__"] = inspect.Signature(parameters)
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _touched(built: Built, groups: Groups, config: Path | None, json: Path | None) -> list[Touched]:
    """The paths that settings, `--config` and `--json` name."""
    touched = [
        Touched(setting.option, setting.touches, Path(value))
        for setting in settings_of(groups).values()
        if setting.touches is not None and (value := getattr(built[setting.group], setting.field.name)) is not None
    ]
    for option, touches, path in (("--config", Touches.READS, config), ("--json", Touches.WRITES, json)):
        if path is not None:
            touched.append(Touched(option, touches, path))
    return touched


_Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="YAML with the options' names as keys (underscores for dashes); options override it."
    ),
]
