"""Chat templates, which are programs of a checkpoint: rendered in a sandbox, within limits of time and size.

The environment has what transformers' own has (`tojson`, `raise_exception`, `strftime_now`, `{% generation %}`,
`{% break %}`), so that a template renders the same text. What is added to a template when it is compiled:

- each iteration of a loop, call, operation and filter looks at the clock;
- everything that makes a value larger (`*`, `+`, `~`, literals, filters, methods of strings) is checked, before it is
  done where that alone would fill the memory.
"""

import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers import PreTrainedTokenizerBase

from fewstep.errors import FewstepError

SECONDS = 3.0
"""A conversation of thousands of messages takes a fraction of one."""
LARGEST = 5_000_000
"""Characters of a text, or items of a list with all that is in it: more than any network's context."""
LARGEST_TOTAL = 50_000_000
"""Bytes, about, of all texts and lists that one rendering makes."""
LARGEST_NUMBER_BITS = 10_000
LARGEST_SOURCE = 1_000_000


class _LimitError(TemplateError):
    """A template took more time or room than any prompt needs."""


@dataclass
class _Budget:
    """What is left to a rendering. `deadline`: as time.monotonic counts."""

    deadline: float
    num_bytes: int = LARGEST_TOTAL


_BUDGET: ContextVar[_Budget | None] = ContextVar("budget", default=None)
"""None while a template is compiled, when it is not known yet what it renders."""


