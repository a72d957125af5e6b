"""Correction of texts, by a stand-in for a trained model, and `fewstep correct` as a user meets it."""

import io
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.command import Run

from fewstep.cli.correct import patch
from fewstep.cli.options import CorrectorOptions
from fewstep.decode.requests import FinishReason, Output
from fewstep.engine.correction import correct_text
from fewstep.engine.correction_settings import CorrectionSettings
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.load import save_network
from fewstep.models.tiny import tiny_network

TEXT = """# Teh heading

Teh cat sat on the
teh mat with 5 dogs. Nothing is wrong here!

- Teh `teh` item of a list.

```
teh code is not prose
```
"""
CORRECTED = TEXT.replace("Teh cat sat on the\nteh mat", "The cat sat on the\nmat").replace("Teh `teh`", "The `teh`")


class Corrector(LanguageModel):
    """Answers with what `rewrite` makes of a sentence."""

    def __init__(self, rewrite: Callable[[str], str], finish_reason: FinishReason = "stop") -> None:
        super().__init__(tiny_network("autoregressive", max_positions=512))
        self.asked: list[tuple[int, Sequence[str]]] = []
        self._rewrite, self._finish_reason = rewrite, finish_reason

    def generate(self, prompt: Any, *, on_output: Any = None, max_new_tokens: int, **settings: Any) -> Any:
        self.asked.append((max_new_tokens, prompt))
        outputs = [self._output(one) for one in prompt]
        for index, output in enumerate(outputs):
            on_output(index, output)
        return outputs

    def _output(self, sentence: str) -> Output:
        none = torch.zeros(0)
        return Output(
            token_ids=[1],
            num_tokens=1,
            num_forwards=2,
            seconds=0.1,
            finish_reason=self._finish_reason,
            canvas_ids_G=none,
            step_G=none,
            confidence_G=none,
            text=self._rewrite(sentence),
        )


def rewritten(sentence: str) -> str:
    return sentence.replace("the teh", "the").replace("Teh", "The").replace("teh", "the")


# The function


def test_sentences_are_corrected_and_nothing_else_is_touched() -> None:
    lm = Corrector(rewritten)
    told: list[int] = []
    corrected = correct_text(lm, TEXT, progress=told.append)
    assert corrected.text == CORRECTED
    assert [(one.line, one.before, one.after) for one in corrected.changes] == [
        (3, "Teh cat sat on the\nteh mat with 5 dogs.", "The cat sat on the\nmat with 5 dogs."),
        (6, "Teh `teh` item of a list.", "The `teh` item of a list."),
    ]
    assert (corrected.num_sentences, corrected.num_forwards, sum(told)) == (3, 6, 3)
    assert correct_text(lm, corrected.text).changes == ()


def test_a_sentence_is_asked_about_once_and_its_room_follows_from_its_length() -> None:
    lm = Corrector(rewritten)
    text = "Teh cat sat here. Teh cat sat here.\n\nTeh cat sat here.\n\n" + "a word " * 15
    corrected = correct_text(lm, text, CorrectionSettings(longest=200))
    assert [(canvas % 16, len(prompts)) for canvas, prompts in lm.asked] == [(0, 1), (0, 1)]
    assert lm.asked[0][0] < lm.asked[1][0]
    assert corrected.num_sentences == 4
    assert len(corrected.changes) == 3


def test_what_is_too_long_or_too_short_stays_and_is_counted() -> None:
    lm = Corrector(lambda _: "Teh other text.")
    text = "Teh one.\n\n" + "teh word " * 40 + "\n"
    corrected = correct_text(lm, text, CorrectionSettings(longest=64))
    assert (corrected.text, corrected.num_too_long, lm.asked) == (text, 1, [])
    long = "teh word " * 60  # longer than all positions of the network
    assert correct_text(lm, long, CorrectionSettings(longest=10_000)).num_too_long == 1


@pytest.mark.parametrize(
    ("answer", "finish_reason"),
    [
        ("The cat sat on", "length"),  # cut off
        ("", "stop"),
        ("#### 42", "stop"),
        ("Quite another sentence, of which no word was there before.", "stop"),
        ("The cat sat on the \ufffd mat here.", "stop"),
        ("The cat sat on the \x1b[2J mat here.", "stop"),
    ],
)
def test_an_answer_that_is_no_correction_is_refused(answer: str, finish_reason: FinishReason) -> None:
    text = "Teh cat sat on the mat here.\n"
    corrected = correct_text(Corrector(lambda _: answer, finish_reason), text)
    assert (corrected.text, corrected.changes, corrected.num_refused) == (text, (), 1)


