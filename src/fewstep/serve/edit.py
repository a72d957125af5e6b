"""POST /v1/edit/completions, in the shape of Inception's: one user message with the part to edit in tags."""

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fewstep.models.text import before_stop
from fewstep.serve.answering import Asked, finish_reason, gap_text, limit_for, outputs_of, usage_of
from fewstep.serve.errors import ApiError
from fewstep.serve.fields import EditBody, limit_of, text_of
from fewstep.serve.infill import fill, gap_between
from fewstep.serve.server import Server, note_usage
from fewstep.serve.text_answers import Head, stop_setting

_TO_EDIT = re.compile(r"<\|code_to_edit\|>\n?(.*?)\n?<\|/code_to_edit\|>", re.DOTALL)
_FILE = re.compile(
    r"<\|current_file_content\|>\n?(?:current_file_path:[^\n]*\n)?(.*?)<\|/current_file_content\|>", re.DOTALL
)
_CURSOR = "<|cursor|>"


async def edit_completions(server: Server, request: Request) -> Response:
    """A model that sees both sides writes the part anew, from the cursor on if there is one; any other is given the
    whole message through its chat template.
    """
    body, fields, entry = await server.read_asking(request, EditBody)
    message = body.messages[0]
    text = text_of(message.content)
    part = _TO_EDIT.search(text)
    if message.role != "user" or part is None:
        raise ApiError(
            "an edit is one user message with the part to edit between <|code_to_edit|> and <|/code_to_edit|>",
            param="messages",
            code="invalid_value",
        )
    stop = stop_setting(body)
    seed = fields.seeds(1)[0]
    if entry.infills:
        before, after = _around(text, part)
        kept, cursor, _ = part[1].partition(_CURSOR)
        kept = kept if cursor else ""
        asked, suffix_ids = await gap_between(
            server, entry, before + kept, after, {**fields.settings, "seed": seed}, limit=limit_of(body), gap=None
        )
        filled = await fill(server, request, asked, suffix_ids)
        answer = kept + before_stop(gap_text(filled.asked, filled.output), stop.get("stop", ()))
        usage = usage_of(len(asked.prompt_ids) + len(suffix_ids), [filled.output], **filled.told)
        finish = "stop"
    else:
        prompt_ids = await server.encoder.chat(entry, [message.plain()])
        limit = limit_for(entry, len(prompt_ids), limit_of(body))
        settings = {**fields.settings, **stop, "max_new_tokens": limit, "seed": seed}
        handles = await server.begin(request, [Asked(entry=entry, prompt_ids=prompt_ids, settings=settings)])
        output = (await outputs_of(handles))[0]
        answer, finish = output.text, finish_reason(output)
        usage = usage_of(len(prompt_ids), [output])
    note_usage(request, usage)
    choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": finish}
    head = Head.new("edit", "edit.completion", entry.name, server)
    return JSONResponse({**head.fields(), "choices": [choice], "usage": usage})


def _around(text: str, part: re.Match[str]) -> tuple[str, str]:
    """What stands before and behind the part in its file; all else in the message is no text of the file."""
    file = next((one for one in _FILE.finditer(text) if one.start() <= part.start() < one.end()), None)
    if file is None:
        return "", ""
    return text[file.start(1) : part.start()], text[part.end() : file.end(1)]
