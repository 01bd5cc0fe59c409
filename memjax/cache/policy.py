"""Policies: how a cache is made small. One value per axis, composed by ``chain``, like an optimizer in Optax.

    policy = mj.chain(mj.streaming(4, 1020), mj.int4(rotate=True), mj.host(256))
    policy == mj.policy("streaming(4,1020)+int4(rotate=true)+host(256)")
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax._compat import has_host_memory
from memjax.attention.attend import attend as _attend
from memjax.cache.layer import LayerCache, commit, init_layer
from memjax.cache.layer import update as _update
from memjax.cache.pools import HeadPools, pools_of
from memjax.cache.recurrent import RecurrentCache, init_recurrent
from memjax.cache.share import check_shared
from memjax.cache.spec import CacheSpec, LayerSpec, RecurrentSpec, check_integers
from memjax.evict import AdaKV, Budgeted, Duo, Evictor, MassFold, Quest, Rereading, Streaming
from memjax.offload import HostTier
from memjax.quantize import Dense, FrontEnd, KeyValueCodec
from memjax.quantize.calibration import check_fingerprint

AnyLayerCache = LayerCache | HeadPools | RecurrentCache
ModelCache = tuple[AnyLayerCache, ...]
KERNELS = ("pallas", "xla")


@dataclass(frozen=True)
class Windows:
    """Tokens that nothing lossy happens to: the first ``sinks`` and the newest ``recent`` ones.

    Raises:
      ValueError: a number that is negative or no integer.
    """

    sinks: int = 4
    recent: int = 64

    def __post_init__(self):
        check_integers("protect", 0, sinks=self.sinks, recent=self.recent)


class Policy(Protocol):
    """What makes caches for a model's layers: a ``CachePolicy`` or a ``LayerwisePolicy``."""

    def init(self, spec: LayerSpec | Sequence[LayerSpec]) -> AnyLayerCache | ModelCache: ...

    def for_layer(self, index: int, layers: int) -> CachePolicy: ...

    def parts(self) -> Sequence[CachePolicy]: ...

    def replaced(self, change: Callable[[CachePolicy], CachePolicy]) -> Policy: ...


