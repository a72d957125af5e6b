"""Seconds of an answer on an idle machine, and beside as many spinning processes as it has cores.

    python recipes/busy_machine.py [--torch-first]

Run it on a machine that is idle otherwise; OMP_WAIT_POLICY=active shows what waiting threads that spin cost.
"""

import os
import subprocess
import sys
import time
from typing import Annotated

TORCH_FIRST = "--torch-first"
if TORCH_FIRST in sys.argv:
    import torch  # noqa: F401  (before anything of fewstep)

import typer  # noqa: E402
from run_recipe import run_recipe  # noqa: E402
from task_options import Many  # noqa: E402

import fewstep  # noqa: E402
from fewstep.measure.timing import time_interleaved  # noqa: E402
from fewstep.tasks.gsm_symbolic import problems as problems_of  # noqa: E402

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    model: str = "gsm-student",
    problems: Many = 8,
    rounds: Many = 4,
    torch_first: Annotated[bool, typer.Option(TORCH_FIRST, help="load torch before fewstep")] = False,
) -> None:
    """Print the medians and their ratio."""
    del torch_first  # see above
    lm = fewstep.load(model)
    questions = [problem.question for problem in problems_of("dev", problems)]

    def median_seconds() -> float:
        return time_interleaved({model: lm.generate}, questions * rounds)[model].seconds_median

    idle_s = median_seconds()
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(1)
        busy_s = median_seconds()
    finally:
        for process in spinning:
            process.kill()
    print(f"idle {idle_s:.3f} s, busy {busy_s:.3f} s: {busy_s / idle_s:.2f} times as long")


if __name__ == "__main__":
    run_recipe(app)
