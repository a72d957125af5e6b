"""`fewstep chat`: a conversation in a terminal, whose answers are seen as they form, or line by line through a pipe."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fewstep.cli.conversation import Conversation, Turn, conversation_with, why_alone
from fewstep.cli.decoding import DecodingOptions, read_setting, spelt_settings
from fewstep.cli.forming import Forming, shown_forming
from fewstep.cli.lines import Interrupts, line_editing, piped_lines, typed_lines
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json, ModelOptions
from fewstep.cli.report import deliver, note
from fewstep.cli.terminal import printable
from fewstep.errors import FewstepError, suggestion
from fewstep.models.names import is_bundled
from fewstep.values import shown

if TYPE_CHECKING:
    from fewstep.engine.language_model import LanguageModel


def chat(
    model: ModelOptions,
    decoding: DecodingOptions,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before the conversation.")
    ] = None,
    remember: Annotated[
        bool | None,
        typer.Option(
            "--remember/--no-remember",
            help="Tell the model the turns before a question. By default a model with a chat template is told them; "
            "the bundled ones are not, since they were trained on single questions.",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End an answer before this text; repeat the option for further texts."),
    ] = None,
    json: Json = None,
) -> None:
    """Holds a conversation in the terminal; /help lists what can be typed besides questions."""
    check_model_name(model.model)
    settings = decoding.given() | ({"stop": tuple(stop)} if stop else {})
    with _loading(model.model):
        lm = model.load_model()
    check_settings(lm, settings)
    bundled = is_bundled(model.model)
    conversation = conversation_with(lm, system=system, remembers=remember, bundled=bundled)
    network = lm.network
    note(f"{network.name}, {lm.role.name}, {network.num_parameters / 1e6:.1f} M parameters, {network.device}")
    if not conversation.remembers:
        reason = why_alone(lm, bundled=bundled) or "--no-remember"
        note(f"Each question is answered alone, without the turns before it ({reason}).")
    session = Session(lm, conversation, settings)
    if sys.stdin.isatty():
        note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.")
        with Interrupts() as interrupts, line_editing([*(f"/{name}" for name in COMMANDS), *spelt_settings()]):
            session.hold(typed_lines(interrupts), interrupts)
    else:
        session.hold(piped_lines(), None)
    deliver(json, session.report())
    if session.num_refused and not sys.stdin.isatty():
        raise typer.Exit(2)


def check_settings(lm: "LanguageModel", settings: dict[str, Any]) -> None:
    """FewstepError if the model cannot answer even a short question with these settings."""
    from fewstep.engine.settings import GenerationSettings

    lm.checker(**settings)(GenerationSettings.of(**settings).request(lm.encode("?")))


@contextmanager
def _loading(name: str) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"loading {name}"):
        yield


class _EndOfChat(Exception):  # noqa: N818  (no error)
    """/quit."""


class Session:
    """A conversation as it is held: takes questions and commands, and prints answers to standard output and all else to
    standard error.
    """

    def __init__(self, lm: "LanguageModel", conversation: Conversation, settings: dict[str, Any]) -> None:
        self.num_refused = 0
        self._lm, self._conversation, self._settings = lm, conversation, settings
        self._answered: list[Turn] = []  # those that were cleared or asked again too
        self._num_retries = 0
        self._num_left_out = 0
        self._saved: set[Path] = set()

    def hold(self, lines: Iterator[str], interrupts: Interrupts | None) -> None:
        """Take all lines, or those up to /quit. What is refused is said, and the conversation goes on."""
        for line in lines:
            try:
                self._take(line, interrupts)
            except _EndOfChat:
                return
            except FewstepError as error:
                self.num_refused += 1
                note(str(error))
            except KeyboardInterrupt:  # while no answer was under way
                if interrupts is None or interrupts.terminated:
                    raise

    def report(self) -> dict[str, Any]:
        """The turns as they stand, and the sums over all answers that were given."""
        num_forwards = sum(turn.num_forwards for turn in self._answered)
        num_tokens = sum(turn.num_tokens for turn in self._answered)
        return {
            "model": self._lm.network.name,
            "role": self._lm.role.name,
            "system": self._conversation.system,
            "remembers": self._conversation.remembers,
            "turns": [asdict(turn) for turn in self._conversation.turns],
            "num_answers": len(self._answered),
            "num_tokens": num_tokens,
            "num_forwards": num_forwards,
            "num_draft_forwards": sum(turn.num_draft_forwards for turn in self._answered),
            "tokens_per_forward": num_tokens / num_forwards if num_forwards else None,
            "seconds": sum(turn.seconds for turn in self._answered),
        }

    def _take(self, line: str, interrupts: Interrupts | None) -> None:
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            if name not in COMMANDS:
                hint = suggestion(f"/{name}", [f"/{one}" for one in COMMANDS])
                raise FewstepError(f"unknown command {shown('/' + name)}; {hint}, or begin with // to send a question")
            COMMANDS[name].run(self, rest.strip(), interrupts)
        elif text:
            self._conversation.turns.append(self._answer(text.removeprefix("/"), self._settings, interrupts))
            self._num_retries = 0

    def _answer(self, question: str, settings: dict[str, Any], interrupts: Interrupts | None) -> Turn:
        """Answer a question and print the answer."""
        from fewstep.engine.settings import GenerationSettings

        num_new = GenerationSettings.of(**settings).max_new_tokens
        prompt, num_left_out = self._conversation.prompt(self._lm, question, num_new=num_new)
        if num_left_out > self._num_left_out:
            room = f"the {self._lm.network.max_positions} positions of {self._lm.network.name}"
            note(f"The first {num_left_out} turns no longer fit into {room}, and are not told to it.")
        self._num_left_out = num_left_out
        block_size = self._lm.manner(**settings).rule.get("block_size") or 1
        forming = Forming(self._lm, block_size=block_size, max_new_tokens=num_new)
        stream, started_s = self._lm.stream(prompt, **settings), time.perf_counter()
        with nullcontext() if interrupts is None else interrupts.during_answer(), _shown(forming) as show:
            for event in stream:
                show(forming.add(event))
                if interrupts is not None and interrupts.asked_to_stop:
                    break
        output, text = stream.output, stream.answer_text()
        turn = Turn(
            question=question,
            answer=text,
            finish_reason="cancelled" if output is None else output.finish_reason,
            num_prompt_tokens=len(self._lm.encode(prompt)),
            num_tokens=forming.num_settled if output is None else output.num_tokens,
            num_forwards=forming.num_forwards if output is None else output.num_forwards,
            num_draft_forwards=0 if output is None else output.num_draft_forwards,
            seconds=time.perf_counter() - started_s if output is None else output.seconds,
            settings=dict(settings),
        )
        print(printable(text) if sys.stdout.isatty() else text, flush=True)
        note(turn.described())
        self._answered.append(turn)
        return turn

    # The commands

    def _help(self, _: str, __: Interrupts | None) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            note(f"{command.usage:{width}}  {command.help}")
        note(
            "A line that ends in a backslash goes on in the next one; // at its beginning sends a question with one /."
        )

    def _set(self, rest: str, _: Interrupts | None) -> None:
        if not rest:
            self._note_settings()
            return
        # Some settings need each other, as decoder=speculative draft=NAME: those are given together.
        words = re.sub(r"\s*=\s*", "=", rest).split()
        pairs = [word.partition("=") for word in words] if all("=" in word for word in words) else [rest.partition(" ")]
        changed = {}
        for name, _equals, value in pairs:
            known = self._known(name)
            if not value.strip():
                raise FewstepError(f"/set {name} needs a value; /unset {name} takes it back to the model's own")
            changed[known] = read_setting(known, value.strip(), called=known)
        self._change({**self._settings, **changed})
        for name, value in changed.items():
            note(f"{name} is {value}")

    def _unset(self, rest: str, _: Interrupts | None) -> None:
        known = self._known(rest)
        self._change({name: value for name, value in self._settings.items() if name != known})
        note(f"{known} is the model's own")

    def _known(self, name: str) -> str:
        found = spelt_settings()
        if name not in found:
            raise FewstepError(f"unknown setting {shown(name)}; {suggestion(name, found)}")
        return found[name].name

    def _change(self, settings: dict[str, Any]) -> None:
        """FewstepError, with the settings as they were, for those that this model does not take."""
        check_settings(self._lm, settings)
        self._settings = settings

    def _note_settings(self) -> None:
        manner = self._lm.manner(**self._settings)
        own = {name: value for name, value in manner.rule.items() if value is not None}
        for name, value in {"decoder": manner.decoder, **own, **self._settings}.items():
            note(f"{name} is {value}" + ("" if name in self._settings else " (the model's own)"))

    def _save(self, rest: str, _: Interrupts | None) -> None:
        if not rest:
            raise FewstepError("/save needs the name of a file")
        path = Path(rest).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise FewstepError(f"{path} is there already; name another file")
        rows = self._conversation.rows()
        if not rows:
            raise FewstepError("there is no answer to save yet")
        from fewstep.json_files import write_rows_whole

        write_rows_whole(path, rows)
        self._saved.add(path.resolve())
        note(f"The conversation is saved in {path}")

    def _clear(self, _: str, __: Interrupts | None) -> None:
        self._conversation.turns.clear()
        self._num_left_out = 0
        note("The conversation begins anew.")

    def _retry(self, _: str, interrupts: Interrupts | None) -> None:
        if not self._conversation.turns:
            raise FewstepError("there is no question to ask again yet")
        last = self._conversation.turns.pop()
        try:
            settings = dict(self._settings)
            if settings.get("temperature"):
                settings["seed"] = settings.get("seed", 0) + self._num_retries + 1
            elif settings == last.settings:
                note("The temperature is 0, so the answer is the same; /set temperature 0.7 lets it vary.")
            turn = self._answer(last.question, settings, interrupts)
            if turn.answer or not last.answer:
                last = turn
                self._num_retries += 1
        finally:
            self._conversation.turns.append(last)

    def _stats(self, _: str, __: Interrupts | None) -> None:
        report = self.report()
        note(f"{report['model']}, {report['role']}, decoder {self._lm.manner(**self._settings).decoder}")
        if not self._answered:
            note("No question was answered yet.")
            return
        last = self._answered[-1]
        note(f"last answer: {last.described()}; prompt of {last.num_prompt_tokens} tokens")
        ratio = "-" if report["tokens_per_forward"] is None else f"{report['tokens_per_forward']:.2f}"
        speed = f"{report['num_tokens'] / report['seconds']:.1f}" if report["seconds"] else "-"
        note(
            f"{report['num_answers']} answers: {report['num_tokens']} tokens in {report['num_forwards']} passes "
            f"({ratio} per pass), {report['seconds']:.2f} s ({speed} tokens per second)"
        )
        alone = "" if self._conversation.remembers else ", each asked alone"
        note(f"turns of the conversation: {len(self._conversation.turns)}{alone}")

    def _quit(self, _: str, __: Interrupts | None) -> None:
        raise _EndOfChat


@contextmanager
def _shown(forming: Forming) -> Iterator[Callable[[str], None]]:
    """Yields what to call with the settled text's growth. A terminal shows the answer forming."""
    console = Console()
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda _: None
        return
    with shown_forming(forming, console) as redraw:
        redraw()
        yield lambda _: redraw()


@dataclass(frozen=True)
class Command:
    """What can be typed besides questions."""

    usage: str
    help: str
    run: Callable[[Session, str, Interrupts | None], None]


COMMANDS = {
    "help": Command("/help", "lists the commands", Session._help),
    "set": Command("/set NAME VALUE", "changes a setting, such as threshold 0.9; /set alone shows them", Session._set),
    "unset": Command("/unset NAME", "takes a setting back to the model's own", Session._unset),
    "retry": Command(
        "/retry", "asks the last question again; with another seed if the temperature is above 0", Session._retry
    ),
    "clear": Command("/clear", "forgets the turns so far", Session._clear),
    "save": Command("/save FILE", "writes the conversation as JSON lines of messages", Session._save),
    "stats": Command("/stats", "shows tokens, passes and times", Session._stats),
    "quit": Command("/quit", "ends the conversation, as Ctrl-D does", Session._quit),
}
