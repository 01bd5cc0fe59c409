"""``plan``: does a decode step fit a TPU slice? Bytes per device, predicted from shapes, and counted by the compiler.

Weights and cache are predicted exactly, shard by shard, as the ledger counts them; no array is made. Temporaries are a guess:
the weights of three layers gathered over ``data``, one layer's cache read out in the dtype of what is not quantized, and the
logits in float32. The compiler may take more where there is room: on v5e:4x4 (8 sequences of 32,768 tokens, turboquant(4,4))
it took 1.46 GiB for DeepSeek-V2-Lite on 8 x 2 devices (guessed: 1.67) and 4.96 GiB for Llama-3-70B on 2 x 8 (guessed: 0.66).
Where libtpu is installed, its compiler is asked; then that decides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from jax.sharding import Mesh

from memjax.cache.ledger import dense_nbytes_per_token, predict_nbytes
from memjax.cache.parse import policy as parse_policy
from memjax.cache.policy import CachePolicy, layer_policies
from memjax.cache.spec import CacheSpec, LayerSpec
from memjax.models.config import ModelConfig
from memjax.models.decoder import cache_specs
from memjax.plan.compiled import MISSING, Compiled, CompileError, Request, compile_in_child, compiler_available
from memjax.plan.hardware import Tpu, tpu
from memjax.plan.placement import abstract_decoder, device_nbytes, place_cache, place_weights, stand_in_mesh

MOST_CONTEXT = 2**24  # tokens; where the search for the largest context ends
_STEP = 128  # its resolution
_AHEAD = 3  # layers whose weights are gathered at a time: a guess


@dataclass(frozen=True)
class Predicted:
    """Bytes per device by arithmetic; ``host``: of the cache, in the host's memory."""

    weights: int
    cache: int
    temporaries: int
    host: int = 0

    @property
    def arguments(self) -> int:
        """What the step is given: weights and cache."""
        return self.weights + self.cache

    @property
    def total(self) -> int:
        """Bytes of HBM."""
        return self.arguments + self.temporaries


@dataclass(frozen=True)
class Plan:
    """What a decode step needs, per device of the mesh.

    Attributes:
      model, policy, dtype, layers, batch, context: what was asked for.
      tpu: the slice.
      mesh: devices along ``data`` and ``model``.
      predicted: from shapes.
      compiled: from the compiler; None where it was not asked, is missing, or failed.
      compiled_layers: if fewer than ``layers``, ``compiled`` is extrapolated from compilations of so many and of half as many.
      note: why ``compiled`` is None, in words.
      refused: the compiler refused the step for lack of memory.
      failed: it ended in another error.
      dense_per_token, cache_per_token: bytes that a token of one sequence costs in an uncompressed cache, and in this one (all
        tiers and states, over batch x context).
      largest_context: tokens per sequence up to which the prediction fits at this batch, a multiple of 128.
    """

    model: str
    policy: str
    dtype: str
    layers: int
    batch: int
    context: int
    tpu: Tpu
    mesh: tuple[int, int]
    predicted: Predicted
    dense_per_token: int
    cache_per_token: float
    largest_context: int
    compiled: Compiled | None = None
    compiled_layers: int | None = None
    note: str = ""
    refused: bool = False
    failed: bool = False

    @property
    def fits(self) -> bool:
        """By the compiler, if it was asked, else by prediction."""
        if self.refused:
            return False
        return (self.compiled or self.predicted).total <= self.tpu.hbm

    def to_json(self) -> dict:
        """A JSON-compatible dict, sizes in bytes."""
        data = dataclasses.asdict(self)
        for part in ("predicted", "compiled"):
            if data[part] is not None:
                data[part] |= {"total": getattr(self, part).total}
        data["predicted"]["arguments"] = self.predicted.arguments
        return data | {"hbm": self.tpu.hbm, "fits": self.fits}


