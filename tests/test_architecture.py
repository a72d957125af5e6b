"""The shape of the package: which room imports which, what start-up costs, what files may say."""

import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "fewstep"

# Each room, and the rooms it may import from; every room may also import those of SHARED.
EARLIER_ROOMS = {
    "models": set(),
    "decode": {"models"},
    "engine": {"models", "decode"},
    "train": {"models", "decode", "engine"},
    "tasks": {"models"},
    "measure": {"models", "decode", "engine", "tasks"},
    "serve": {"models", "decode", "engine"},
    "cli": {"models", "decode", "engine", "train", "tasks", "measure", "serve"},
}
SHARED = {"errors", "files", "json_files", "kept", "shards", "values"}


def imported_rooms(file: Path) -> dict[str, int]:
    """First part below `fewstep` of every import in the file, wherever it stands -> its line."""
    package_parts = ("fewstep", *file.relative_to(PACKAGE).parts[:-1])
    rooms: dict[str, int] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package_parts[: len(package_parts) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            modules = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "fewstep":
                rooms.setdefault(parts[1] if len(parts) > 1 else "", node.lineno)
    return rooms


def breaches(room: str) -> list[str]:
    allowed = EARLIER_ROOMS[room] | SHARED | {room}
    # The command line may also read the package itself (its version, `fewstep.load`).
    top_level = {"", "__version__", "load", "LanguageModel"} if room == "cli" else set()
    return [
        f"{file.relative_to(REPOSITORY)}:{line} imports fewstep.{imported}"
        for file in sorted((PACKAGE / room).rglob("*.py"))
        for imported, line in imported_rooms(file).items()
        if imported not in allowed | top_level
    ]


def test_the_map_says_what_a_room_may_import() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", page, re.M))
    assert told.pop("cli") == "all"
    assert {room: set(re.findall(r"\w+", last)) for room, last in told.items()} | {"cli": set(told)} == EARLIER_ROOMS


@pytest.mark.parametrize("room", sorted(EARLIER_ROOMS))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    assert breaches(room) == []


def test_every_folder_with_code_is_a_known_room() -> None:
    folders = {file.relative_to(PACKAGE).parts[0] for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE}
    assert folders <= set(EARLIER_ROOMS) | {"bundled"}


@pytest.mark.parametrize("shared", sorted(SHARED))
def test_shared_modules_import_no_room(shared: str) -> None:
    assert set(imported_rooms(PACKAGE / f"{shared}.py")) <= SHARED


def test_help_and_refusals_of_names_import_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from fewstep.cli.main import main\n"
        "for arguments, code in (\n"
        "    ('--help', 0),\n"
        "    ('generate --help', 0),\n"
        "    ('eval --decoder blok', 2),\n"
        "    ('generate 2+2 --policy margn', 2),\n"
        "    ('compare gsm-student,decoder=blok gsm-student', 2),\n"
        "):\n"
        "    try:\n"
        "        main(arguments.split())\n"
        "    except SystemExit as stop:\n"
        "        assert (stop.code or 0) == code, (arguments, stop.code)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    """Neither this checkout's folder, nor the folder around it, nor the home directory."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    too_general = {Path("/"), Path(tempfile.gettempdir()), Path("/home")}
    folders = {REPOSITORY, REPOSITORY.parent, Path.home()} - too_general
    needles = [f"{folder}/".encode() for folder in folders]
    offenders = [
        name
        for name in listed.stdout.decode().split("\0")
        if name and (REPOSITORY / name).is_file()
        for content in [(REPOSITORY / name).read_bytes()]
        if any(needle in content for needle in needles)
    ]
    assert offenders == []
