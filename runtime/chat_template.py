"""Renders a conversation with the model's own Jinja template, which is not trusted.

The template runs in Jinja's immutable sandbox; beyond that, its time and the strings it builds are
bounded. It comes from the artifact only, never from a client.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmc.errors import ArtifactError, RequestError

MAX_TEMPLATE_CHARS = 512 * 1024
MAX_OUTPUT_CHARS = 16 * 1024 * 1024
MAX_SECONDS = 5.0
_MAX_POWER = 1000  # base and exponent
_MAX_WIDTH = 100_000  # or another number that a string's method is given
# A width of four digits or one given as an argument, in "%…" and in "{:…}".
_WIDE_FORMAT = re.compile(r"%(\([^)]*\))?[^%A-Za-z]*(\d{4}|\*)|\{[^{}]*:[^}]*(\d{4}|\{)")


class ChatTemplate:
    """A compiled template; `render` may be called from any thread."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        max_seconds: float = MAX_SECONDS,
        max_output_chars: int = MAX_OUTPUT_CHARS,
    ) -> None:
        """`special_tokens`: names the template knows, such as `bos_token`, and their spelling.

        ArtifactError where the template is too long or no Jinja.
        """
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ArtifactError(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS}"
            )
        self._special_tokens = dict(special_tokens or {})
        self._environment = _Environment(max_output_chars)
        self._max_seconds = max_seconds
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as exc:
            raise ArtifactError(
                f"the chat template is not valid: {exc}", hint="compile the model again"
            ) from exc

    def render(
        self,
        messages: Seq[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **extra: Any,  # noqa: ANN401 - the template's own variables, e.g. tools
    ) -> str:
        """The prompt for `messages`; RequestError where the template refuses or exceeds a limit."""
        if not messages:
            raise RequestError("messages is empty, expected at least one", param="messages")
        values = {
            **self._special_tokens,
            **extra,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        limits = self._environment.limits
        limits.deadline = time.monotonic() + self._max_seconds
        try:
            return str(limits.bounded(self._template.render(values)))
        except RequestError:
            raise
        except jinja2.TemplateError as exc:
            raise RequestError(
                f"the chat template refused the messages: {exc}", param="messages"
            ) from exc
        except Exception as exc:  # a template can fail in any way on data it was not written for
            raise RequestError(
                f"the chat template failed: {type(exc).__name__}: {exc}",
                hint="the messages may not be what the model's template expects",
                param="messages",
            ) from exc


class _Limits(threading.local):
    """The running render's deadline, one a thread, and the size of strings."""

    def __init__(self, max_chars: int) -> None:
        self.deadline = 0.0
        self.max_chars = max_chars

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise RequestError("the chat template takes too long", param="messages")

    def bounded(self, value: Any) -> Any:  # noqa: ANN401 - any value of a template
        if isinstance(value, str | list | tuple) and len(value) > self.max_chars:
            raise RequestError(
                f"the chat template's output exceeds {self.max_chars} characters", param="messages"
            )
        return value


class _BoundedCode(CodeGenerator):
    """Generates code that passes what `~` and filters build through the size check."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.limits.bounded(")
        super().visit_Concat(node, frame)
        self.write(")")

    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:
        self.write("environment.limits.bounded(")
        super().visit_Filter(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what to train on: to us it is its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with limits, and with what chat templates expect to find."""

    code_generator_class = _BoundedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, max_chars: int) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
        )
        self.limits = _Limits(max_chars)
        for name in ("center", "wordwrap"):  # build strings of any width; no template's
            del self.filters[name]
        self.filters["format"] = _format
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Has every round of a loop check the time."""
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            check = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(check).set_lineno(loop.lineno))
        template.set_environment(self)
        return template

    @property
    def check_time(self) -> Callable[[], None]:
        """What the inserted calls call."""
        return self.limits.check_time

    def call(  # type: ignore[override]
        self,
        context: Context,
        function: Any,  # noqa: ANN401
        /,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        self.limits.check_time()
        if isinstance(getattr(function, "__self__", None), str):
            for value in (*args, *kwargs.values()):
                if isinstance(value, int) and abs(value) > _MAX_WIDTH:
                    raise jinja2.TemplateRuntimeError(f"a width above {_MAX_WIDTH}")
        return self.limits.bounded(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:  # noqa: ANN401
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        sized = [x for x in (left, right) if isinstance(x, str | list | tuple)]
        if operator == "*" and sized:
            count = right if sized[0] is left else left
            self.limits.bounded(sized[0])
            if isinstance(count, int) and len(sized[0]) * count > self.limits.max_chars:
                raise jinja2.TemplateRuntimeError("a repeated string is too long")
        elif operator == "**" and max(abs(left), abs(right)) > _MAX_POWER:
            raise jinja2.TemplateRuntimeError(f"a power of numbers above {_MAX_POWER}")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return self.limits.bounded(super().call_binop(context, operator, left, right))


def _to_json(
    value: Any,  # noqa: ANN401 - any JSON value
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise jinja2.TemplateRuntimeError("a format with a width above 999")


def _format(text: str, *args: Any, **kwargs: Any) -> str:  # noqa: ANN401 - any values
    _check_format(text)
    return text % (kwargs or args)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
