"""Chat templates render as their models expect, and can do no harm."""

from __future__ import annotations

import datetime
import time

import pytest

from llmc.errors import ArtifactError, RequestError
from llmc.runtime.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' +
 message.content + '<|im_end|>' + '\\n' }}{% endfor %}
    {% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}{% endif %}"""
USER = [{"role": "user", "content": "Hi <b>"}]
# Each round doubles the text, if the expression does.
DOUBLING = (
    "{%% set n = namespace(x='ab') %%}{%% for i in range(99) %%}{%% set n.x = %s %%}{%% endfor %%}"
)


def render(source: str, messages=USER, **extra) -> str:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>"}).render(messages, **extra)


def test_a_conversation_with_and_without_the_answers_beginning():
    text = "<|im_start|>user\nHi <b><|im_end|>\n"
    assert render(CHATML) == text + "<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == text


def test_what_templates_expect_to_find():
    assert render("{{ bos_token }}{{ missing }}") == "<s>"
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "Hi <b>"}'
    assert render("{{ {'ü': [1]} | tojson(indent=2) }}") == '{\n  "ü": [\n    1\n  ]\n}'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert (
        render("{% for i in [1,2,3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}")
        == "13"
    )
    assert render("{% generation %}a{{ 1 }}{% endgeneration %}b") == "a1b"
    assert render("{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}") == "2"
    assert render("{{ tools[0].name }}", tools=[{"name": "f"}]) == "f"
    assert render("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('a') ~ m(2) }}") == "[a][2]"
    assert (
        render("{{ '%s-%s' % ('a', 7 % 4) }}{{ 'ab' * 2 }}{{ 'A'.lower() | trim }}") == "a-3ababa"
    )
    assert render("{{ '%.2f, 2026 %s' | format(1.5, 'a') }}") == "1.50, 2026 a"
    assert render("{{ '5000 %5d' % 1000 }}") == "5000  1000"
    assert render("{{ '{:>3}{a}'.format(1, a=2) }}") == "  12"
    numbers = "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(123456789) }}"
    assert render(numbers) == "123456789"
    assert render("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}") == "1"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only users') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ (9 ** 999) ** 999 }}",
        "{{ 'a' ** 2 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%(a)-999999999d' | format(a=1) }}",
        "{{ 'a'.center(999999999) }}",
        "{{ '{:>{w}}'.format(1, w=999999999) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{a!s:999999999}'.format_map({'a': 1}) }}",
        "{% for i in range(9) %}{{ 'a' * 4000000 }}{% endfor %}",
        DOUBLING % "n.x ~ n.x",
        DOUBLING % "n.x + n.x",
        DOUBLING % "[n.x, n.x] | join",
    ],
)
def test_refusals_and_failures_are_request_errors(source):
    began = time.monotonic()
    with pytest.raises(RequestError) as info:
        render(source)
    assert info.value.param == "messages"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    ],
    ids=["loops", "recursion"],
)
def test_a_template_that_takes_too_long_is_stopped(source):
    template = ChatTemplate(source, max_seconds=0.2)
    began = time.monotonic()
    with pytest.raises(RequestError, match="too long"):
        template.render(USER, r=list(range(3000)))
    assert time.monotonic() - began < 2
    # The next render has its own time.
    assert ChatTemplate("ok", max_seconds=0.2).render(USER) == "ok"


def test_the_refusals_own_words_reach_the_client():
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_no_messages_is_a_request_error():
    with pytest.raises(RequestError, match="empty"):
        render(CHATML, messages=[])


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x | nofilter }}", "{% unknown %}", "a" * (MAX_TEMPLATE_CHARS + 1)]
)
def test_a_broken_template_is_an_artifact_error(source):
    with pytest.raises(ArtifactError):
        ChatTemplate(source)
