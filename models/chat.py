"""Chat templates: Jinja from untrusted files, rendered in a sandbox with limits on time and size."""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from memjax.models.tokenizer import Tokenizer

_LONGEST_TEMPLATE = 200_000  # characters
_LONGEST_RESULT = 10_000_000  # characters or items of anything that a template computes
_LARGEST_NUMBER = 10_000  # widths and counts given to filters and methods
_SECONDS = 10.0
# Filters and methods whose result grows with a number that they are given.
_GROWING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "wordwrap", "tojson")
# Formats that pad to 10 000 characters or more, and those that take a width from their values.
_WIDE_FIELD = re.compile(r"%(\([^)]*\))?[-+ #0]*\d*\.?\d{5}|\{[^{}]*\d{5}")
_GIVEN_WIDTH = re.compile(r"%[-+ #0-9.]*\*|\{[^{}]*\{")


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
) -> str:
    """The text of a conversation as the model expects it. Encode it with ``add_bos=False``.

    The template sees no Python attributes beyond Jinja's sandbox, and may take 10 seconds and build values of 10 million
    characters.

    Args:
      messages: dicts with "role" and "content" ("content" may be missing beside "tool_calls").
      add_generation_prompt: end with the opening of the assistant's turn.
      variables: more of what a template may read, such as tools or enable_thinking.

    Raises:
      ValueError: the model has no template, no messages, a message without role or content, or a template that fails, asks
        for what the sandbox forbids, or exceeds a limit.
    """
    template = tokenizer.chat_template
    if not template:
        raise ValueError("this model has no chat template; generate from a plain prompt")
    if len(template) > _LONGEST_TEMPLATE:
        raise ValueError(f"the chat template has {len(template)} characters; at most {_LONGEST_TEMPLATE} are accepted")
    if not messages:
        raise ValueError("a chat needs at least one message")
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
            raise ValueError(f"a chat message needs 'role' and 'content', got {message!r}")
    given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt} | variables
    given |= {"bos_token": tokenizer.token(tokenizer.bos_id)}
    given |= {"eos_token": tokenizer.token(tokenizer.eos_ids[0] if tokenizer.eos_ids else None)}
    try:
        return _Environment().from_string(template).render(given)
    except (TemplateError, OverflowError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise ValueError(f"the chat template cannot be rendered: {error}") from error


class _Limits(NodeTransformer):
    """Sends what can run long or grow through the environment."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802  (Jinja's names)
        if node.recursive:
            raise SecurityError("recursive loops are not supported")
        node = self.generic_visit(node)
        node.iter = _call("checked", [node.iter], node)
        if node.test is not None:  # runs even where the body does not
            node.test = nodes.And(_call("tick", [], node), node.test, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [], node), lineno=node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [], node), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        return _call("joined", self.generic_visit(node).nodes, node)


def _call(name: str, arguments: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
    target = nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return nodes.Call(target, arguments, [], None, None, lineno=at.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """For one rendering: its clock starts when it is made."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self._deadline = time.monotonic() + _SECONDS
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        self.filters = {name: self._limited(name, run) for name, run in (self.filters | {"tojson": _tojson}).items()}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Limits().visit(source), *args, **kwargs)

    def tick(self) -> bool:
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {_SECONDS:.0f} seconds")
        return True

    def checked(self, value: Any) -> Any:
        """The value itself, unless it is too large."""
        self.tick()
        _check_size(_length(value))
        if isinstance(value, int) and value.bit_length() > 256:
            raise SecurityError("it makes a number of more than 256 bits")
        return value

    def joined(self, *parts: Any) -> str:
        return self.concat([str(part) for part in parts])

    def concat(self, parts: Iterable[str]) -> str:
        parts = list(parts)
        _check_size(sum(map(len, parts)))
        self.tick()
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, count in ((left, right), (right, left)):
                if hasattr(many, "__len__") and isinstance(count, int):
                    _check_size(len(many) * count)
        if operator == "**" and not (isinstance(right, int) and abs(right) <= 64):
            raise SecurityError(f"the exponent {right!r} is too large")
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return self.checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(target, "__self__", None)
        if isinstance(owner, str | bytes | list | tuple):
            if target.__name__ == "join" and args:
                _check_size(_length(owner) * _length(args[0]))
            else:
                _check_arguments(target.__name__, owner, args, kwargs)
        return self.checked(super().call(context, target, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return limited

    def _limited(self, name: str, run: Callable) -> Callable:
        skipped = 1 if hasattr(run, "jinja_pass_arg") else 0  # its context or environment comes first

        @functools.wraps(run)
        def limited(*args: Any, **kwargs: Any) -> Any:
            value, *rest = args[skipped:]
            _check_arguments(name, value, rest, kwargs)
            return self.checked(run(*args, **kwargs))

        return limited


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


def _check_size(size: int) -> None:
    if size > _LONGEST_RESULT:
        raise SecurityError(f"it makes a value of {size} characters or items; at most {_LONGEST_RESULT} are accepted")


def _check_format(form: str, values: Any) -> None:
    values = values if isinstance(values, tuple) else (values,)
    given = _GIVEN_WIDTH.search(form) is not None and any(map(_is_large, values))
    if given or _WIDE_FIELD.search(form):
        raise SecurityError(f"it formats a field of more than {_LARGEST_NUMBER} characters")


def _is_large(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > _LARGEST_NUMBER


def _check_arguments(name: str, value: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuses, before it runs, what a filter or method would blow up."""
    given = [*args, *kwargs.values()]
    if name in _GROWING and any(map(_is_large, given)):
        raise SecurityError(f"{name} is given a number above {_LARGEST_NUMBER}")
    texts = [x for x in given if isinstance(x, str)]
    if name == "join":
        _check_size(_length(value) * max(map(len, texts), default=0))
    elif name == "replace" and len(texts) > 1:
        _check_size(str(value).count(texts[0]) * len(texts[1]))
    elif name == "indent":
        widths = [len(x) if isinstance(x, str) else x for x in given if isinstance(x, str | int)]
        _check_size(str(value).count("\n") * max(widths, default=4))
    elif name == "format":
        _check_format(str(value), tuple(given))


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
