"""The string form of policies, for command lines and job files: ``"streaming(4,1020)+int4(rotate=true)+host(256)"``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from memjax.cache import parts
from memjax.cache.policy import CachePolicy, chain

_NAMES = (
    "dense",
    "int8",
    "int4",
    "int2",
    "fp8",
    "nf4",
    "nvfp4",
    "turboquant",
    "kivi",
    "kvarn",
    "zipcache",
    "auto",
    "progressive",
    "gear",
    "streaming",
    "h2o",
    "tova",
    "snapkv",
    "pyramidkv",
    "dropkv",
    "adakv",
    "knorm",
    "keydiff",
    "expected_attention",
    "kvzip",
    "kvcompose",
    "massfold",
    "quest",
    "duo",
    "host",
    "protect",
    "kernels",
)
PARTS: dict[str, Callable[..., CachePolicy]] = {name: getattr(parts, name) for name in _NAMES}
_PART = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\(((?:[^()]|\([^()]*\))*)\))?\s*")


def policy(text: str) -> CachePolicy:
    """Parses parts joined by ``+``; arguments by position or by keyword.

    Raises:
      ValueError: an unknown part or argument (naming the allowed ones), a value of the wrong type, or parts that do not
        chain.

    >>> policy("streaming(4, 1020)+int4(rotate=true)").codec.rotate
    True
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a policy is a text such as 'streaming(4,1020)+int4', got {text!r}")
    return chain(*(_part(piece, text) for piece in _split(text, "+")))


def signatures() -> dict[str, str]:
    """Every part with its arguments and their defaults, for help texts."""
    return {name: f"{name}{_arguments(build)}" for name, build in PARTS.items()}


def _arguments(build: Callable) -> str:
    shown = [f"{p.name}={_show(p.default)}" for p in inspect.signature(build).parameters.values()]
    return f"({', '.join(shown)})" if shown else ""


def _show(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _part(piece: str, text: str) -> CachePolicy:
    match = _PART.fullmatch(piece)
    if match is None:
        raise ValueError(f"cannot read {piece!r} in policy {text!r}; write parts like name or name(1, key=value)")
    name, arguments = match.groups()
    if name not in PARTS:
        raise ValueError(f"unknown policy {name!r} in {text!r}; the known ones are {', '.join(signatures().values())}")
    return PARTS[name](**_bind(name, arguments or ""))


def _split(text: str, separator: str) -> list[str]:
    """``text.split(separator)``, but for what stands in brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def _bind(name: str, arguments: str) -> dict:
    parameters = inspect.signature(PARTS[name]).parameters
    order, bound = list(parameters), {}
    for i, item in enumerate(a.strip() for a in _split(arguments, ",") if arguments.strip()):
        key, equals, value = (s.strip() for s in item.partition("="))
        if not equals or "(" in key:
            key, value = (order[i] if i < len(order) else None), item
        if key not in parameters or key in bound:
            raise ValueError(f"{name} does not take {item!r}; it is {name}{_arguments(PARTS[name]) or ' without arguments'}")
        bound[key] = _value(name, key, value, _kind(parameters[key]))
    return bound


def _kind(parameter: inspect.Parameter) -> type:
    return float if parameter.annotation == "float" else type(parameter.default)


def _value(name: str, key: str, text: str, kind: type):
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is not bool:
        try:
            number = kind(text)
            return int(number) if number.is_integer() else number
        except ValueError:
            pass
    wanted = "true or false" if kind is bool else f"a number ({kind.__name__})"
    raise ValueError(f"{name} needs {key} to be {wanted}, got {text!r}")
