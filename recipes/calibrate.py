"""Does a calibrated student keep its promise? Many calibrations, each on its own problems, judged on fresh ones.

    python recipes/calibrate.py --results results/calibrate

Reference and student (under every threshold) answer one pool of problems once, in jobs that are spread over the visible
GPUs; repeat the command until all are done. Every calibration is read from this table of right and wrong.
"""

from pathlib import Path
from random import Random
from typing import Annotated

import typer
from run_recipe import run_recipe
from task_options import Many

from fewstep.errors import FewstepError
from fewstep.measure.calibrate import paths_of, repeated
from fewstep.measure.contenders import Contender, answer_problems, load_contenders
from fewstep.measure.timing import write_figures
from fewstep.tasks.gsm_symbolic import make_problems
from fewstep.tasks.problems import Problem, read_problems, write_problem_file
from fewstep.tasks.registry import task_named

app = typer.Typer(pretty_exceptions_enable=False)


def pool_of(count: int, path: Path) -> list[Problem]:
    """So many development problems, shuffled: small templates give fewer new problems the longer the list is."""
    if not path.exists() or len(read_problems(path)) != count:
        write_problem_file(path, Random(0).sample(make_problems("dev", count), count))
    return read_problems(path)


@app.command()
def main(
    results_folder: Annotated[Path, typer.Option("--results")] = Path("results/calibrate"),
    model: str = "gsm-student",
    reference: str = "gsm-teacher",
    threshold: list[float] = [0.99, 0.97, 0.95, 0.93, 0.9, 0.86],  # noqa: B006
    gaps: int = 2,
    eps: list[float] = [0.01, 0.02, 0.03],  # noqa: B006
    confidence: float = 0.95,
    calibrations: Many = 20,
    n: Annotated[int, typer.Option(min=1, help="problems of a calibration")] = 500,
    fresh: Annotated[int, typer.Option(min=1, help="problems that judge them")] = 10_000,
    shard: Annotated[int, typer.Option(min=1, help="problems of a job, decoded together")] = 1_250,
    time_limit: Annotated[float | None, typer.Option(help="seconds after which no job is begun")] = None,
) -> None:
    """Answer what is missing, then calibrate: `calibrate.json`."""
    pool, paths = pool_of(calibrations * n + fresh, results_folder / "problems.jsonl"), paths_of(threshold, [gaps])
    everyone = [Contender(name=str(rule), model=model, settings=vars(rule)) for rule in paths[0]]
    everyone.append(Contender(name="reference", model=reference))
    found = answer_problems(
        everyone, load_contenders(everyone), {"pool": pool}, results_folder / "answers",
        task=task_named("gsm-symbolic"), batch_size=shard, shard=shard, time_limit_s=time_limit,
    )  # fmt: skip
    if found is None:
        return
    table = found["pool"]
    if missing := [one.name for one in everyone if one.name not in table or table[one.name].n < len(pool)]:
        raise FewstepError(f"not all problems are answered by {'; '.join(missing)}; repeat the command")
    rows = {name: report.to_json() for name, report in table.items()}
    tried = [repeated(table, paths, eps=value, confidence=confidence, n=n, calibrations=calibrations) for value in eps]
    for one in tried:
        some = f"{len(one['chosen'])} of {calibrations} calibrations found a setting"
        print(f"eps {one['eps']:g}: {some}, {one['within']} of these lose at most eps", flush=True)
    write_figures(results_folder / "calibrate.json", {"fresh": fresh, "rows": rows, "judged": tried})


if __name__ == "__main__":
    run_recipe(app)