@pytest.mark.parametrize(
    ("before", "answer", "after"),
    [
        ("Teh run took 35 seconds.", "The run took 53 seconds.", "The run took 35 seconds."),
        ("Teh file /etc/x.conf is read.", "The file etc is read.", "The file /etc/x.conf is read."),
        ("Teh cat’s mat is “red” now.", 'The cat\'s mat is "red" now.', "The cat’s mat is “red” now."),
        ("Teh use of foo() is fine here.", "The use of foo() is fine, here 3.", "The use of foo() is fine here."),
    ],
)
def test_numbers_paths_and_curly_quotes_stay(before: str, answer: str, after: str) -> None:
    assert correct_text(Corrector(lambda _: answer), before).text == after


def test_a_title_or_an_item_gets_no_full_stop_and_a_sentence_of_a_paragraph_does() -> None:
    lm = Corrector(lambda sentence: rewritten(sentence).rstrip(".") + ".")
    text = "Teh title of it\n\n- Teh first item\n- Teh second item.\n\nTeh cat sat here. Teh mat was red\n"
    assert correct_text(lm, text).text == text.replace("Teh", "The").replace("red", "red.")


@pytest.mark.parametrize("role", ["autoregressive", "bidirectional", "block_causal"])
def test_models_of_every_role_are_asked(role: Any) -> None:
    class Recording(LanguageModel):
        def generate(self, prompt: Any, **settings: Any) -> Any:
            outputs = super().generate(prompt, **settings)
            asked.extend(zip(prompt, outputs, strict=True))
            return outputs

    asked: list[tuple[str, Output]] = []
    corrected = correct_text(Recording(tiny_network(role, max_positions=256)), "Teh cat sat on the mat.\n")
    ((sentence, output),) = asked
    assert (sentence, corrected.num_sentences) == ("Teh cat sat on the mat.", 1)
    assert corrected.num_forwards == output.num_forwards
    with pytest.raises(FewstepError, match="takes no max_new_tokens"):
        correct_text(LanguageModel(tiny_network(role)), "Teh cat sat.", max_new_tokens=4)


# The command


