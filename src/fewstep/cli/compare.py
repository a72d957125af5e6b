"""`fewstep compare`: two models, or two settings of one, on the same problems."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fewstep.cli.decoding import read_setting, spelt_settings
from fewstep.cli.evaluate import print_figures
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json, PlaceOptions, ProblemOptions
from fewstep.cli.report import deliver, keeping_target, note_kept, progress_bar
from fewstep.cli.sources import Touches
from fewstep.errors import FewstepError, suggestion

SPECIFICATION = "MODEL[,setting=value...]"


def compare(
    place: PlaceOptions,
    problems: ProblemOptions,
    first: Annotated[
        str, typer.Argument(metavar=SPECIFICATION, help="For example gsm-student,threshold=0.9"), Touches.READS_MODEL
    ],
    second: Annotated[
        str, typer.Argument(metavar=SPECIFICATION, help="For example gsm-teacher,steps=32"), Touches.READS_MODEL
    ],
    json: Json = None,
) -> None:
    """Compares two models or settings on the same problems, with a paired test."""
    contenders = [read_specification(first), read_specification(second)]
    for name, _ in contenders:
        check_model_name(name)
    from fewstep.engine.made_by import answers_made_by
    from fewstep.kept import kept_results
    from fewstep.measure.compare import compare as compare_reports
    from fewstep.measure.evaluate import check_problems, evaluate

    task, asked = problems.chosen, problems.read(problems.limit)
    models = [place.load(name, settings.pop("role", None)) for name, settings in contenders]
    for lm, (_, settings) in zip(models, contenders, strict=True):
        # Refuse a bad setting, or a problem that one cannot take, before the first long run.
        check_problems(lm, asked, source=problems.source, **settings)

    def made_by() -> dict[str, Any]:
        questions = [problem.question for problem in asked]
        both = zip(("first", "second"), models, contenders, strict=True)
        return {which: answers_made_by(lm, questions, **settings) for which, lm, (_, settings) in both}

    with kept_results(keeping_target(json), made_by) as kept:
        note_kept(kept, 2 * len(asked))
        with progress_bar("comparing", 2 * len(asked)) as advance:
            reports = [
                evaluate(
                    lm, asked, task=problems.label, metric=task.metric, batch_size=problems.batch_size,
                    progress=advance, kept=kept.under(f"{which}: "), **settings,
                )
                for which, lm, (_, settings) in zip(("first", "second"), models, contenders, strict=True)
            ]  # fmt: skip
        comparison = compare_reports(reports[0], reports[1], settings=(contenders[0][1], contenders[1][1]))
        named = [{**report.to_json(), "model": name} for report, name in zip(reports, comparison.names, strict=True)]

        def show() -> None:
            print_figures(named)
            print(comparison.sentence())
            print(
                f"First / second: tokens per pass {comparison.tokens_per_forward_ratio:.2f}x, "
                f"median seconds {comparison.seconds_ratio:.3f}x."
            )

        deliver(json, comparison.to_json(), show=show)


def read_specification(specification: str, texts: Sequence[str] = ("role",)) -> tuple[str, dict[str, Any]]:
    """Name and settings, in the types in which they are declared; `texts`, such as the role, may be among them."""
    name, *parts = specification.split(",")
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        key = key.replace("-", "_")
        if key in settings:
            raise FewstepError(f"{key} is set twice in {specification!r}; leave one out")
        if not equals or key not in (*texts, *spelt_settings()):
            hint = suggestion(key if equals else "", [*texts, *spelt_settings()], otherwise="settings:")
            raise FewstepError(f"{part!r} in {specification!r} is no setting=value; {hint}")
        settings[key] = value if key in texts else read_setting(key, value)
    return name, settings
