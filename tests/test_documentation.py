"""What README.md and docs/ say is true: their commands and programs, links and pictures.

Every `fewstep` command in a fenced block is given to the real parser, down to the checks of its settings; only what the
command then does is left out. Blocks behind the comment RUN are run.
"""

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from fewstep.cli.decoding import DecodingOptions
from fewstep.cli.main import app, main
from fewstep.cli.training import app as training
from fewstep.decode.registry import DECODERS, POLICIES
from fewstep.engine.settings import GenerationSettings

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "fewstep"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
MAP = "architecture.md"
RUN = "<!-- run by tests -->"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and whether it is to be run."""

    page: str
    language: str
    text: str
    run: bool

    def commands(self) -> Iterator[list[str]]:
        """The words of every `fewstep` command in it."""
        for line in self._lines():
            program, _, rest = line.partition(" ")
            if program in ("fewstep", ".venv/bin/fewstep"):
                yield shlex.split(rest, comments=True)

    def recipes(self) -> Iterator[list[str]]:
        """The recipe's name and the words of every command that runs one."""
        for line in self._lines():
            if line.startswith("python recipes/"):
                script, *words = shlex.split(line.removeprefix("python recipes/"), comments=True)
                yield [script.removesuffix(".py"), *words]

    def _lines(self) -> list[str]:
        """Commands, which may be written over several lines; in a console they stand behind `$`."""
        if self.language not in ("", "console", "sh", "shell", "bash"):
            return []
        return [line.removeprefix("$ ") for line in self.text.replace("\\\n", " ").splitlines()]


def blocks() -> list[Block]:
    """All fenced blocks, those indented in a list too."""
    fenced = re.compile(
        rf"^(?P<run>{re.escape(RUN)}\n\n?)?(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
        re.S | re.M,
    )
    return [
        Block(page.name, found["language"], found["text"], found["run"] is not None)
        for page in PAGES
        for found in fenced.finditer(page.read_text(encoding="utf-8"))
    ]


COMMANDS = [(block.page, words, block.run) for block in blocks() for words in block.commands()]
RECIPES = [words for block in blocks() for words in block.recipes()]
PROGRAMS = [block for block in blocks() if block.language == "python" and block.run]


def replace_work_of(
    command: Callable[..., None], stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let `command`, as it is registered, end where its options are read and checked and its own work would begin."""
    inner = dict(zip(command.__code__.co_freevars, command.__closure__ or (), strict=True))
    monkeypatch.setattr(inner["command"], "cell_contents", stand_in)


@pytest.mark.parametrize(
    ("page", "words"), [(page, words) for page, words, _ in COMMANDS], ids=lambda one: "".join(one)[:40]
)
def test_a_command_of_the_documentation_is_one_that_the_parser_takes(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def stand_in(*settings: Any, **options: Any) -> None:
        given.append(options or settings)

    commands = import_module("fewstep.cli.main").app.registered_commands  # of another app, if it was loaded again
    for registered in (*commands, *training.registered_commands):
        if registered.callback is not None and registered.name != "train":
            replace_work_of(registered.callback, stand_in, monkeypatch)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert not stopped.value.code
    assert len(given) == 1, "the command was parsed, and would have begun"
    for options in given[0].values() if isinstance(given[0], dict) else ():
        if isinstance(options, DecodingOptions):
            GenerationSettings.of(**options.given())


def test_the_documentation_has_commands_and_some_of_them_are_run() -> None:
    assert len(COMMANDS) > 20
    assert {page for page, _, _ in COMMANDS} >= {"README.md", "commands.md", "cdlm.md", "cllm.md", "decoders.md"}
    assert sum(run for _, _, run in COMMANDS) >= 4
    assert len(PROGRAMS) >= 3


@pytest.mark.parametrize("words", [words for _, words, run in COMMANDS if run], ids=lambda words: " ".join(words)[:60])
def test_a_cheap_command_of_the_documentation_runs(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert not stopped.value.code


def test_programs_of_the_documentation_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the pages, as a reader would type them: later ones use what earlier ones have defined."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in PROGRAMS:
        if block.page != MAP:
            exec(compile(block.text, block.page, "exec"), names)


def test_programs_of_the_map_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs by itself. One whose first line names a file of the package is that file for those after it, and the
    line of a registry that stands there too is added to it.
    """
    monkeypatch.chdir(tmp_path)
    registries: dict[str, dict[str, Any]] = {"DECODERS": DECODERS, "POLICIES": POLICIES}
    files = 0
    for block in PROGRAMS:
        if block.page != MAP:
            continue
        first_line = block.text.partition("\n")[0]
        file = re.match(r"# src/(fewstep/\w+/\w+)\.py", first_line)
        module = ModuleType("program" if file is None else file[1].replace("/", "."))
        exec(compile(block.text, block.page, "exec"), vars(module))
        if file is not None:
            files += 1
            assert not (PACKAGE.parent / f"{file[1]}.py").exists()
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for registry, name, place in re.findall(r'in (\w+): "([\w-]+)": "([\w.:]+)"', first_line):
            monkeypatch.setitem(registries[registry], name, place)
    assert files >= 3


@pytest.mark.parametrize("words", RECIPES, ids=lambda words: "".join(words)[:40])
def test_a_recipe_of_the_documentation_takes_its_options(words: list[str]) -> None:
    name, *rest = words
    command: Any = typer.main.get_command(import_module(name).app)
    if hasattr(command, "commands"):
        assert rest[0] in command.commands
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(name, rest)


def test_recipes_in_the_text_exist() -> None:
    """But for the log, a record of what there was."""
    named = {
        name for page in PAGES if page.name != "log.md" for name in re.findall(r"recipes/\w+\.py", page.read_text())
    }
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()
    assert len(named) > 10


def test_options_in_the_text_exist() -> None:
    """Of every command that a sentence quotes, such as `fewstep eval --limit`, with placeholders in place of values."""
    group: Any = typer.main.get_command(app)
    inner: Any = typer.main.get_command(training)
    unknown = []
    for page in PAGES:
        for span in re.findall(r"`fewstep ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
            name, *words = span.split()
            command = group.commands.get(name)
            if name == "train" and words:
                name, *words = words
                command = inner.commands.get(name)
            if command is None:
                unknown.append(f"{page.name}: fewstep {span}")
                continue
            known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
            unknown += [
                f"{page.name}: {word} in {span}" for word in words if re.match("--[a-z]", word) and word not in known
            ]
    assert unknown == []


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_map_names_what_is_there() -> None:
    """Files, folders and names in the backticks of docs/architecture.md."""
    text = re.sub(
        r"^```.*?^```$", "", (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8"), flags=re.S | re.M
    )
    quoted = set(re.findall(r"`([^`\n]+)`", text))
    paths = {one for one in quoted if re.fullmatch(r"[a-z_]+(/[a-z_0-9]*)*(/|\.py|\.md)", one)}
    missing = {one for one in paths if not (PACKAGE / one).exists() and not (REPOSITORY / one).exists()}
    assert missing == set()
    source = "\n".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    words = set(re.findall(r"\w+", source))
    names = {
        part
        for one in quoted - paths
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", one)
        for part in one.partition("(")[0].split(".")
    }
    assert names - words == set()
    assert len(paths) > 20
    assert len(names) > 50