@pytest.fixture
def corrector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The stand-in in the place of the model, and a file of TEXT in the current folder."""
    monkeypatch.setattr(CorrectorOptions, "load_model", lambda _: Corrector(rewritten))
    monkeypatch.setattr("fewstep.cli.correct.check_corrector", lambda _: None)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "text.md"
    file.write_bytes(TEXT.encode())
    return file


def test_changes_are_shown_as_a_patch_and_nothing_is_written(run: Run, corrector: Path, tmp_path: Path) -> None:
    shown = run("correct", "text.md")
    assert shown.code == 0
    assert "-Teh cat sat on the\n-teh mat with" in shown.out
    assert "+The cat sat on the\n+mat with" in shown.out
    assert "\x1b" not in shown.out
    assert "2 of 3 sentences changed; 6 passes" in shown.err
    assert corrector.read_bytes() == TEXT.encode()
    assert os.listdir() == ["text.md"]


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
@pytest.mark.parametrize("text", [TEXT, TEXT.rstrip("\n"), TEXT.replace("\n", "\r\n")])
def test_the_patch_makes_the_corrected_text(tmp_path: Path, text: str) -> None:
    after = correct_text(Corrector(rewritten), text).text
    (tmp_path / "t").write_bytes(text.encode())
    told = "".join(patch(text, after, "t")).encode()
    subprocess.run(["patch", "--binary", "t"], input=told, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "t").read_bytes() == after.encode()


def test_in_place_keeps_the_old_text_the_mode_and_earlier_backups(run: Run, corrector: Path) -> None:
    corrector.chmod(0o640)
    Path("text.md.bak").write_text("an older text")
    shown = run("correct", "text.md", "--in-place", "--json", "out.json")
    assert shown.code == 0
    assert "kept in text.md.bak2" in shown.err
    assert corrector.read_bytes() == CORRECTED.encode()
    assert Path("text.md.bak").read_text() == "an older text"
    assert Path("text.md.bak2").read_bytes() == TEXT.encode()
    assert stat.S_IMODE(corrector.stat().st_mode) == stat.S_IMODE(os.stat("text.md.bak2").st_mode) == 0o640
    report = json.loads(Path("out.json").read_text())
    assert (report["num_changed"], report["num_sentences"], report["role"]) == (2, 3, "autoregressive")
    assert report["changes"][0]["line"] == 3
    again = run("correct", "text.md", "--in-place")
    assert again.out == ""
    assert "kept" not in again.err
    assert len(os.listdir()) == 4


def test_in_place_leaves_a_file_that_somebody_else_changed(
    run: Run, corrector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rewrite(sentence: str) -> str:
        corrector.write_text("new")
        return rewritten(sentence)

    monkeypatch.setattr(CorrectorOptions, "load_model", lambda _: Corrector(rewrite))
    assert "changed by somebody else" in run("correct", "text.md", "--in-place").sentence()
    assert corrector.read_text() == "new"
    assert os.listdir() == ["text.md"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_text_goes_to_a_file_or_to_standard_output(
    run: Run, corrector: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    text, after = ("\ufeff" + one.replace("\n", ending).rstrip("\r\n") for one in (TEXT, CORRECTED))
    corrector.write_bytes(text.encode())
    assert "+The cat sat" in run("correct", "text.md", "--output", "new.md").out
    assert Path("new.md").read_bytes() == after.encode()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    shown = run("correct", "-", "--output", "-")
    assert shown.out.encode() == after.encode()
    assert "+The cat sat" in shown.err


def test_a_terminal_shows_each_sentence_in_colours(run: Run, corrector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    corrector.write_text("Teh cat\x1b[2J sat on the mat here.\n")
    shown = run("correct", "text.md")
    assert "\x1b[9;31mTeh\x1b[0m\x1b[4;32mThe\x1b[0m" in shown.out
    assert "\x1b[2J" not in shown.out
    assert "\\x1b[2J" in shown.out


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colours_shows_a_patch(
    run: Run, corrector: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv(name, value)
    assert "+The cat sat on the\n" in run("correct", "text.md").out


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "text.md holds no text; there is nothing to correct"),
        (b"\xef\xbb\xbf \r\n\t\n", "text.md holds no text"),
        (b"ab\0c", "text.md is no text: its byte 2 is a null"),
        (b"caf\xe9 is", "text.md is not UTF-8 text"),
        (b"\xff\xfea\0", "is no text"),
    ],
)
def test_what_is_no_text_is_told(run: Run, corrector: Path, data: bytes, sentence: str) -> None:
    corrector.write_bytes(data)
    assert sentence in run("correct", "text.md", "--in-place").sentence()
    assert corrector.read_bytes() == data
    assert os.listdir() == ["text.md"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("none.md",), "could not read none.md: No such file"),
        ((".",), "could not read .: Is a directory"),
        (("-", "--in-place"), "--in-place needs a file"),
        (("text.md", "--in-place", "--output", "x"), "leave out --output"),
        (("text.md", "--output", "text.md"), "is what FILE reads"),
        (("text.md", "--output", "-", "--json", "-"), "cannot both go to standard output"),
        (("text.md", "--longest", "0"), "--longest must be at least 1"),
        (("/dev/null", "--in-place"), "needs a plain file"),
    ],
)
def test_what_makes_no_sense_is_told(run: Run, corrector: Path, arguments: Sequence[str], sentence: str) -> None:
    assert sentence in run("correct", *arguments).sentence()
    assert corrector.read_bytes() == TEXT.encode()


def test_a_text_without_a_sentence_comes_back(run: Run, corrector: Path) -> None:
    corrector.write_text("# Heading\n\n42\n")
    shown = run("correct", "text.md", "--output", "-")
    assert (shown.code, shown.out) == (0, "# Heading\n\n42\n")
    assert "0 of 0 sentences changed" in shown.err


def test_a_saved_model_corrects(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_network(tiny_network("block_causal", max_positions=256), tmp_path / "student")
    Path("text.md").write_text("Teh cat sat on the mat.\n")
    shown = run("correct", "text.md", "--model", "student", "--threshold", "0.5")
    assert shown.code == 0
    assert "of 1 sentences changed" in shown.err


def test_without_a_bundled_corrector_the_command_says_how_to_name_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewstep.cli.model_names.bundled_names", lambda: ["gsm-student"])
    Path("text.md").write_text("Teh cat sat on the mat.\n")
    assert "no correction model ships with fewstep yet; name one with --model" in run("correct", "text.md").sentence()
