"""Whole or untouched, resumable, and errors that name the place."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fewstep import files
from fewstep.errors import FewstepError
from fewstep.files import write_folder_whole, write_text_whole, write_whole
from fewstep.json_files import read_json, read_rows, write_json_whole, write_rows_whole
from fewstep.shards import Shards


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "report.json"
    write_json_whole(path, {"n": 1})
    write_json_whole(path, {"n": 2, "text": "größer"})
    assert read_json(path) == {"n": 2, "text": "größer"}
    assert names(path.parent) == ["report.json"]


def test_the_temporary_path_keeps_the_suffix(tmp_path):
    with write_whole(tmp_path / "plot.svg") as temporary:
        assert temporary.suffix == ".svg"
        temporary.write_text("x")


def test_a_link_keeps_pointing_at_the_replaced_file(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with write_whole(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_what_a_writer_made_private_gets_the_mode_of_the_umask(tmp_path, umask, monkeypatch):
    monkeypatch.setattr("fewstep.files._UMASK", umask)  # read when the process began
    before = os.umask(umask)
    try:
        with write_folder_whole(tmp_path / "folder") as folder:
            (folder / "inside").mkdir()
            for path in (folder / "private", folder / "inside" / "private", folder / "public"):
                path.touch(0o600 if path.name == "private" else 0o666)
        with write_whole(tmp_path / "file") as temporary:
            temporary.touch(0o600)
    finally:
        os.umask(before)
    folder = tmp_path / "folder"
    paths = (folder / "private", folder / "inside" / "private", folder / "public", tmp_path / "file")
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o666 & ~umask}


def test_a_pipe_is_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    reader = subprocess.Popen(["cat", tmp_path / "pipe.json"], stdout=subprocess.PIPE)
    write_json_whole(tmp_path / "pipe.json", [1])
    assert reader.communicate()[0].split() == [b"[", b"1", b"]"]
    assert names(tmp_path) == ["pipe.json"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_failure_keeps_the_old_file(tmp_path, stop):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half():
        with write_whole(path) as temporary:
            temporary.write_text("half")
            raise stop

    with pytest.raises(stop):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json_whole(path, "old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(FewstepError, match=r"a\.json: the disk is full; .*unchanged$"):
        write_json_whole(path, "new")
    assert read_json(path) == "old"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),  # safetensors says it so
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_recognised_in_the_words_of_libraries(tmp_path, error):
    with pytest.raises(FewstepError, match="the disk is full"), write_whole(tmp_path / "a"):
        raise error


def test_a_full_disk_is_recognised_when_the_library_hides_it(tmp_path):
    def save(_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # torch.save

    with pytest.raises(FewstepError, match="the disk is full"), write_whole(tmp_path / "a") as temporary:
        save(temporary)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(tmp_path):
    import torch

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        write_json_whole(disk / "a.json", "old")
        with pytest.raises(FewstepError, match="the disk is full"):
            write_json_whole(disk / "a.json", "x" * 200_000)
        with pytest.raises(FewstepError, match="the disk is full"), write_whole(disk / "a.pt") as temporary:
            torch.save(torch.randn(50_000), temporary)
        with pytest.raises(FewstepError, match="the disk is full"), write_folder_whole(disk / "model") as folder:
            (folder / "weights").write_bytes(bytes(200_000))
        assert read_json(disk / "a.json") == "old"
        assert names(disk) == ["a.json"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_kill_in_the_middle_of_a_write_keeps_the_old_file(tmp_path):
    shards = Shards.create(tmp_path, num_shards=1, suffix=".txt", settings={})
    shards.path(0).write_text("old")
    script = (
        "import sys, time\n"
        "from fewstep.shards import Shards\n"
        "with Shards.open(sys.argv[1]).write(0) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    source = Path(files.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(source)}
    )
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert shards.path(0).read_text() == "old"
    assert len(names(tmp_path)) == 3
    assert shards.unfinished() == []
    assert names(tmp_path) == ["manifest.json", "shard-00000.txt"]


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "model"
    with write_folder_whole(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
    assert names(target) == ["config.json"]
    with pytest.raises(FewstepError, match="is not empty"), write_folder_whole(target):
        pass

    def write_half():
        with write_folder_whole(target, overwrite=True) as folder:
            (folder / "weights").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert names(target) == ["config.json"]
    with write_folder_whole(target, overwrite=True) as folder:
        (folder / "weights").write_text("x")
    assert names(target) == ["weights"]
    assert names(tmp_path) == ["model"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("x")
    replace = os.replace

    def refuse_the_new(source, destination):
        if destination == target and (Path(source) / "new").exists():
            raise OSError(errno.EIO, "Input/output error")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refuse_the_new)
    monkeypatch.setattr(files, "_swap", lambda *_: False)
    with pytest.raises(FewstepError, match="Input/output error"), write_folder_whole(target, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["model"]


def killed_when(folder: Path, moment: str, script: str) -> None:
    """Run `script` on `folder` until it prints, or until `moment` (a module function) is called, and kill it there."""
    prelude = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom fewstep import files\n"
        "def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"folder = Path(sys.argv[1])\n{moment}\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", prelude + script, folder], env=environment)
    assert killed.returncode == -signal.SIGKILL


REPLACE_MODEL = (
    "with files.write_folder_whole(folder / 'model', overwrite=True) as new:\n"
    "    (new / 'config.json').write_text('new')\n"
)


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("files._swap = kill", "old"),
        ("shutil_rmtree, files.shutil.rmtree = files.shutil.rmtree, kill", "new"),
        ("files._swap = lambda *_: False; files.shutil.rmtree = kill", "new"),
    ],
    ids=["before the swap", "after the swap", "where folders cannot be swapped"],
)
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_one_or_the_new_one(tmp_path, moment, left):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    killed_when(tmp_path, moment, REPLACE_MODEL)
    assert (tmp_path / "model" / "config.json").read_text() == left
    with write_folder_whole(tmp_path / "model", overwrite=True) as folder:
        (folder / "config.json").write_text("newer")
    assert names(tmp_path) == ["model"]


def test_a_kill_between_two_renames_is_mended_by_the_next_writer(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    between = (
        "files._swap = lambda *_: False; replace = os.replace\n"
        "os.replace = lambda a, b: kill() if Path(b).name == 'model' else replace(a, b)"
    )
    killed_when(tmp_path, between, REPLACE_MODEL)
    assert not (tmp_path / "model").exists()
    with pytest.raises(FewstepError, match="is not empty"), write_folder_whole(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_what_a_living_writer_is_writing_is_not_taken_for_a_leftover(tmp_path):
    with write_folder_whole(tmp_path / "model") as first, write_whole(tmp_path / "model.json") as file:
        files.settle(tmp_path / "model")
        files.settle(tmp_path / "model.json")
        assert file.exists()
        with write_folder_whole(tmp_path / "model") as second:
            (second / "by").write_text("second")
        assert first.exists()
        (first / "by").write_text("first")
        with pytest.raises(FewstepError), write_folder_whole(tmp_path / "model"):
            pass
        (tmp_path / "model" / "by").unlink()
    assert (tmp_path / "model" / "by").read_text() == "first"
    assert names(tmp_path) == ["model", "model.json"]


def test_a_target_with_the_name_of_another_keeps_its_temporary_file(tmp_path):
    other = tmp_path / ".report.more.0123abcd.tmp.json"
    other.touch()
    write_json_whole(tmp_path / "report.json", 1)
    assert other.exists()


@pytest.mark.parametrize("name", ["x" * 250, "x" * 100 + "." + "y" * 150, "x" * 246 + ".json"])
def test_a_long_name_that_the_system_allows_can_be_written(tmp_path, name):
    write_json_whole(tmp_path / name, 1)
    with write_folder_whole(tmp_path / f"{name[:-1]}z") as folder:
        (folder / "a").touch()
    assert names(tmp_path) == sorted([name, f"{name[:-1]}z"])


@pytest.mark.parametrize("name", ["x" * 300, "file/inside", "a\0b", "loop/inside"])
def test_a_path_that_cannot_be_is_one_sentence(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for write in (write_whole, write_folder_whole):
        with pytest.raises(FewstepError, match=r"^could not write ") as caught, write(tmp_path / name):
            pass
        assert str(caught.value).endswith("what was there before is unchanged")
    assert names(tmp_path) == ["file", "loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_may_not_be_looked_into_is_one_sentence(tmp_path):
    (tmp_path / "shut").mkdir(mode=0)
    for write in (write_whole, write_folder_whole):
        with pytest.raises(FewstepError, match="Permission denied"), write(tmp_path / "shut" / "inside"):
            pass


def test_a_limit_of_the_size_of_files_is_one_sentence(tmp_path):
    script = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom safetensors.torch import save_file\n"
        "from fewstep.errors import FewstepError\nfrom fewstep.files import write_folder_whole\n"
        "from fewstep.json_files import write_rows_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "weights, target = torch.zeros(100000), Path(sys.argv[1]) / 'target'\n"
        "def rows(): write_rows_whole(target, ({'text': 'x' * 100} for _ in range(1000)))\n"
        "def save(writer):\n"
        "    with write_folder_whole(target) as folder: writer(folder / 'weights')\n"
        "for write in (rows, lambda: save(lambda path: torch.save(weights, path)),\n"
        "              lambda: save(lambda path: save_file({'w': weights}, path))):\n"
        "    try: write()\n"
        "    except FewstepError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.stdout.count("target: a file would be larger than this system or its limit (ulimit -f) allows;") == 3
    assert done.stderr == ""
    assert names(tmp_path) == []


def test_rows_round_trip_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "1", "prompt": "a\nb"}, {"id": "2", "prompt": "é"}]
    write_rows_whole(path, iter(rows))
    path.write_text("\ufeff" + path.read_text() + "\n\n")
    assert list(read_rows(path, required=("id", "prompt"))) == rows


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b'{"id": 1, "prompt": "x"}\n{"id": 2, "text": "x"}\n',
            r"rows\.jsonl line 2 has no field 'prompt'; .*'id', 'text'",
        ),
        (b'{"prompt": "x"}\n\n{"prompt": \n', r"rows\.jsonl line 3 is not valid JSON"),
        (b'["prompt"]\n', r"rows\.jsonl line 1 is not a JSON object"),
        (b'{"prompt": "x"}\n{"prompt": "\xff"}\n', r"rows\.jsonl line 2 is not UTF-8 text"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, content, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(FewstepError, match=sentence):
        list(read_rows(path, required=("prompt",)))


def test_unreadable_files_are_one_sentence(tmp_path):
    with pytest.raises(FewstepError, match=r"could not read .*none\.json: No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(FewstepError, match=r"could not read .*: Is a directory"):
        list(read_rows(tmp_path))
    (tmp_path / "bad.json").write_text('{\n"a": nope}')
    with pytest.raises(FewstepError, match=r"bad\.json line 2 column 6 is not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(FewstepError, match="is a folder"), write_whole(tmp_path):
        pass
    with pytest.raises(FewstepError, match=r"could not write .*nan\.json"):
        write_json_whole(tmp_path / "nan.json", float("nan"))


def make(shards: Shards, worker: tuple[int, int] = (0, 1)) -> list[int]:
    made = shards.unfinished(worker)
    for index in made:
        with shards.write(index) as temporary:
            temporary.write_text(str(index))
    return made


def test_workers_share_the_shards_and_a_rerun_skips_finished_ones(tmp_path):
    settings = {"seed": 1, "decoding": {"threshold": 0.9, "sizes": (1, 2)}}
    shards = Shards.create(tmp_path / "t", num_shards=5, suffix=".txt", settings=settings)
    assert make(shards, (1, 2)) == [1, 3]
    shards = Shards.create(tmp_path / "t", num_shards=5, suffix=".txt", settings=settings)
    stamp = shards.path(1).stat().st_mtime_ns
    time.sleep(0.01)
    assert shards.finished() == [1, 3]
    assert make(shards) == [0, 2, 4]
    assert make(shards) == []
    assert shards.path(1).stat().st_mtime_ns == stamp
    assert Shards.open(tmp_path / "t").manifest == shards.manifest
    with pytest.raises(FewstepError, match="worker 2 of 2 does not exist"):
        shards.unfinished((2, 2))


def test_a_manifest_of_other_settings_is_refused_with_what_differs(tmp_path):
    settings = {"seed": 1, "decoding": {"threshold": 0.9, "steps": None}}
    Shards.create(tmp_path, num_shards=5, suffix=".txt", settings=settings)
    newer = {"seed": 1, "decoding": {"threshold": 0.9, "steps": None, "a_later_setting": None}}
    assert Shards.create(tmp_path, num_shards=5, suffix=".txt", settings=newer).finished() == []  # None: not set
    changed = {"seed": 1, "decoding": {"threshold": 0.8, "steps": None}}
    difference = r"\(decoding\.threshold is 0\.9 there and 0\.8 here, num_shards is 5 there and 6 here\)"
    with pytest.raises(FewstepError, match=difference):
        Shards.create(tmp_path, num_shards=6, suffix=".txt", settings=changed)


def test_folders_that_are_no_shards_are_refused(tmp_path):
    with pytest.raises(FewstepError, match=r"no manifest\.json"):
        Shards.open(tmp_path)
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FewstepError, match=r"other files and no manifest\.json"):
        Shards.create(tmp_path, num_shards=1, suffix=".txt", settings={})
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(FewstepError, match="is damaged"):
        Shards.open(tmp_path)


def test_a_row_that_ends_in_the_middle_is_named_by_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1"}\n{"prompt": "is cut o\n')
    with pytest.raises(
        FewstepError, match=r"rows\.jsonl line 2 is not valid JSON: Invalid control character at column"
    ):
        list(read_rows(file, ["prompt"]))


def test_a_pipe_is_written_if_somebody_reads_it_and_else_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Timer(0.1, lambda: read.append(pipe.read_text()))
    reader.start()
    write_text_whole(pipe, "text")
    reader.join()
    assert read == ["text"]
    monkeypatch.setattr(files, "READER_PATIENCE_S", 0.05)
    with pytest.raises(FewstepError, match="a pipe from which nobody reads"):
        write_text_whole(pipe, "text")


def test_a_file_is_written_with_the_mode_that_is_asked_for(tmp_path: Path) -> None:
    for mode in (0o600, 0o755):
        with write_whole(tmp_path / "file", mode=mode) as temporary:
            temporary.write_text("text")
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode
