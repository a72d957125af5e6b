"""What the endpoints take: their fields, checked; a field that has no effect here is refused, never ignored.

The few-step settings are those that `GenerationSettings`, the decoders and the policies declare, with their names,
bounds and help. A request may not name what the server would load (a draft, heads), nor choose the engine.
"""

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from fewstep.decode.declarations import Declared, declared_settings
from fewstep.decode.registry import DECODERS, GENERATORS, POLICIES, declarers, setting_names
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError, suggestion
from fewstep.serve.errors import ApiError
from fewstep.values import Count, fitted, shown

MOST_CHOICES = 128
"""Answers to one request, over all its prompts."""

MOST_TOP = 20
"""Most probable tokens that a request may ask for."""

_KEPT_BACK = ("engine", "max_new_tokens")
"""Settings that are no fields: the operator's, and the limit, which has the names of OpenAI."""

LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""Names of the limit of new tokens; each endpoint takes some of them."""


class Part(BaseModel):
    """Anything inside a body. Fields that are not declared are refused, and no text counts as a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Extra(Part):
    """What only this server has, `fewstep` in a body: each endpoint takes of it what has an effect there."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        nothing = {name for name, value in given.items() if name in GapExtra.model_fields and value in (None, False)}
        return {name: value for name, value in given.items() if name in cls.model_fields or name not in nothing}


class CanvasExtra(Extra):
    canvas: Annotated[bool, Field(description="Send the canvas with its steps as it forms, in every chunk.")] = False


class GapExtra(CanvasExtra):
    gap: Annotated[
        Count | None,
        Field(description="Tokens of the gap before a suffix; by default lengths up to the limit are tried."),
    ] = None


class StreamOptions(Part):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


def _at_most_four(stop: str | list[str] | None) -> str | list[str] | None:
    if isinstance(stop, list) and len(stop) > 4:
        raise ValueError(f"at most four texts end an answer, got {len(stop)}")
    return stop


Stop = Annotated[
    str | list[str] | None, AfterValidator(_at_most_four), Field(description="Texts before which an answer ends.")
]


class Body(Part):
    """What all endpoints take that answer."""

    model: Annotated[str | None, Field(description="One of /v1/models; by default the first.")] = None
    fewstep: Extra | None = None
    user: Annotated[str | None, Field(description="Has no effect.")] = None
    metadata: Annotated[dict[str, str] | None, Field(description="Has no effect.")] = None
    safety_identifier: Annotated[str | None, Field(description="Has no effect.")] = None
    prompt_cache_key: Annotated[str | None, Field(description="Has no effect.")] = None
    service_tier: Annotated[Literal["auto", "default"] | None, Field(description="Has no effect.")] = None


class StreamBody(Body):
    stream: Annotated[bool | None, Field(description="Send the answer as it grows.")] = None
    stream_options: StreamOptions | None = None
    diffusing: Annotated[
        bool | None, Field(description="Each chunk of a stream holds the whole text as it stands, open tokens marked.")
    ] = None
    stop: Stop = None
    n: Annotated[int | None, Field(ge=1, le=MOST_CHOICES, description="Answers to each prompt.")] = None
    fewstep: CanvasExtra | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(Part):
    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Content = str | list[TextPart]


class ChatMessage(Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": text_of(self.content),
            **({"name": self.name} if self.name is not None else {}),
            **({"reasoning_content": self.reasoning_content} if self.reasoning_content is not None else {}),
        }


def text_of(content: Content) -> str:
    """The text of a message; parts follow each other."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatBody(StreamBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    generation_config: Annotated[
        str | None, Field(description="Settings as the text of a generation config, as `transformers chat` sends them.")
    ] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP)] = None


class CompletionBody(StreamBody):
    """POST /v1/completions"""

    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        Field(description="One or several texts, or their token ids; taken as they are, without a chat template."),
    ]
    suffix: Annotated[str | None, Field(description="What follows the gap that is to be filled.")] = None
    fewstep: GapExtra | None = None
    max_tokens: Count | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_TOP)] = None


class FimBody(StreamBody):
    """POST /v1/fim/completions"""

    prompt: str
    suffix: str | None = None
    fewstep: GapExtra | None = None
    max_tokens: Count | None = None


