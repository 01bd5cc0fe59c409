"""Which implementation of an operation serves a case, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

# Kernels whose numbers were checked on their hardware. The others are experimental: they serve when asked for by name.
CHECKED_ON_HARDWARE: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class Target:
    """What a program is traced for: ``platform`` cpu, tpu or gpu, and the device's name."""

    platform: str
    kind: str


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason for it."""

    implementation: str
    reason: str


def target() -> Target:
    """The mesh in force (``jax.set_mesh``; it may be of devices that this machine lacks), else the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        default = jax.devices()[0]
        platform, kind = default.platform, default.device_kind
    else:
        platform, kind = device.platform, device.device_kind
    return Target({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform), kind)


def tpu_generation(kind: str) -> str:
    """v4, v5e, v5p, v6e, 7x: from a device's name, which is the name itself if it is none of these."""
    names = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"}
    names |= {"TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "7x", "TPU v7x": "7x"}
    return names.get(kind, kind)


def choose(
    op: str, named: str | None, refusals: Mapping[str, Callable[[Target], str | None]], interpret: bool = False
) -> Choice:
    """The implementation to run.

    Args:
      op: the operation's name.
      named: ``None`` picks the target's own kernel if it was checked on hardware and serves the case, else ``xla``.
        ``pallas`` insists on the target's own kernel; any other name on that implementation.
      refusals: per implementation why it cannot serve the case on a target (None: it can).
      interpret: kernels run in interpret mode, which any target can.

    Raises:
      ValueError: an unknown name, or a named implementation that cannot serve, with its reason.
    """
    on = target()
    own = on.platform if on.platform in refusals else None
    if named == "pallas":
        if own is None:
            raise ValueError(f"{op}: there is no Pallas kernel for {on.platform} ({on.kind}); use implementation='xla'")
        named = own
    if named is None:
        if own is None:
            return Choice("xla", f"no kernel of its own for {on.platform}")
        if (op, own) not in CHECKED_ON_HARDWARE:
            return Choice("xla", f"the {own} kernel is experimental: not checked on hardware yet; ask for it by name")
        refusal = refusals[own](on)
        return Choice("xla", refusal) if refusal else Choice(own, f"serves this case on {on.kind}")
    if named not in refusals:
        raise ValueError(f"{op}: implementation {named!r} is not one of {', '.join(refusals)}, pallas")
    if named in ("tpu", "gpu") and on.platform != named and not interpret:
        raise ValueError(
            f"{op}: implementation {named!r} runs on a {named.upper()}, this program is for {on.platform} ({on.kind}); "
            "pass interpret=True to interpret it"
        )
    refusal = refusals[named](on)
    if refusal:
        raise ValueError(f"{op}: implementation {named!r} cannot serve this case: {refusal}; use implementation='xla'")
    return Choice(named, "asked for by name")
