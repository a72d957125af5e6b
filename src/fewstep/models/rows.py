"""Rows that people bring as JSONL or Parquet: their texts, their conversations and their ids.

A Parquet column that some rows do not have holds null there, so a null field counts as absent everywhere.
"""

import json
from collections.abc import Mapping
from typing import Any

from fewstep.errors import FewstepError
from fewstep.models.text import Message, check_text


def present(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the fields that are null."""
    return {name: value for name, value in row.items() if value is not None}


def row_id(row: Mapping[str, Any], line: int) -> Any:
    """The row's id, any JSON value, or the number of its line as text if it has none."""
    found = row.get("id")
    return str(line) if found is None else found


def id_text(found: Any) -> str:
    """An id as text, the same for equal ids only among those of one type: a text as it is, others as JSON."""
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True, default=str)


def id_key(found: Any) -> str:
    """What tells ids apart: `1` and `"1"` are two."""
    return json.dumps(found, sort_keys=True, default=str)


def text_of(value: Any, what: str, where: str) -> str:
    """FewstepError unless it is text."""
    if not isinstance(value, str):
        raise FewstepError(f"{where}: {what} must be text, got {type(value).__name__}")
    try:
        check_text(value)
    except FewstepError as error:
        raise FewstepError(f"{where}: {error}") from None
    return value


def messages_of(value: Any, what: str, where: str) -> list[Message]:
    """FewstepError unless it is a list of messages, each of role and content as text; what else one has is kept."""
    if not isinstance(value, list):
        raise FewstepError(f"{where}: {what} must be a list, got {type(value).__name__}")
    if not value:
        raise FewstepError(f"{where}: {what} is empty")
    turns = []
    for turn in value:
        fields = present(turn) if isinstance(turn, Mapping) else {}
        if not {"role", "content"} <= fields.keys():
            raise FewstepError(f"{where}: every message needs role and content")
        for field in ("role", "content"):
            text_of(fields[field], f"the {field} of a message", where)
        turns.append(fields)
    return turns


def prompt_of(value: Any, what: str, where: str) -> str | list[Message]:
    """Text, or a conversation. FewstepError if it is neither."""
    if isinstance(value, list):
        return messages_of(value, what, where)
    if not isinstance(value, str):
        raise FewstepError(f"{where}: {what} must be text or a list of messages, got {type(value).__name__}")
    return text_of(value, what, where)


def split_row(row: Mapping[str, Any], where: str) -> tuple[str | list[Message], str]:
    """Prompt and completion of a training row: prompt and completion, messages, or text.

    A completion may also be a list of one message, the assistant's. FewstepError naming `where`, file and line.
    """
    row = present(row)
    if "messages" in row:
        turns = messages_of(row["messages"], "messages", where)
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise FewstepError(f"{where}: messages must end with one of the assistant, after at least one other")
        return turns[:-1], turns[-1]["content"]
    if "prompt" in row and "completion" in row:
        return prompt_of(row["prompt"], "the prompt", where), _completion(row["completion"], where)
    if "text" in row:
        return "", text_of(row["text"], "what is to be learnt", where)
    raise _lacking(row, where, "a training row needs prompt and completion, messages, or text")


def split_prompt_row(row: Mapping[str, Any], where: str) -> tuple[str | list[Message], str | None]:
    """As `split_row`, of a row that may be a prompt alone; its completion is None then."""
    row = present(row)
    if "messages" in row:
        turns = messages_of(row["messages"], "messages", where)
        if len(turns) > 1 and turns[-1]["role"] == "assistant":
            return turns[:-1], turns[-1]["content"]
        return turns, None
    if "prompt" in row and "completion" not in row:
        return prompt_of(row["prompt"], "the prompt", where), None
    if not {"prompt", "text"} & row.keys():
        raise _lacking(row, where, "a row needs a prompt, messages, or text")
    return split_row(row, where)


def _completion(value: Any, where: str) -> str:
    if not isinstance(value, list):
        return text_of(value, "what is to be learnt", where)
    turns = messages_of(value, "the completion", where)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise FewstepError(f"{where}: a completion of messages must be one message, of the assistant")
    return turns[0]["content"]


def _lacking(row: Mapping[str, Any], where: str, needs: str) -> FewstepError:
    return FewstepError(f"{where}: {needs}; its fields are: {', '.join(map(repr, row)) or 'none'}")
