"""`fewstep calibrate`: the fastest threshold of a student whose loss is below eps with a stated confidence."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from annotated_types import Ge, Gt, Le, Lt

from fewstep.cli.evaluate import numbers
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json, PlaceOptions, ProblemOptions
from fewstep.cli.report import Advance, deliver, keeping_target, note, note_kept, print_table, progress_bar
from fewstep.cli.sources import Touches
from fewstep.errors import FewstepError
from fewstep.models.names import BUNDLED, local_folder
from fewstep.values import Count

if TYPE_CHECKING:
    from fewstep.engine.language_model import LanguageModel
    from fewstep.kept import Kept
    from fewstep.measure.calibrate import Measured, Rule, Trial
    from fewstep.measure.evaluate import Report
    from fewstep.models.calibration import Calibration
    from fewstep.tasks.problems import Problem

ANY = "any"


def calibrate(
    place: PlaceOptions,
    problems: ProblemOptions,
    model: Annotated[
        str,
        typer.Option(metavar="NAME", help="The student: a bundled name, a folder, or a hub id."),
        Touches.READS_MODEL,
    ] = "gsm-student",
    reference: Annotated[
        str,
        typer.Option(metavar="NAME", help="What the student is measured against: a bundled name, folder or hub id."),
        Touches.READS_MODEL,
    ] = "gsm-teacher",
    eps: Annotated[
        Annotated[float, Ge(1e-4), Lt(1)],
        typer.Option(help="How much accuracy may be lost at most, as a share: 0.02 is two points."),
    ] = 0.02,
    confidence: Annotated[
        Annotated[float, Gt(0), Le(0.999)],
        typer.Option(help="Confidence of what is promised, over the draw of the problems."),
    ] = 0.95,
    thresholds: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Thresholds to try, from the highest down until one fails (0.99 to 0.5)."),
    ] = None,
    gaps: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Numbers of gaps to try each threshold with, such as 0,2,{ANY}; they share the allowed error (the "
            "checkpoint's).",
        ),
    ] = None,
    max_new_tokens: Annotated[Count, typer.Option(help="Most new tokens, of both models.")] = 256,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a copy of the student with its new threshold."),
        Touches.REPLACES,
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FOLDER if it exists.")] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Write the new threshold into the student's own config.json.")
    ] = False,
    json: Json = None,
) -> None:
    """Chooses the fastest threshold whose loss against a reference is at most eps, with a stated confidence."""
    _check_place(model, output, overwrite=overwrite, in_place=in_place)
    for name in (model, reference):
        check_model_name(name)
    from fewstep.engine.made_by import answers_made_by
    from fewstep.kept import kept_results
    from fewstep.measure.calibrate import THRESHOLDS, paths_of
    from fewstep.measure.calibrate import calibrate as calibrate_paths
    from fewstep.measure.evaluate import check_problems

    asked = problems.read(problems.limit)
    counts = None if gaps is None else _gaps(gaps)
    _check_count(len(asked), eps, (1 - confidence) / len(counts or [None]))
    student = place.load(model)
    if student.role.name != "block_causal":
        raise FewstepError(
            f"{model} has the role {student.role.name}, whose checkpoints name no threshold; calibrate a "
            "block_causal student"
        )
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    tried = numbers(thresholds, float, "--thresholds") or THRESHOLDS
    paths = paths_of(tried, counts or [student.role.gaps])
    for path in paths:
        for rule in path:
            student.decoder(**settings, **vars(rule))  # refuses a bad threshold or number of gaps
    both = {"reference": place.load(reference), "student": student}
    for lm in both.values():
        check_problems(lm, asked, source=problems.source, **settings)

    def made_by() -> dict[str, Any]:
        questions = [problem.question for problem in asked]
        return {which: answers_made_by(lm, questions, **settings) for which, lm in both.items()}

    with kept_results(keeping_target(json, output), made_by) as kept:
        most = (1 + sum(map(len, paths))) * len(asked)
        note_kept(kept, most)
        with progress_bar("calibrating", most) as advance:
            answers = _Answers(both["reference"], student, problems, asked, kept, advance, settings)
            outcome = calibrate_paths(paths, answers.measured, eps=eps, confidence=confidence)
        promise = None
        if outcome.chosen is not None:
            promise = _promise(outcome.chosen, answers, reference, eps, confidence)
            _write(model, promise, output, overwrite=overwrite, in_place=in_place)
        report = {
            "model": model,
            **answers.about(reference),
            "eps": eps,
            "confidence": confidence,
            "calibration": None if promise is None else vars(promise),
            "chosen": None if outcome.chosen is None else outcome.chosen.to_json(),
            "trials": [trial.to_json() for trial in outcome.trials],
        }
        deliver(json, report, show=lambda: _print_trials(outcome.trials))
    if promise is None:
        raise FewstepError(_nothing_found(outcome.closest, reference, eps, confidence))
    note(f"{model} {promise.sentence()}; {_where(output, in_place)}")


@dataclass(frozen=True)
class _Answers:
    """The answers to the same problems, of the reference once and of the student under each rule."""

    reference: "LanguageModel"
    student: "LanguageModel"
    options: ProblemOptions
    asked: "list[Problem]"
    kept: "Kept"
    advance: Advance
    settings: Mapping[str, Any]

    @cached_property
    def of_reference(self) -> "Report":
        return self._report(self.reference, "reference")

    def measured(self, rule: "Rule") -> "Measured":
        """How the student does under a rule."""
        from fewstep.measure.calibrate import Measured

        reference = self.of_reference
        return Measured.of(rule, self._report(self.student, str(rule), **vars(rule)), reference)

    def about(self, reference: str) -> dict[str, Any]:
        """What was asked of whom, for the report."""
        return {
            "reference": reference,
            "reference_accuracy": self.of_reference.accuracy,
            "task": self.options.label,
            "split": self.asked[0].split,
            "metric": self.options.chosen.metric.name,
            "n": len(self.asked),
            **self.settings,
        }

    def _report(self, lm: "LanguageModel", name: str, **rule: Any) -> "Report":
        from fewstep.measure.evaluate import evaluate

        return evaluate(
            lm, self.asked, task=self.options.label, metric=self.options.chosen.metric,
            batch_size=self.options.batch_size, progress=self.advance, kept=self.kept.under(f"{name}: "),
            **self.settings, **rule,
        )  # fmt: skip


def _check_place(model: str, output: Path | None, *, overwrite: bool, in_place: bool) -> None:
    """FewstepError if the result could not be written, or to nowhere of the user's own, before any work."""
    if output is not None and in_place:
        raise FewstepError("--output writes a copy and --in-place changes the model itself; give one of them")
    if overwrite and output is None:
        raise FewstepError("--overwrite has no effect without --output; add it, or leave it out")
    if output is not None and os.path.isfile(output):
        raise FewstepError(f"{output} is a file, not a folder; name a folder")
    if output is not None and not overwrite and os.path.isdir(output) and os.listdir(output):
        raise FewstepError(f"the folder {output} is not empty; choose another, or overwrite it (--overwrite)")
    folder = local_folder(model) if in_place else None
    if in_place and (folder is None or Path(os.path.realpath(folder)).parent == BUNDLED):
        raise FewstepError(f"{model} is no folder of your own, and is never changed; write a copy with --output")


