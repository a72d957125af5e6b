"""Chat templates: the text that transformers renders, within limits of time and size, or one sentence."""

import time
from typing import Any

import pytest

from fewstep.errors import FewstepError
from fewstep.models import templates
from fewstep.models.templates import render
from fewstep.models.text import encode_prompt
from fewstep.models.tiny import tiny_tokenizer

MESSAGES = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": " hello <b> "},
    {"role": "assistant", "content": "hi", "reasoning": "think", "name": None},
]


def rendered(template: str, messages: Any = MESSAGES) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return render(tokenizer, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.first and m.role == 'system' %}S{% endif %}"
        "{{ '<|' + m['role'] + '|>\n' + m.content | trim ~ '<|end|>' }}{{ loop.length }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "{%- if tools %}tools{% elif documents %}d{% else %}{{ bos_token }}{% endif %}"
        "{{ messages | tojson(indent=2) }}",
        "{% set ns = namespace(n=1, text='') %}{% for m in messages if m.role != 'user' %}{% set ns.n = ns.n * 3 + 1 %}"
        "{% set ns.text = ns.text ~ m.content %}{% endfor %}{{ ns.n }}{{ ns.text }}",
        "{% macro f(x, y=3) %}<{{ x }}{{ y }}>{{ caller() if caller }}{% endmacro %}{{ f(1) }}"
        "{% call f(2) %}c{% endcall %}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% if loop.first %}{% continue %}{% endif %}"
        "{{ m.content }}{% endfor %}{% generation %}answer{% endgeneration %}",
        "{{ '%s-%05d' % ('a', 3) }}{{ '{} {:>5}'.format(1, 2) }}"
        "{{ messages[::-1][0].content.split('i') | join(', ') }}",
        "{% set a, b = 1, [2, 3] %}{{ a }}{{ b }}{{ dict(a=1) }}{{ (1, 2)[0] }}{{ 2 ** 3 }}{{ 'ab' * 2 }}{{ 5 % 3 }}",
        "{{ messages | map(attribute='content') | join('|') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list }}",
        "{{ messages[2].thinking }}{{ messages[2].reasoning_content }}{{ messages[2].name is defined }}{{ nothing }}",
        "{{ 'a\nb' | indent(4) }}{{ 'abc' | replace('b', 'x') | upper }}{{ none }}{{ [] }}{{ {'a': [1]} | string }}",
        "{% set y %}in {{ eos_token }}{% endset %}{{ y }}"
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
        "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    ],
)
def test_a_template_renders_what_transformers_renders(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert render(tokenizer, MESSAGES) == tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) recursive %}{% if loop.depth < 4 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{{ range(99999) | list | sort | length }}{% endfor %}",
    ],
)
def test_a_template_that_takes_too_long_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(FewstepError, match=r"chat template .* more than 0\.2 seconds"):
        rendered(template)
    assert time.monotonic() - started < 5


DOUBLED = (
    "{{% set ns = namespace(x={start}) %}}"
    "{{% for i in range(60) %}}{{% set ns.x = {twice} %}}{{% endfor %}}{{{{ ns.x }}}}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * [1] }}",
        "{{ 10 ** (10 ** 5) }}",
        "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ ''.zfill(10 ** 9) }}",
        "{{ '\t'.expandtabs(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 9) }}",
        "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
        "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
        "{{ ('a' * 1000000) | replace('', 'b' * 1000000) }}",
        "{{ ('a' * 1000000).join(range(99999) | map('string')) }}",
        "{{ range(99999) | map('string') | join('a' * 1000000) }}",
        "{{ ('{0}' * 1000000).format('a' * 1000000) }}",
        "{{ ('a' * 100000) | indent(99999) }}",
        "{{ [[1]] | tojson(indent=10 ** 9) }}",
        "{{ [1] | batch(10 ** 9, 'x') | list }}",
        "{{ ('<>' * 1000000) | striptags }}",
        "{{ (([[1]] * 1000000)) | sum(start=[]) }}",
        "{{ 1.5 | round(10 ** 9) }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{% for i in range(99999) %}{{ 'abcdefghij' * 100000 }}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{{ 'abcdefghij' * 100000 }}{% endfor %}{% endset %}",
        "".join(f"{{% set a{i} = 'x' * 4000000 %}}" for i in range(100)),
        DOUBLED.format(start="'ab'", twice="ns.x ~ ns.x"),
        DOUBLED.format(start="'ab'", twice="ns.x + ns.x"),
        DOUBLED.format(start="[1]", twice="[ns.x, ns.x]"),
        DOUBLED.format(start="[1]", twice="(ns.x, ns.x)"),
        DOUBLED.format(start="[1]", twice="{'a': ns.x, 'b': ns.x}"),
        DOUBLED.format(start="[1]", twice="dict(a=ns.x, b=ns.x)"),
        DOUBLED.format(start="[1]", twice="namespace(a=ns.x, b=ns.x)"),
        "{{ 1 / 0 }}",
        "{{ 1 + 'a' }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'x' %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{{ '\\ud800' }}",
        "{{ 'a'.encode('nosuch') }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ namespace(__x=1) }}",
        "{{ raise_exception('no system message') }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{" * 5,
        "x" * 2_000_000,
    ],
)
def test_a_template_that_fails_or_grows_without_end_is_one_sentence(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "LARGEST", 200_000)
    monkeypatch.setattr(templates, "LARGEST_TOTAL", 5_000_000)
    started = time.monotonic()
    with pytest.raises(FewstepError, match="the model's chat template") as raised:
        rendered(template)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("template", [5, {"other": "x"}, {"default": 7}])
def test_a_template_that_is_no_text_is_one_sentence(template: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(FewstepError, match="chat template"):
        encode_prompt(tokenizer, "hi")
