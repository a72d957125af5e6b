"""Every task by name. A module is imported when its task is asked for, so that `fewstep --help` imports none."""

from importlib import import_module
from typing import TYPE_CHECKING

from fewstep.errors import FewstepError, suggestion

if TYPE_CHECKING:
    from fewstep.tasks.task import Task

TASKS = {
    "gsm-symbolic": "fewstep.tasks.gsm_symbolic",
    "gsm8k": "fewstep.tasks.gsm8k",
    "correction": "fewstep.tasks.correction",
    "jsonl": "fewstep.tasks.jsonl",
}
"""Name -> module, whose `TASK` is the task. A new task is its module and one line here."""


def task_named(name: str) -> "Task":
    """FewstepError for an unknown name."""
    if name not in TASKS:
        raise FewstepError(f"task must be one of the known names, got {name!r}; {suggestion(name, TASKS)}")
    task: Task = import_module(TASKS[name]).TASK
    return task