def render(tokenizer: PreTrainedTokenizerBase, messages: Iterable[Mapping[str, Any]]) -> str:
    """The text of a conversation in the tokenizer's chat template, with the beginning of an answer.

    FewstepError if the template refuses the messages, fails, or exceeds `SECONDS` or `LARGEST`.
    """
    token = _BUDGET.set(_Budget(time.monotonic() + SECONDS))
    try:
        text: str = _compiled(tokenizer.get_chat_template()).render(
            messages=[_message(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **_plain(tokenizer.special_tokens_map),
        )
        text.encode()  # half a character alone is no text, and no tokenizer reads it
        return text
    except TemplateError as error:
        raise FewstepError(f"the model's chat template refuses the messages: {_reason(error)}") from error
    except Exception as error:  # a template is a program, which can raise whatever Python can
        raise FewstepError(
            f"the model's chat template fails on these messages ({_reason(error)}); correct it, or give the prompt raw"
        ) from error
    finally:
        _BUDGET.reset(token)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, TemplateError) and text else f"{type(error).__name__}{text and ': '}{text}"


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    if len(source) > LARGEST_SOURCE:
        raise _LimitError(f"it has {len(source)} characters, more than {LARGEST_SOURCE}")
    return _ENVIRONMENT.from_string(_Checks().visit(_ENVIRONMENT.parse(source)))


# What a template sees


def _message(message: Mapping[str, Any]) -> Any:
    """Without what is None, which templates take for a text; reasoning under every name that templates read."""
    fields = {name: value for name, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((fields[name] for name in names if name in fields), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return _plain(fields)


def _plain(value: Any) -> Any:
    """A copy of plain types only: other objects have methods that the sandbox does not know."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


class _Dict:
    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    def __init__(*arguments: Any, **named: Any) -> None:  # a namespace may hold a `self`
        self, given = arguments[0], dict(*arguments[1:], **named)
        for name in given:
            _check_attribute(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Generation(Extension):
    """`{% generation %}` marks an answer for training; its text is the same."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# Limits


def _size(value: Any) -> int:
    """Characters of a text, or items of a container with all that is in it. _LimitError above LARGEST."""
    if isinstance(value, str | bytes):
        size = len(value)
    elif isinstance(value, list | tuple | dict | set | Namespace):
        size, left = 0, [value]
        while left and size <= LARGEST:
            item = left.pop()
            size += len(item) + 1 if isinstance(item, str | bytes) else 1
            if isinstance(item, dict):
                left.extend(item.keys())
                left.extend(item.values())
            elif isinstance(item, list | tuple | set):
                left.extend(item)
            elif isinstance(item, Namespace):
                left.append(item._Namespace__attrs)
    else:
        return 1
    return _bounded(size)


def _bounded(size: int) -> int:
    if size > LARGEST:
        raise _LimitError(f"it makes a text or list of more than {LARGEST} characters or items")
    return size


def _checked(value: Any) -> Any:
    """A value just made, as it is. _LimitError if it is too large, all of them together are, or the time is over."""
    _size(value)
    budget = _BUDGET.get()
    if budget is not None and time.monotonic() > budget.deadline:
        raise _LimitError(f"it takes more than {SECONDS:g} seconds")
    if budget is not None and isinstance(value, str | bytes | list | tuple | dict | set):
        budget.num_bytes -= len(value) * (1 if isinstance(value, str | bytes) else 8)
        if budget.num_bytes < 0:
            raise _LimitError(f"it makes more than {LARGEST_TOTAL} characters of text")
    if isinstance(value, int) and value.bit_length() > LARGEST_NUMBER_BITS:
        raise _LimitError("it computes with numbers of thousands of digits")
    return value


@pass_context
def _checked_filter(_: Context, value: Any) -> Any:
    """Of the context, so that it is not computed when the template is compiled."""
    return _checked(value)


def _concat(parts: Iterable[str]) -> str:
    texts, size = [], 0
    for part in parts:
        size = _bounded(size + len(part))
        texts.append(part)
    return "".join(texts)


_GROWING = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "indent", "tojson", "batch", "slice"}
_GROWING |= {"wordwrap", "translate", "round"}
"""Methods and filters whose result is at most as large as what they are given, times their arguments."""
_SLOW = {"striptags", "urlize", "wordwrap", "xmlattr", "pprint", "sum"}
"""Filters whose time grows faster than what they are given."""
_LARGEST_OF_SLOW = 10_000
_LARGEST_ARGUMENT = 100_000


def _check_growth(name: str, value: Any, arguments: list[Any]) -> None:
    """_LimitError for a call whose result would be too large to be made and then measured."""
    size = max(1, _size(value))
    if name in _SLOW and size > _LARGEST_OF_SLOW:
        raise _LimitError(f"it gives {name} more than {_LARGEST_OF_SLOW} characters or items")
    if name == "replace":
        _bounded((size + 1) * max(1, *(_size(argument) for argument in arguments[1:2])))
    elif name == "join":
        separator, items = (value, *arguments, "")[:2] if isinstance(value, str) else ((*arguments, "")[0], value)
        _bounded(_size(separator) * len(items) + _size(items))
    elif name == "format":
        _check_format(value, arguments)
    elif name in _GROWING:
        for argument in arguments:
            number = isinstance(argument, int) and not isinstance(argument, bool)
            if number and abs(argument) > _LARGEST_ARGUMENT:
                raise _LimitError(f"it calls {name} with a number above {_LARGEST_ARGUMENT}")
            size = _bounded(size * max(1, argument if number else _size(argument)))


_WIDE = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{")
"""A width of five digits, or one that comes from what is formatted."""


def _check_format(text: Any, arguments: Any) -> None:
    if _WIDE.search(str(text)):
        raise _LimitError("it formats a text to a width that is too large, or given by another value")
    _bounded((str(text).count("%") + str(text).count("{")) * max(1, _size(arguments)))


def _listed(items: Any) -> Any:
    """What can be measured, of an iterator too."""
    measured = isinstance(items, str | bytes | list | tuple | dict | set) or not isinstance(items, Iterable)
    return items if measured else list(itertools.islice(items, LARGEST))


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # with what it wants to be passed
    def limited(*arguments: Any, **named: Any) -> Any:
        if name == "join":
            arguments = (*arguments[:first], _listed(arguments[first]), *arguments[first + 1 :])
        _check_growth(name, arguments[first], [*arguments[first + 1 :], *named.values()])
        return _checked(function(*arguments, **named))

    return limited


class _LimitedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concat)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _bounded(_size(left) + _size(right))
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
                    _bounded(max(1, _size(sequence)) * max(0, times))
        elif operator == "**":
            numbers = isinstance(left, int) and isinstance(right, int)
            if numbers and left.bit_length() * abs(right) > LARGEST_NUMBER_BITS:
                raise _LimitError("it computes with numbers of thousands of digits")
        elif isinstance(left, str | bytes):
            _check_format(left, right)
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = tuple(map(_listed, args))
            _check_growth(getattr(__obj, "__name__", ""), owner, [*args, *kwargs.values()])
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, [*args, kwargs])
            return safe(*args, **kwargs)

        return limited


class _Checks(NodeTransformer):
    """Adds to a template that its iterations and macros look at the clock, and that what `~` and literals make is
    measured: both are done by `_checked`.
    """

    def _ticking(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        clock = nodes.ExprStmt(_filtered(nodes.Const(None)))
        node.body.insert(0, clock.set_lineno(node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_filtered(nodes.Const(True)), node.test).set_lineno(node.lineno)
        return self.generic_visit(node)

    visit_For = visit_Macro = visit_CallBlock = _ticking

    def _measured(self, node: nodes.Expr) -> nodes.Node:
        return _filtered(self.generic_visit(node))

    visit_List = visit_Dict = visit_Concat = _measured

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._measured(node) if node.ctx == "load" else self.generic_visit(node)


def _filtered(node: Any) -> nodes.Filter:
    return nodes.Filter(node, "_checked", [], [], None, None, lineno=node.lineno)


def _environment() -> _LimitedEnvironment:
    environment = _LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_checked
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _limited_filter(name, function) for name, function in environment.filters.items()}
    environment.filters["_checked"] = _checked_filter
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    del environment.globals["lipsum"]  # words at random, which no prompt needs
    return environment


_ENVIRONMENT = _environment()
"""Of all templates: none can change it."""