class _Job:
    """A step for which a slice has to be divided: what it needs on a mesh."""

    def __init__(self, config: ModelConfig, policy: CachePolicy, batch: int, dtype: str):
        self.config, self.policy, self.batch, self.dtype = config, policy, batch, dtype
        self.decoder = abstract_decoder(config, dtype)
        self.weights = functools.cache(self._weights)

    def predict(self, mesh: tuple[int, int], context: int) -> Predicted:
        cache = place_cache(self.policy, self.specs(context), stand_in_mesh(*mesh))
        device, host = device_nbytes(cache), device_nbytes(cache, host=True)
        return Predicted(self.weights(mesh)[0], device, self.temporaries(mesh, context), host)

    def specs(self, context: int) -> tuple[LayerSpec, ...]:
        return cache_specs(self.config, self.batch, context, self.dtype)

    def temporaries(self, mesh: tuple[int, int], context: int) -> int:
        specs = self.specs(context)
        read = max(map(_read_out, specs)) // (mesh[0] * _head_devices(specs, mesh[1]))
        return self.weights(mesh)[1] + read + 4 * self.batch // mesh[0] * self.config.vocab

    def total_at(self, mesh: tuple[int, int], context: int) -> Callable[[int], int]:
        """The total for so many tokens by arithmetic: each layer's share on a device is what it is at ``context``."""
        specs = self.specs(context)
        layers, where = layer_policies(self.policy, specs), stand_in_mesh(*mesh)
        kinds = Counter(zip(layers, specs, strict=True))
        shares = {kind: _share(*kind, where) for kind in kinds}

        def total(tokens: int) -> int:
            layers = ((predict_nbytes(one, _resized(spec, tokens)).device, (one, spec)) for one, spec in kinds)
            cache = sum(kinds[kind] * round(size * shares[kind]) for size, kind in layers)
            return self.weights(mesh)[0] + cache + self.temporaries(mesh, tokens)

        return total

    def _weights(self, mesh: tuple[int, int]) -> tuple[int, int]:
        """Bytes of the weights, and of those that are gathered over data at a time."""
        weights = device_nbytes(place_weights(self.decoder, stand_in_mesh(*mesh)))
        if mesh[0] == 1:
            return weights, 0
        alone, blocks = stand_in_mesh(1, mesh[1]), self.config.blocks
        kinds = {(type(block.mixer), block.mlp): i for i, block in enumerate(blocks)}.values()
        return weights, _AHEAD * max(device_nbytes(place_weights(self.decoder.layers[i], alone)) for i in kinds)


def _share(policy: CachePolicy, spec: LayerSpec, mesh: Mesh) -> Fraction:
    return Fraction(device_nbytes(place_cache(policy, (spec,), mesh)), predict_nbytes(policy, spec).device)


def _resized(spec: LayerSpec, tokens: int) -> LayerSpec:
    return dataclasses.replace(spec, capacity=tokens) if isinstance(spec, CacheSpec) else spec


def _read_out(spec: LayerSpec) -> int:
    return spec.batch * spec.capacity * dense_nbytes_per_token(spec) if isinstance(spec, CacheSpec) else 0


def _head_devices(specs: Sequence[LayerSpec], model: int) -> int:
    """Devices over which the heads of the attention layers are spread."""
    heads = {spec.kv_heads for spec in specs if isinstance(spec, CacheSpec)}
    return model if heads and all(number % model == 0 for number in heads) else 1


