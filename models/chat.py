"""Chat templates: Jinja from untrusted files, rendered in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from memjax.models.tokenizer import Tokenizer

_LONGEST_TEMPLATE = 200_000  # characters


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
) -> str:
    """The text of a conversation as the model expects it. Encode it with ``add_bos=False``.

    Args:
      messages: dicts with "role" and "content".
      add_generation_prompt: end with the opening of the assistant's turn.
      variables: more of what a template may read, such as tools or enable_thinking.

    Raises:
      ValueError: the model has no template, a message without role or content, or a template that fails, asks for what
        the sandbox forbids, or is too large.
    """
    template = tokenizer.chat_template
    if not template:
        raise ValueError("this model has no chat template; generate from a plain prompt")
    if len(template) > _LONGEST_TEMPLATE:
        raise ValueError(f"the chat template has {len(template)} characters; at most {_LONGEST_TEMPLATE} are accepted")
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"a chat message needs 'role' and 'content', got {message!r}")
    try:
        return _environment().from_string(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.token(tokenizer.bos_id),
            eos_token=tokenizer.token(tokenizer.eos_ids[0] if tokenizer.eos_ids else None),
            **variables,
        )
    except (TemplateError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(f"the chat template cannot be rendered: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _tojson
    return environment


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
