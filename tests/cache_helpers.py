"""Small things that the tests of the cache share: random tokens, a table of policies, an oracle in numpy float64."""

from __future__ import annotations

import collections
import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax as mj
from memjax.quantize import (
    NF4,
    NVFP4,
    Codec,
    Dense,
    Fp8,
    Gear,
    Int2,
    Int4,
    Int8,
    KeyValueCodec,
    Kivi,
    KVarN,
    Progressive,
    TurboQuant,
)
from memjax.quantize.front import OFF

# Most of a test's time is LLVM optimising programs that run once.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

BATCH, HEADS, GROUPS, DIM, TOKENS, CAPACITY = 2, 2, 2, 16, 49, 56
ROPE = mj.Rope(DIM, theta=100.0)
SPEC = mj.CacheSpec(BATCH, HEADS, DIM, CAPACITY, "float32", rope=ROPE)


@dataclass(frozen=True)
class Row:
    """A policy and, said once more and independently, what it keeps and how."""

    text: str
    codec: KeyValueCodec = Dense()
    sinks: int = 0
    recent: int = 0
    evict: tuple[int, int] | None = None  # sinks that stay, window
    text_positions: bool = False
    atol: float = 1e-5  # of outputs; more where another compilation may round a scale the other way
    bound: float = 1e-5  # largest error of an output against no compression at all, relative to its size

    @property
    def policy(self):
        """Without the front end, which has tests of its own."""
        return plain(self.text)


def plain(text: str):
    """A policy whose codec is given keys and values as they are."""
    policy = mj.policy(text)
    return dataclasses.replace(policy, front=None if policy.codec.front == OFF else OFF)


INT8, INT4, FP8 = 0.03, 0.5, 0.15
ROWS = [
    Row("dense"),
    Row("protect(4,8)"),
    Row("int8", Int8(), 4, 64),
    Row("int8+protect(0,0)", Int8(), bound=INT8),
    Row("int8+protect(2,8)", Int8(), 2, 8, bound=INT8),
    Row("int8(rotate=true)+protect(2,8)", Int8(True), 2, 8, bound=INT8),
    Row("int4+protect(2,0)", Int4(), 2, 0, bound=INT4),
    Row("int4(rotate=true)+protect(0,8)", Int4(True), 0, 8, bound=INT4),
    Row("fp8+protect(2,8)", Fp8(), 2, 8, bound=FP8),
    Row("fp8(format=e5m2)+protect(2,8)", Fp8(format="e5m2"), 2, 8, bound=2 * FP8),
    Row("int2(rotate=true)+protect(2,8)", Int2(True), 2, 8, bound=0.9),
    Row("nf4+protect(2,8)", NF4(), 2, 8, bound=INT4),
    Row("nvfp4+protect(2,8)", NVFP4(), 2, 8, bound=INT4),
    Row("turboquant(4,4)+protect(2,8)", TurboQuant(4, 4), 2, 8, bound=INT4),
    Row("turboquant(3,2,scale=norm)+protect(2,0)", TurboQuant(3, 2, "norm"), 2, 0, bound=0.9),
    Row("kivi(4,8)+protect(2,8)", Kivi(4, 8), 2, 8, bound=INT4),
    Row("kivi(2,8)+protect(0,0)", Kivi(2, 8), 0, 0, bound=0.9),
    Row("kvarn(4,4,8)+protect(2,4)", KVarN(4, 4, 8), 2, 4, atol=1e-3, bound=INT4),
    Row("progressive(refine=1.0,page=8,share=0.0)+protect(2,8)", Progressive(1.0, 8, 0.0), 2, 8, bound=0.9),
    Row("streaming(4,20)+progressive(refine=1.0,page=8,share=0.0)+protect(4,6)", Progressive(1.0, 8, 0.0), 4, 6, (4, 20)),
    Row("gear(int4,16)+protect(2,8)", Gear(Int4(), 16), 2, 8),  # of full rank: nothing is lost
    Row("gear(int4,0,sparse=0.2)+protect(2,8)", Gear(Int4(), 0, 0.2), 2, 8, bound=INT4),
    Row("streaming(4,20)+gear(kivi(4,8),16,sparse=0.1)+protect(4,6)", Gear(Kivi(4, 8), 16, 0.1), 4, 6, (4, 20)),
    Row("streaming(4,20)+kivi(4,8)+protect(4,6)", Kivi(4, 8), 4, 6, (4, 20), bound=INT4),
    Row("quest(50,4)+protect(2,8)"),
    Row("streaming(4,16)", evict=(4, 16)),
    Row("streaming(4,16,positions=text)", evict=(4, 16), text_positions=True),
    Row("streaming(0,16)", evict=(0, 16)),
    Row("streaming(4,60)", evict=None),
    Row("streaming(4,16)+int8+protect(4,8)", Int8(), 4, 8, (4, 16), bound=INT8),
    Row("streaming(2,16)+protect(6,32)", Dense(), 6, 16, (6, 16)),
    Row("host(8,4)"),
    Row("int8+protect(2,8)+host(8,4)", Int8(), 2, 8, bound=INT8),
    Row("streaming(4,24)+gear(int4,16)+protect(2,8)+host(8,4)", Gear(Int4(), 16), 4, 8, (4, 24)),
    Row("streaming(4,24)+int4+protect(2,8)+host(8,4)", Int4(), 4, 8, (4, 24), bound=INT4),
]
row_id = "{0.text}".format