class EditBody(Body):
    """POST /v1/edit/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1)]
    max_tokens: Count | None = None
    stop: Stop = None


class InputItem(Part):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class TextFormat(Part):
    type: Literal["text"]


class TextOptions(Part):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(Body):
    """POST /v1/responses"""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[
        list[dict[str, Any]] | None, Field(description="Functions are refused; types that are not known are skipped.")
    ] = None

    @field_validator("tools")
    @classmethod
    def _no_functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        if any(tool.get("type") in ("function", "custom") for tool in tools or ()):
            raise ValueError("functions are not supported by this server; leave them out")
        return tools


class LoadBody(Part):
    """POST /load_model"""

    model: str


class VoteBody(Part):
    """POST /compare/votes"""

    a: Annotated[str, Field(min_length=1, max_length=200)]
    b: Annotated[str, Field(min_length=1, max_length=200)]
    winner: Literal["a", "b", "tie"]
    prompt: Annotated[str | None, Field(max_length=20_000)] = None


_NOTHING: tuple[Any, ...] = (None,)
_PENALTIES = dict.fromkeys(("frequency_penalty", "presence_penalty"), (None, 0, 0.0))
_TOOLS: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
}
_TEXT_ONLY = (None, {"type": "text"})

UNSUPPORTED: dict[type[Part], dict[str, tuple[Any, ...]]] = {
    ChatBody: {
        **_PENALTIES,
        **_TOOLS,
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "logit_bias": (None, {}),
        "response_format": _TEXT_ONLY,
        "modalities": (None, ["text"]),
        "audio": _NOTHING,
        "prediction": _NOTHING,
        "reasoning_effort": (None, "none"),
        "store": (None, False),
        "verbosity": (None, "medium"),
        "web_search_options": _NOTHING,
        "min_p": (None, 0, 0.0),
        "repetition_penalty": (None, 1, 1.0),
    },
    CompletionBody: {
        **_PENALTIES,
        "best_of": (None, 1),
        "echo": (None, False),
        "logit_bias": (None, {}),
        "response_format": _TEXT_ONLY,
        "min_p": (None, 0, 0.0),
        "repetition_penalty": (None, 1, 1.0),
    },
    FimBody: {**_PENALTIES, "logit_bias": (None, {})},
    EditBody: {**_PENALTIES, **_TOOLS, "stream": (None, False), "diffusing": (None, False), "n": (None, 1)},
    ResponsesBody: {
        "background": (None, False),
        "context_management": _NOTHING,
        "conversation": _NOTHING,
        "include": (None, [], ["reasoning.encrypted_content"]),
        "max_tool_calls": _NOTHING,
        "parallel_tool_calls": (None, True, False),
        "previous_response_id": _NOTHING,
        "prompt": _NOTHING,
        "reasoning": (None, {}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
        "store": (None, False),
        "tool_choice": (None, "none", "auto"),
        "top_logprobs": (None, 0),
        "truncation": (None, "disabled"),
    },
}
"""Fields of OpenAI's that are not supported, with the values that ask for nothing."""


@cache
def few_step_settings() -> dict[str, Declared]:
    """Setting, under each of its names -> how it is declared."""
    found = dict(declared_settings(GenerationSettings))
    for name in setting_names():
        owners = (DECODERS, POLICIES, GENERATORS)
        if of_all := [one for entries in owners for one in declarers(name, entries).values()]:
            found.setdefault(name, of_all[0])
    found = {name: one for name, one in found.items() if name not in _KEPT_BACK and one.details.reads is None}
    return found | {alias: declared for declared in found.values() for alias in declared.details.aliases}


def _is_the_operators(name: str) -> bool:
    """Whether it is a setting that requests may not name."""
    return name == "engine" or (name in setting_names() and name not in few_step_settings())


_Read = TypeVar("_Read", bound=Part)


@dataclass(frozen=True)
class Fields:
    """The settings of generation among the fields of a body, by name."""

    settings: dict[str, Any]

    def seeds(self, count: int) -> list[int]:
        """One for each answer to a prompt: the seed that was given and those after it, or else any."""
        drawn = secrets.randbits(62) if self.settings.get("temperature") else 0
        first = self.settings.get("seed", drawn)
        return [(first + number + (1 << 63)) % (1 << 64) - (1 << 63) for number in range(count)]


def read_fields(body: Mapping[str, Any], kind: type[_Read]) -> tuple[_Read, Fields]:
    """The body as one of this kind, and the settings in it. ApiError naming the first field that is wrong."""
    rest = with_generation_config(body) if kind is ChatBody else dict(body)
    for name, harmless in UNSUPPORTED.get(kind, {}).items():
        if name in rest:
            _check_harmless(name, rest.pop(name), harmless)
    settings = {}
    for name, declared in few_step_settings().items() if issubclass(kind, Body) else ():
        # A field of the endpoint may have the name of a setting, and comes first.
        if name in rest and name not in kind.model_fields:
            value = rest.pop(name)
            if value is None:
                continue
            if declared.name in settings:
                raise ApiError(f"{name} is another name of {declared.name}; give one of them", param=name)
            settings[declared.name] = _setting(name, declared, value)
    try:
        read = kind.model_validate(rest)
    except ValidationError as error:
        raise _refusal(error, kind) from None
    return read, Fields(settings)


