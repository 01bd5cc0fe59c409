"""What policies leave open until the specs of all layers are known: the codecs of ``auto``, and budgets in bytes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction

from memjax.cache.ledger import Bytes, predict_nbytes
from memjax.cache.policy import CachePolicy, Policy
from memjax.cache.pools import one_head
from memjax.cache.spec import CacheSpec, LayerSpec
from memjax.evict import Budgeted
from memjax.quantize.auto import Auto, ByHead, layer_codec, spend
from memjax.quantize.codec import KeyValueCodec
from memjax.quantize.sensitivity import KIND, check_sensitivity


def afford(policy: Policy, specs: Sequence[LayerSpec]) -> Policy:
    """The policy with the largest budget in tokens that its limit in bytes allows; without such a limit as it is.

    The limit is one for the whole cache on the device, layers without a budget included; layers whose budgets differ share
    the tokens by the evictor's rule. ``kvzip`` and ``kvcompose`` spend theirs when they compress.

    Raises:
      ValueError: two limits in bytes, or one below the smallest cache.
    """
    limited = {each.evictor: each for each in policy.parts() if isinstance(each.evictor, Budgeted) and each.evictor.bytes}
    if not limited:
        return policy
    if len(limited) > 1:
        raise ValueError(f"one budget in bytes decides about a whole cache, got those of {', '.join(map(str, limited))}")
    [(evictor, one)] = limited.items()
    windows = one.resolved_windows()
    protected = windows.sinks + windows.recent

    def at(budget: int) -> Policy:
        def change(each: CachePolicy) -> CachePolicy:
            return dataclasses.replace(each, evictor=evictor.with_budget(budget)) if each.evictor == evictor else each

        return policy.replaced(change)

    low, high = protected + 1, max(spec.capacity for spec in specs if isinstance(spec, CacheSpec))
    smallest = predict_nbytes(at(low), specs).device
    if smallest > evictor.bytes:
        raise ValueError(
            f"{evictor.name}(bytes={evictor.bytes}) is less than the smallest cache of these layers, {smallest} bytes on the "
            f"device with {low} tokens; raise it, or protect fewer than {protected}"
        )
    while low < high:
        middle = (low + high + 1) // 2
        if predict_nbytes(at(middle), specs).device <= evictor.bytes:
            low = middle
        else:
            high = middle - 1
    return at(low)


def allocate(policies: Sequence[CachePolicy], specs: Sequence[LayerSpec]) -> list[CachePolicy]:
    """The policies with a codec of its own for each layer that has ``auto``, or for its heads; the others are left alone.

    Layers of one ``auto`` share its bits. A limit in bytes is one for the whole cache, the other layers included.

    Raises:
      FileNotFoundError: no sensitivity file.
      ValueError: a sensitivity file of another model, a limit below the smallest cache, or two limits in bytes.
    """
    found = list(policies)
    autos = list(dict.fromkeys(policy.codec for policy in policies if isinstance(policy.codec, Auto)))
    limits = [auto.bytes for auto in autos if auto.bytes]
    if len(limits) > 1:
        raise ValueError(f"one auto(bytes=...) decides about a whole cache, got {' and '.join(map(str, limits))}")
    for auto in sorted(autos, key=lambda auto: auto.bytes):  # the one in bytes has to know what the others take
        members = [i for i, policy in enumerate(policies) if policy.codec == auto and isinstance(specs[i], CacheSpec)]
        for i, codec in zip(members, _codecs(auto, members, found, specs), strict=True):
            found[i] = dataclasses.replace(found[i], codec=codec)
    return found


def _codecs(auto: Auto, members: list[int], policies: Sequence[CachePolicy], specs: Sequence[LayerSpec]) -> list:
    """A codec for each of the layers ``members``.

    What a head costs is what it would cost in a pool of its own, so that pools of several never take more than was reckoned.
    """
    table = check_sensitivity(auto.file, len(specs), by_head=auto.by_head)
    tier, least = "device" if auto.bytes else "history", table.bits[0]
    shares = [_shares(auto, policies[i], specs[i], table.heads) for i in members]  # layers, or their heads

    @functools.cache
    def ledger(policy: CachePolicy, spec: CacheSpec, key_bits: int = least, value_bits: int = least) -> Bytes:
        return predict_nbytes(dataclasses.replace(policy, codec=layer_codec(key_bits, value_bits)), spec)

    total = sum((ledger(*share) for layer in shares for share in layer), Bytes())
    if auto.bytes:
        others = [predict_nbytes(policies[i], specs[i]).device for i in range(len(specs)) if i not in members]
        taken, limit = total.device + sum(others), auto.bytes
    else:
        taken, limit = total.history, int(Fraction(str(auto.bits)) * total.history_values / 8)
    if taken > limit:
        raise ValueError(_too_little(auto, taken, total))

    tables = [side if auto.by_head else side.sum(axis=1, keepdims=True) for side in (table.keys, table.values)]
    divergence, cost = [], []
    for i, layer in zip(members, shares, strict=True):
        for head, share in enumerate(layer):
            base = getattr(ledger(*share), tier)
            for side, measured in enumerate(tables):
                pairs = [(least, b) if side else (b, least) for b in table.bits]
                divergence.append(measured[i, head])
                cost.append([getattr(ledger(*share, *pair), tier) - base for pair in pairs])
    chosen = iter([table.bits[option] for option in spend(divergence, cost, limit - taken)])
    return [_joined([layer_codec(next(chosen), next(chosen)) for _ in layer]) for layer in shares]


def _shares(auto: Auto, policy: CachePolicy, spec: CacheSpec, measured: int) -> list[tuple[CachePolicy, CacheSpec]]:
    """What gets bits of its own in a layer: the layer, or each of its kv heads."""
    if not auto.by_head:
        return [(policy, spec)]
    if measured != spec.kv_heads:
        raise ValueError(
            f"auto(by_head=true) needs numbers for each of a layer's {spec.kv_heads} kv heads, but {KIND.title(auto.file)} "
            f"has {measured} for a layer: measure them with `memjax sensitivity --by-head`"
        )
    return [one_head(policy, spec, head) for head in range(spec.kv_heads)]


def _joined(codecs: list[KeyValueCodec]) -> KeyValueCodec:
    return codecs[0] if len(set(codecs)) == 1 else ByHead(tuple(codecs))


def _too_little(auto: Auto, taken: int, total: Bytes) -> str:
    if auto.bytes:
        return f"auto(bytes={auto.bytes}) is less than the smallest cache of these layers takes, {taken} bytes on the device"
    return f"auto(bits={auto.bits}) is less than the smallest of these layers, {total.bits_per_value:.4g} with its scales"