def plan(
    config: ModelConfig,
    policy: str,
    batch: int,
    context: int,
    slice_name: str,
    *,
    model: str = "",
    mesh: tuple[int, int] | None = None,
    dtype: str = "bfloat16",
    layers: int | None = None,
    compile_step: bool = True,
    python: str = sys.executable,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Bytes per device of a decode step: weights, cache and temporaries.

    Args:
      config: the model; ``memjax.plan.models.model_config`` has some by name.
      policy: of the cache, as text.
      batch, context: sequences, and tokens that each layer's cache is made for.
      slice_name: the TPU, such as "v5e:4x4".
      model: what to call it.
      mesh: devices along data and along model; None: the split that needs least by prediction, of equal ones the smallest
        ``data``.
      dtype: of the weights, and of what the cache does not quantize.
      layers: compile the first ``layers`` and half as many, and extrapolate; None: compile the model.
      compile_step: False: predict only.
      python: an interpreter whose libtpu compiles.
      say: told what is going on.

    Raises:
      ValueError: an unknown TPU or policy, sizes below 1, a mesh of another size, a batch that ``data`` does not divide, or a
        policy that cannot serve the model.
    """
    hardware, parsed = tpu(slice_name), parse_policy(policy)
    _check(config, batch, context, dtype, layers)
    job = _Job(config, parsed, batch, dtype)
    mesh = choose_mesh(job, hardware, context) if mesh is None else _checked_mesh(mesh, hardware, batch)
    specs = cache_specs(config, batch, context, dtype)
    found = Plan(
        model=model or config.family,
        policy=policy,
        dtype=dtype,
        layers=config.layers,
        batch=batch,
        context=context,
        tpu=hardware,
        mesh=mesh,
        predicted=job.predict(mesh, context),
        dense_per_token=dense_nbytes_per_token(specs),
        cache_per_token=predict_nbytes(parsed, specs).total / (batch * context),
        largest_context=largest_context(job, hardware, mesh, context),
    )
    if not compile_step:
        return dataclasses.replace(found, note="not compiled")
    if not compiler_available(python):
        return dataclasses.replace(found, note=MISSING)
    return _with_compiled(found, config, layers, python, say)


def _check(config: ModelConfig, batch: int, context: int, dtype: str, layers: int | None) -> None:
    for name, value in (("batch", batch), ("context", context)):
        if not 1 <= value <= MOST_CONTEXT:
            raise ValueError(f"{name} must lie between 1 and {MOST_CONTEXT:,}, got {value}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype {dtype!r} is not one of bfloat16, float16, float32")
    if layers is not None and not 2 <= layers < config.layers:
        raise ValueError(f"to extrapolate to {config.layers} layers, compile at least 2 and fewer than those, got {layers}")


def _checked_mesh(mesh: tuple[int, int], hardware: Tpu, batch: int) -> tuple[int, int]:
    if len(mesh) != 2 or min(mesh) < 1 or math.prod(mesh) != hardware.devices:
        sizes = "x".join(map(str, mesh))
        raise ValueError(f"{hardware.name} has {hardware.devices} devices; a mesh data x model of {sizes} is of another size")
    if batch % mesh[0]:
        raise ValueError(f"a batch of {batch} does not divide over the {mesh[0]} devices of axis data")
    return tuple(mesh)


def choose_mesh(job: _Job, hardware: Tpu, context: int) -> tuple[int, int]:
    """Devices along data and model for which the prediction is smallest."""
    data = [d for d in range(1, hardware.devices + 1) if hardware.devices % d == 0 and job.batch % d == 0]
    meshes = [(d, hardware.devices // d) for d in data]
    return min(meshes, key=lambda mesh: job.predict(mesh, context).total)


def largest_context(job: _Job, hardware: Tpu, mesh: tuple[int, int], context: int) -> int:
    """The most tokens per sequence that fit by prediction, a multiple of 128 up to ``MOST_CONTEXT``; 0: not even 128."""

    total = job.total_at(mesh, context)

    def fits(tokens: int) -> bool:
        try:
            return total(tokens) <= hardware.hbm
        except ValueError:  # a budget, say, that is larger
            return False

    low, high = 0, -(-context // _STEP)
    most = MOST_CONTEXT // _STEP
    while high < most and fits(high * _STEP):
        low, high = high, min(2 * high, most)
    if high == most and fits(MOST_CONTEXT):
        return MOST_CONTEXT
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle)
    return low * _STEP


def _with_compiled(found: Plan, config: ModelConfig, layers: int | None, python: str, say: Callable[[str], None]) -> Plan:
    def run(count: int) -> Compiled:
        say(f"compiling {count} layers for {found.tpu.name}")
        cut = dataclasses.replace(config, blocks=config.blocks[:count])
        request = (found.policy, found.batch, found.context, found.dtype, found.tpu.topology, found.mesh)
        return compile_in_child(Request(cut.to_json(), *request), python)

    try:
        if layers is None:
            return dataclasses.replace(found, compiled=run(config.layers))
        ends = {count: run(count) for count in (layers // 2, layers)}
        return dataclasses.replace(found, compiled=extrapolate(ends, config.layers), compiled_layers=layers)
    except CompileError as error:
        return dataclasses.replace(found, note=str(error), refused=error.too_large, failed=not error.too_large)


def extrapolate(ends: dict[int, Compiled], layers: int) -> Compiled:
    """The straight line through two compilations, keyed by their layers; ``seconds`` add up."""
    (few, first), (many, last) = sorted(ends.items())

    def line(name: str) -> int:
        start, end = getattr(first, name), getattr(last, name)
        return max(0, round(end + (end - start) * (layers - many) / (many - few)))

    numbers = {field.name: line(field.name) for field in dataclasses.fields(Compiled) if field.name != "seconds"}
    return Compiled(**numbers, seconds=first.seconds + last.seconds)