def row(text: str) -> Row:
    """A row of the table by its policy."""
    return next(each for each in ROWS if each.text == text)


def qkv(seed: int, batch=BATCH, tokens=TOKENS, heads=HEADS, groups=GROUPS, dim=DIM):
    """Queries [B, T, N, H], keys and values [B, T, K, H], float32 in numpy."""
    draw = np.random.default_rng(seed).standard_normal
    shapes = [(batch, tokens, heads * groups, dim)] + 2 * [(batch, tokens, heads, dim)]
    return tuple(draw(shape).astype(np.float32) for shape in shapes)


TRACES = collections.Counter()  # of ``step``, by cache policy, spec and chunk size


def slow_but(fast, cases):
    """Parameters of a test: those that are not in ``fast`` run with the slow tests."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@quick_jit
def step(cache, q, k, v, lengths=None):
    """update, then attend: one chunk."""
    if lengths is None:
        TRACES[cache.policy, cache.spec, q.shape[1]] += 1
    return mj.attend(mj.update(cache, k, v, lengths), q)


def in_chunks(step, cache, tokens, sizes, *more):
    """Outputs [B, T, N, H] of ``step`` for tokens (q, k, v) that come in chunks of ``sizes``, and the cache."""
    outs, start = [], 0
    for size in sizes:
        out, cache = step(cache, *(x[:, start : start + size] for x in tokens), *more)
        outs.append(np.asarray(out))
        start += size
    return np.concatenate(outs, axis=1), cache


def run(cache, tokens, sizes):
    """``in_chunks`` with the plain step."""
    return in_chunks(step, cache, tokens, sizes)


def numpy_rope(x: np.ndarray, positions: np.ndarray, theta: float | None) -> np.ndarray:
    """Half-split rotary embedding of all channels; x [..., T, H], positions [T]; theta None: none."""
    if theta is None:
        return x
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def numpy_softmax(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def by_kv_head(tokens):
    """float64 q [B, K, G, T, H], k and v [B, K, 1, T, H]."""
    q, k, v = (np.asarray(x, np.float64) for x in tokens)
    batch, length, heads, dim = k.shape
    q = q.reshape(batch, length, heads, -1, dim).transpose(0, 2, 3, 1, 4)
    return q, *(x.transpose(0, 2, 1, 3)[:, :, None] for x in (k, v))


def as_output(out: np.ndarray) -> np.ndarray:
    """[B, K, G, T, H] to [B, T, N, H]."""
    batch, heads, groups, length, dim = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads * groups, dim)


def dense_oracle(tokens, theta=ROPE.theta, window=None, softcap=None) -> np.ndarray:
    """Causal attention without any compression."""
    q, k, v = by_kv_head(tokens)
    t = np.arange(q.shape[-2])
    q, k = numpy_rope(q, t, theta), numpy_rope(k, t, theta)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    distance = t[:, None] - t
    mask = (distance >= 0) & (distance < (window or len(t)))
    return as_output(numpy_softmax(scores, mask) @ v)


def oracle(row: Row, tokens, sizes, theta=ROPE.theta, model_window=None) -> np.ndarray:
    """What attention over the compressed cache has to give when tokens come in chunks of ``sizes``.

    A query reads a token exactly if it is a sink, or came in the query's own chunk, or was among the ``recent`` last
    ones before that chunk; else it reads what the codec makes of it.
    """
    q, k, v = by_kv_head(tokens)
    t = np.arange(q.shape[-2])
    k = numpy_rope(k, t, theta)
    chunk_start = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    tile = row.codec.tile
    entered = np.maximum(chunk_start - row.recent - row.sinks, 0) // tile * tile
    exact = (t < row.sinks) | (t >= row.sinks + entered[:, None])
    whole = slice(row.sinks, row.sinks + max((len(t) - row.sinks) // tile * tile, tile))
    k_lossy, v_lossy = k.copy(), v.copy()
    k_lossy[..., whole, :], v_lossy[..., whole, :] = (
        lossy(codec, x[..., whole, :]) for codec, x in ((row.codec.keys, k), (row.codec.values, v))
    )

    def scores_at(positions: np.ndarray) -> np.ndarray:
        turned = numpy_rope(q, positions, theta)
        return np.where(exact, turned @ k.swapaxes(-1, -2), turned @ k_lossy.swapaxes(-1, -2))

    scores, distance = scores_at(t), t[:, None] - t
    mask = distance >= 0
    if row.evict is not None:
        sinks, window = row.evict
        mask &= (distance < window) | (t < sinks)
        if not row.text_positions:
            moved = np.minimum(t, sinks + window - 1)
            scores = np.where(t < sinks, scores_at(moved), scores)
            distance = np.where(t < sinks, moved[:, None] - t, distance)
    if model_window is not None:
        mask &= distance < model_window
    weights = numpy_softmax(scores / np.sqrt(q.shape[-1]), mask)
    return as_output((weights * exact) @ v + (weights * ~exact) @ v_lossy)


def lossy(codec: Codec, x: np.ndarray) -> np.ndarray:
    """What a codec makes of vectors [..., T, H]."""
    coded = jax.jit(lambda y: codec.decode(codec.encode(y, jnp.float32)))(x.swapaxes(-1, -2).astype(np.float32))
    return np.asarray(coded, np.float64).swapaxes(-1, -2)


def relative_error(x, reference) -> float:
    """Root of the mean square error over the root of the mean square."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.sqrt(np.mean((x - reference) ** 2) / np.mean(reference**2)))