@dataclass(frozen=True)
class CachePolicy:
    """One layer's policy: a value for each axis. Hashable, printable, a static jit argument.

    Attributes:
      codec: in how many bits tokens of the history are kept.
      evictor: which tokens stay, or, of tokens that all stay, which are read; None: all.
      tier: where the history lives; None: on the device.
      windows: what is protected from the codec and from eviction; None: 4 sinks and 64 recent tokens for a lossy codec or a
        budget (with ``streaming``, its own sinks), else nothing.
      front: what is done to keys and values before they are coded; None: what is usual for the codec.
      fold: whether tokens that an evictor with a budget lets go are folded into others; None: they are lost.
      kernels: how the history is read, see ``kernels``; None: with kernels that were checked on the hardware at hand,
        else with XLA.
    """

    codec: KeyValueCodec = Dense()
    evictor: Evictor | None = None
    tier: HostTier | None = None
    windows: Windows | None = None
    kernels: str | None = None
    front: FrontEnd | None = None
    fold: MassFold | None = None

    def __post_init__(self):
        if self.kernels not in (None, *KERNELS):
            raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {self.kernels!r}")
        if isinstance(self.evictor, Budgeted | Rereading):
            self._check_axes()
        if self.codec.heads_apart and self.evictor is not None and self.evictor.joint:
            raise ValueError(
                f"{self}: {self.evictor.name} decides about all heads of a layer together, but with by_head=true those of "
                "different bits lie apart; use auto without by_head"
            )
        if self.fold is not None and self.evictor is not None:
            self.check_fold()
        if isinstance(self.evictor, Quest):
            self._check_pages()

    def check_fold(self) -> None:
        """Raises ValueError if there is something to do with tokens that go, but nothing that chooses them."""
        if self.fold is not None and not isinstance(self.evictor, Budgeted | Rereading):
            raise ValueError(f"{self}: massfold folds tokens that a budget lets go: chain it with one, h2o(256)+massfold")

    def _check_axes(self) -> None:
        """Raises ValueError where a budget cannot go together with another axis, on any layer."""
        if self.codec.tile > 1:
            raise ValueError(
                f"{self}: {self.codec.name} codes tiles of {self.codec.tile} tokens, out of which {self.evictor.name} cannot "
                "take single ones; use a token-wise codec such as int4 or turboquant"
            )
        if self.codec.page > 1:
            raise ValueError(
                f"{self}: {self.codec.name} reads pages of neighbours, but {self.evictor.name} scatters tokens; use turboquant"
            )
        if self.tier is not None:
            raise ValueError(f"{self}: {self.evictor.name} scatters tokens over slots, which the host tier cannot move")

    def _check_pages(self) -> None:
        """Raises ValueError where reading some pages only cannot go together with another axis, on any layer."""
        codec, page = self.codec, self.evictor.page
        if codec.page > 1 or codec.rest is not None:
            raise ValueError(
                f"{self}: {codec.name} decides itself what is read or kept in which bits, which {self.evictor.name} cannot "
                "join; use turboquant"
            )
        if page % codec.tile:
            raise ValueError(
                f"{self}: pages of {page} tokens cut through {codec.name}'s tiles of {codec.tile}; use page={codec.tile}"
            )
        if self.tier is not None:
            raise ValueError(f"{self}: {self.evictor.name} reads pages of the device's memory; leave the host tier away")

    def resolved_windows(self) -> Windows:
        """The windows in force."""
        windows, streaming = self.windows, isinstance(self.evictor, Streaming)
        if windows is None:
            lossy = self.codec.lossy or isinstance(self.evictor, Budgeted | Quest | Rereading)
            windows = Windows() if lossy else Windows(0, 0)
            if streaming:
                windows = dataclasses.replace(windows, sinks=self.evictor.sinks)
        if streaming:
            windows = dataclasses.replace(windows, sinks=max(windows.sinks, self.evictor.sinks))
        return windows

    def resolved_front(self) -> FrontEnd:
        """The front end in force."""
        return self.codec.front if self.front is None else self.front

    def validate(self, spec: CacheSpec) -> None:
        """Raises ValueError if this policy cannot serve ``spec``, with the reason."""
        self.codec.validate(spec.coded_dim)
        self.resolved_front().resolved(spec)
        if self.codec.two_streams and spec.latent_dim is not None:
            raise ValueError(
                f"{self}: {self.codec.name} stores two streams, of which a latent stream's rotary part is one already; use a "
                "codec of one stream"
            )
        if self.codec.tile > 1 and self.tier is not None:
            raise ValueError(f"{self}: {self.codec.name} codes tiles of tokens, which the host tier cannot move yet")
        if self.codec.page > 1 and self.tier is not None:
            raise ValueError(
                f"{self}: {self.codec.name} reads chosen pages of the device's memory, which the host tier cannot serve yet"
            )
        self.check_fold()
        if self.fold is not None and self.codec.two_streams:
            raise ValueError(f"{self}: massfold merges values of one stream, and {self.codec.name} stores two")
        if self.evictor is not None:
            self.evictor.validate(spec)
            if self.evictor.shares_slots:
                check_shared(spec, self.codec, f"in {self}, {self.evictor.instead}")
        if self.fold is not None and spec.latent_dim is not None:
            raise ValueError(f"{self}: massfold changes values and leaves keys, but a latent stream has one vector for both")
        if isinstance(self.evictor, Budgeted):
            self._check_budget(spec)
        if isinstance(self.evictor, Rereading) and self.evictor.budget:
            self._check_choice(self.evictor.budget)
        if isinstance(self.evictor, Quest):
            self._check_chosen(spec)
        streaming = self.evictor if isinstance(self.evictor, Streaming) else None
        moves_positions = streaming is not None and streaming.positions == "cache" and streaming.sinks > 0
        if moves_positions and spec.rope == "applied":
            raise ValueError(
                f"{self}: positions inside the cache need the layer's rotary embedding (CacheSpec(rope=Rope(...)) and "
                "keys that are not rotated yet); for keys that arrive rotated use positions=text"
            )

    def _check_budget(self, spec: CacheSpec) -> None:
        tokens = self.evictor.tokens(spec.capacity)
        if isinstance(self.evictor, AdaKV) and self.fold is not None:
            raise ValueError(f"{self}: heads that share their slots cannot be joined with massfold; use snapkv")
        if tokens < spec.capacity:
            self._check_choice(tokens)

    def _check_choice(self, tokens: int) -> None:
        windows = self.resolved_windows()
        if tokens <= windows.sinks + windows.recent:
            raise ValueError(
                f"{self}: a budget of {tokens} tokens leaves none to choose besides the {windows.sinks + windows.recent} that "
                f"are protected; raise it, or protect fewer, for instance +protect({windows.sinks},{tokens // 4})"
            )

    def _check_chosen(self, spec: CacheSpec) -> None:
        windows, evictor = self.resolved_windows(), self.evictor
        protected = windows.sinks + windows.recent
        if evictor.budget < spec.capacity and evictor.pages(protected) < 1:
            raise ValueError(
                f"{self}: a budget of {evictor.budget} tokens has no room for a page of {evictor.page} besides the "
                f"{protected} that are protected; raise it, or protect fewer, for instance +protect(4,{evictor.page})"
            )

    def for_layer(self, index: int, layers: int) -> CachePolicy:
        """The policy of layer ``index`` of ``layers``: this one, unless its evictor treats layers differently."""
        if self.evictor is None:
            return self
        windows = self.resolved_windows()
        evictor = self.evictor.for_layer(index, layers, windows.sinks + windows.recent)
        return self if evictor == self.evictor else dataclasses.replace(self, evictor=evictor)

    def init(self, spec: LayerSpec | Sequence[LayerSpec]) -> AnyLayerCache | ModelCache:
        """An empty cache for one layer, or for each of a model's layers.

        Raises:
          ValueError: the policy cannot serve a spec.
        """
        return _init(self, spec)

    def update(
        self,
        cache: LayerCache | HeadPools,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        queries: Float[Array, "B T N H"] | None = None,
        output_projection: Float[Array, "N H D"] | None = None,
    ) -> LayerCache | HeadPools:
        """Stages new tokens, see ``memjax.cache.layer.update``."""
        self._check_own(cache)
        return _update(cache, k, v, lengths, queries, output_projection)

    def attend(
        self, cache: LayerCache | HeadPools, q: Float[Array, "B T N H"], positions: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N Hv"], LayerCache | HeadPools]:
        """Reads the cache (``memjax.attention.attend``), then commits what was staged."""
        self._check_own(cache)
        return attend(cache, q, positions)

    def parts(self) -> Sequence[CachePolicy]:
        """Itself."""
        return (self,)

    def replaced(self, change: Callable[[CachePolicy], CachePolicy]) -> CachePolicy:
        """What ``change`` makes of it."""
        return change(self)

    def simulated(self) -> bool:
        """Whether this process's default device cannot honour the placement, so that bytes are kept but not moved."""
        return self.tier is not None and not has_host_memory(jax.devices()[0])

    def _check_own(self, cache: LayerCache) -> None:
        pools = [] if isinstance(cache, HeadPools) else pools_of(self, cache.spec)
        if cache.policy != self and [pool.policy for pool in pools] != [cache.policy]:
            raise ValueError(f"this cache was made by policy {cache.policy}, not by {self}")

    def __str__(self) -> str:
        parts = [part for part in (self.evictor, self.fold, self.codec, self.tier) if part is not None and part != Dense()]
        texts = [_part_string(part, self.front if part is self.codec else None) for part in parts]
        if self.windows is not None:
            texts.append(f"protect({self.windows.sinks},{self.windows.recent})")
        if self.kernels is not None:
            texts.append(f"kernels({self.kernels})")
        return "+".join(texts) or "dense"


@dataclass(frozen=True)
class LayerwisePolicy:
    """A policy per layer: ``default``, except where ``overrides`` names a layer (negative: from the end)."""

    default: CachePolicy
    overrides: tuple[tuple[int, CachePolicy], ...]

    def for_layer(self, index: int, layers: int) -> CachePolicy:
        """The policy of layer ``index`` of ``layers``."""
        table = dict(self.overrides)
        policy = table.get(index, table.get(index - layers, self.default))
        return policy.for_layer(index, layers) if isinstance(policy.evictor, Duo) else policy  # heads differ by layer anyhow

    def init(self, spec: LayerSpec | Sequence[LayerSpec]) -> AnyLayerCache | ModelCache:
        """Empty caches for a model's layers.

        Raises:
          ValueError: one spec instead of a sequence, or an override for a layer that does not exist.
        """
        return _init(self, spec)

    def parts(self) -> Sequence[CachePolicy]:
        """The default and the overrides."""
        return (self.default, *dict(self.overrides).values())

    def replaced(self, change: Callable[[CachePolicy], CachePolicy]) -> LayerwisePolicy:
        """With what ``change`` makes of each of its policies."""
        return LayerwisePolicy(change(self.default), tuple((i, change(policy)) for i, policy in self.overrides))

    def simulated(self) -> bool:
        """Whether any of the policies is."""
        return any(policy.simulated() for policy in self.parts())

    def __str__(self) -> str:
        by_policy: dict[CachePolicy, list[int]] = {}
        for index, policy in self.overrides:
            by_policy.setdefault(policy, []).append(index)
        texts = [f"{policy} on layers {','.join(map(str, indices))}" for policy, indices in by_policy.items()]
        return "; ".join([str(self.default), *texts])


def _part_string(part, front: FrontEnd | None) -> str:
    """Name and the arguments that differ from the defaults: leading ones by position, the rest by keyword."""
    leading, keyword, positional = [], [], True
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if isinstance(value, tuple):
            leading += [_part_string(each, None) for each in value]
            continue
        if isinstance(value, KeyValueCodec):  # a codec around another, which the front end then belongs to
            leading.append(_part_string(value, front))
            front = None
            continue
        said = field.metadata.get("unset") != value  # and not left to another argument
        plain = isinstance(value, int | float) and not isinstance(field.default, float | bool)
        positional &= said and plain and not field.kw_only
        if positional:
            leading.append(text)
        elif value != field.default:
            keyword.append(f"{field.name}={text}")
    if front is not None:
        usual = dataclasses.asdict(part.front)
        keyword += [f"{name}={value}" for name, value in dataclasses.asdict(front).items() if value != usual[name]]
    arguments = leading + keyword
    return f"{part.name}({','.join(arguments)})" if arguments else part.name


def _init(policy: Policy, spec: LayerSpec | Sequence[LayerSpec], layer: int = 0) -> AnyLayerCache | ModelCache:
    if isinstance(spec, Sequence):
        if isinstance(policy, LayerwisePolicy):
            missing = [i for i, _ in policy.overrides if not -len(spec) <= i < len(spec)]
            if missing:
                raise ValueError(f"per_layer names layers {missing}, but the model has {len(spec)} layers")
        layers = zip(layer_policies(policy, spec), spec, strict=True)
        return tuple(_init(one, each, i) for i, (one, each) in enumerate(layers))
    if isinstance(policy, LayerwisePolicy):
        raise ValueError("a per_layer policy needs the specs of all layers, got one spec")
    if isinstance(spec, RecurrentSpec):
        if policy.evictor is not None:
            policy.evictor.check_recurrent()
        return init_recurrent(spec)
    pools = pools_of(policy, spec)
    if len(pools) == 1:
        return init_layer(pools[0].policy, spec, layer)
    return HeadPools(tuple(init_layer(pool.policy, pool.spec, layer, pool.part) for pool in pools), policy, spec)


def layer_policies(policy: Policy, specs: Sequence[LayerSpec]) -> list[CachePolicy]:
    """The policy of every layer, with the codec that ``auto`` finds for it, and budgets in tokens where they were in bytes."""
    from memjax.cache.allocate import afford, allocate  # they predict bytes, and the ledger needs this module

    policy = afford(policy, specs)
    return allocate([policy.for_layer(i, len(specs)) for i in range(len(specs))], specs)


def attend(
    cache: LayerCache | HeadPools, q: Float[Array, "B T N H"], positions: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T N Hv"], LayerCache | HeadPools]:
    """Attention outputs of ``q`` over the cache, and the cache with its staged tokens committed."""
    out, cache = _attend(cache, q, positions)
    return out, commit(cache)


def abstract(policy: Policy, spec: LayerSpec | Sequence[LayerSpec]) -> AnyLayerCache | ModelCache:
    """The cache as ``jax.ShapeDtypeStruct`` leaves: nothing is allocated."""
    return jax.eval_shape(lambda: policy.init(spec))


def chain(*policies: CachePolicy) -> CachePolicy:
    """Composes policies that each say something about another axis; the order does not matter.

    Raises:
      ValueError: nothing to chain, something that is no policy of one layer, or two that speak about the same axis.

    >>> from memjax.cache.parts import int4, streaming
    >>> print(chain(streaming(4, 1020), int4(rotate=True)))
    streaming(4,1020)+int4(rotate=true)
    """
    if not policies:
        raise ValueError("chain needs at least one policy")
    whole = functools.reduce(_combine, policies[1:], _checked(policies[0]))
    whole.check_fold()
    return whole


def _checked(policy) -> CachePolicy:
    if not isinstance(policy, CachePolicy):
        raise ValueError(f"chain composes policies such as mj.int4() or mj.streaming(4, 1020), got {policy!r}")
    return policy


_AXES = {
    "codec": "quantization",
    "evictor": "eviction",
    "fold": "folding",
    "tier": "placement",
    "windows": "protection",
    "kernels": "kernels",
}


def _combine(first: CachePolicy, second: CachePolicy) -> CachePolicy:
    empty, merged = CachePolicy(), first
    for field, axis in _AXES.items():
        mine, theirs = getattr(first, field), getattr(_checked(second), field)
        if theirs == getattr(empty, field):
            continue
        if mine != getattr(empty, field):
            raise ValueError(f"cannot chain {first} and {second}: both decide {axis}; keep one of them")
        merged = dataclasses.replace(merged, **{field: theirs})
        if field == "codec":  # the front end goes with it
            merged = dataclasses.replace(merged, front=second.front)
    return merged


def check_calibration(policy: Policy, layers: int, fingerprint: str) -> None:
    """Raises ValueError if a file of what was measured is of another model than the one with ``fingerprint``."""
    for each in policy.parts():  # ``for_layer`` leaves no file to an evictor
        if each.evictor is not None:
            each.evictor.check_model(layers, fingerprint)
    policies = dict.fromkeys(policy.for_layer(i, layers) for i in range(layers))
    for path in sorted({each.resolved_front().calibration for each in policies} - {""}):
        check_fingerprint(path, fingerprint)
    for each in policies:
        each.codec.check_model(layers, fingerprint)


def per_layer(default: CachePolicy, overrides: Mapping[int, CachePolicy]) -> LayerwisePolicy:
    """``default`` for every layer but those that ``overrides`` names; -1 is the last layer.

    Raises:
      ValueError: an override that is no policy of one layer.
    """
    return LayerwisePolicy(_checked(default), tuple(sorted((int(i), _checked(p)) for i, p in overrides.items())))


def protect_layers(policy: CachePolicy, count: int) -> Policy:
    """``policy``, but dense in the first and last ``count`` layers.

    Raises:
      ValueError: a count that is negative or no integer.
    """
    check_integers("protect_layers", 0, count=count)
    if count == 0:
        return policy
    return per_layer(policy, {i: CachePolicy() for j in range(count) for i in (j, -1 - j)})


def lengths(cache: ModelCache) -> Int[Array, "B"]:
    """Tokens committed in each row (the same in every layer)."""
    return jnp.asarray(cache[0].length)