def with_generation_config(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the settings that `transformers chat` sends as the text of a generation config; a field beside it
    comes first. ApiError if the text is none.
    """
    rest = dict(body)
    text = rest.pop("generation_config", None)
    if text is None:
        return rest
    try:
        config = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ApiError("generation_config must be the text of a JSON object; correct it", param="generation_config")
    config = {name: value for name, value in config.items() if name != "transformers_version"}
    samples, limit = config.pop("do_sample", None), config.pop("max_new_tokens", None)
    if samples is not None:
        config["temperature"] = config.get("temperature", 1.0) if samples else 0.0
    if limit is not None and not any(name in rest for name in LIMITS):
        config["max_tokens"] = limit
    return config | rest


def _setting(name: str, declared: Declared, value: Any) -> Any:
    try:
        fit = fitted(value, str if name in ("decoder", "policy") else declared.type, name)
        # What one owner of a setting refuses another may take: bounds are checked again with the decoder.
        if name in ("decoder", "temperature", "top_p", "top_k", "seed"):
            GenerationSettings.of(**{name: fit})
    except FewstepError as error:
        raise ApiError(str(error), param=name, code="invalid_value") from None
    return fit


def _check_harmless(name: str, value: Any, harmless: Iterable[Any]) -> None:
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless):
        raise ApiError(
            f"{name} is not supported by this server; leave it out", param=name, code="unsupported_parameter"
        )


def _refusal(error: ValidationError, kind: type[Part]) -> ApiError:
    """The first fault in a sentence, with the field as OpenAI spells it: `messages[0].content`."""
    faults = error.errors(include_url=False, include_context=True)
    # Of a field that may be of several types there is one fault for each; the deepest tells most.
    first = faults[0]["loc"][0] if faults[0]["loc"] else None
    fault = max((one for one in faults if one["loc"][:1] == (first,)), key=lambda one: len(_path(one["loc"])))
    where = _spelt(_path(fault["loc"]))
    match fault["type"]:
        case "missing":
            return ApiError(f"{where} is missing; give it", param=where, code="missing_required_parameter")
        case "extra_forbidden":
            name = str(_path(fault["loc"])[-1])
            if issubclass(kind, Body) and _is_the_operators(where):
                sentence = f"{where} is for the operator of the server to set; leave it out"
                return ApiError(sentence, param=where, code="unsupported_parameter")
            if where == f"fewstep.{name}" and name in GapExtra.model_fields:
                sentence = f"{where} has no effect at this endpoint; leave it out"
                return ApiError(sentence, param=where, code="unsupported_parameter")
            known = [*kind.model_fields, *(few_step_settings() if issubclass(kind, Body) else ())]
            hint = suggestion(name, known, otherwise="known fields:") if where == name else "leave it out"
            return ApiError(f"unknown field {shown(where)}; {hint}", param=where, code="unknown_parameter")
    said = fault["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    got = "" if fault["type"] in ("too_short", "too_long") else f", got {shown(fault['input'])}"
    return ApiError(f"{where}: {said.replace('input should', 'it should')}{got}", param=where, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Without what pydantic adds for the members of a union, such as `list[str]`, `constrained-int` or `TextPart`."""
    return tuple(
        part
        for index, part in enumerate(location)
        if index == 0 or isinstance(part, int) or (part.isidentifier() and part.islower() and part not in _TYPES)
    )


_TYPES = ("str", "int", "float", "bool", "none", "list", "dict")


def _spelt(path: Iterable[int | str]) -> str:
    spelt = ""
    for part in path:
        spelt += f"[{part}]" if isinstance(part, int) else f".{part}" if spelt else part
    return spelt


def limit_of(read: Part) -> tuple[str, int] | None:
    """The limit of new tokens that was given, with its name; None without one. ApiError if two names differ."""
    given = {name: value for name in LIMITS if (value := getattr(read, name, None)) is not None}
    if len(set(given.values())) > 1:
        first, second, *_ = given
        raise ApiError(f"{first} and {second} both limit the answer, and differ; give one", param=first)
    return next(iter(given.items()), None)


# The OpenAPI document


def schema_of(kind: type[Part]) -> dict[str, Any]:
    """JSON schema of a body, with the settings among its properties."""
    schema = kind.model_json_schema(ref_template=f"#/components/schemas/{kind.__name__}_{{model}}")
    if issubclass(kind, Body):
        for name, declared in few_step_settings().items():
            if name not in schema["properties"]:
                schema["properties"][name] = _setting_schema(name, declared)
    return schema


def _setting_schema(name: str, declared: Declared) -> dict[str, Any]:
    choices = {"decoder": list(DECODERS), "policy": list(POLICIES)}.get(name)
    said = {"description": declared.help + (f" Default: {told}." if (told := declared.told_default) else "")}
    if choices is not None:
        return {"anyOf": [{"enum": choices}, {"type": "null"}], **said}
    return {"anyOf": [TypeAdapter(declared.type).json_schema(), {"type": "null"}], **said}
