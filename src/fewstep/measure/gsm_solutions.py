"""The former place of `fewstep.tasks.answers`: scripts written for version 0.1 still find it here until 0.2."""

from fewstep.tasks.answers import extract_answer, is_correct

__all__ = ["extract_answer", "is_correct"]