def _check_count(n: int, eps: float, level: float) -> None:
    """FewstepError if so few problems could not show it even if both models solved the same ones."""
    from fewstep.measure.noninferiority import Pairs, p_value

    if p_value(Pairs(0, 0, n), eps) > level:
        needed = math.ceil(math.log(level) / math.log(1 - eps))
        raise FewstepError(
            f"{n} problems are too few to show a loss below {eps:g} at the error {level:g}, even if none is lost; give "
            f"more than {needed}, and several times as many for a student that loses some"
        )


def _gaps(text: str) -> list[int | None]:
    counts = [None if part.strip() == ANY else part for part in text.split(",")]
    return [None if part is None else numbers(part, int, "--gaps")[0] for part in counts]


def _promise(chosen: "Trial", answers: _Answers, reference: str, eps: float, confidence: float) -> "Calibration":
    from fewstep.engine.made_by import made_by
    from fewstep.models.calibration import Calibration

    about = answers.about(reference)
    del about["reference_accuracy"]
    return Calibration(
        **about,
        **vars(chosen.measured.rule),
        reference_weights=made_by(answers.reference)["weights"],
        weights=made_by(answers.student)["weights"],
        eps=eps,
        confidence=confidence,
        loss=chosen.measured.pairs.loss,
        bound=chosen.bound,
    )


def _write(model: str, promise: "Calibration", output: Path | None, *, overwrite: bool, in_place: bool) -> None:
    from fewstep.files import write_folder_whole
    from fewstep.json_files import write_json_whole
    from fewstep.models.calibration import calibrated_config, copy_calibrated
    from fewstep.models.checkpoint_files import CONFIG
    from fewstep.models.load import holding, open_checkpoint

    folders = open_checkpoint(model)
    config = holding(folders, CONFIG) / CONFIG
    if output is not None:
        with write_folder_whole(output, overwrite=overwrite) as folder:
            copy_calibrated(folders[0], config, folder, promise)
    elif in_place:
        write_json_whole(folders[0] / CONFIG, calibrated_config(config, promise))


def _print_trials(trials: "list[Trial]") -> None:
    print_table(
        ["setting", "solved", "lost", "gained", "loss below", "certified", "tok/pass", "seconds"],
        [
            [
                trial.measured.rule,
                f"{trial.measured.accuracy:.1%}",
                trial.measured.pairs.only_reference,
                trial.measured.pairs.only_student,
                f"{trial.bound:.2%}",
                "yes" if trial.certified else "no",
                f"{trial.measured.tokens_per_forward:.2f}",
                f"{trial.measured.seconds:.3f}",
            ]
            for trial in trials
        ],
    )


def _nothing_found(closest: "Trial", reference: str, eps: float, confidence: float) -> str:
    measured = closest.measured
    return (
        f"no setting keeps the accuracy less than {100 * eps:g} points below that of {reference} with "
        f"{100 * confidence:g} % confidence, and no model was written: the closest, {measured.rule}, is "
        f"{100 * measured.pairs.loss:.2f} points below on these {measured.pairs.n} problems, and less than "
        f"{100 * closest.bound:.2f} points with {100 * (1 - closest.level):.4g} % confidence; give more problems, "
        "higher thresholds or, on other problems, a larger eps"
    )


def _where(output: Path | None, in_place: bool) -> str:
    if output is not None:
        return f"written to {output}"
    return "written into its config.json" if in_place else "nothing is written without --output or --in-place"
