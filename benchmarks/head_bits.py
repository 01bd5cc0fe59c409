"""Whether bits should differ by kv head, too: what ``auto`` would gain if each head's keys and values had bits of their own.

    python benchmarks/head_bits.py --tokens 512

Sensitivities are measured as by ``memjax sensitivity``, but head by head: a layer reads the uncompressed run's hidden states
through a cache with coded keys or values (static setting, four sinks), and only the outputs of one kv head's queries are taken
from it; heads are independent up to the output projection, which is linear. Bits are then spent by the same exact program, per
layer and per head, on what the even tokens say, and judged by what the odd tokens say. Divergences of streams are added up, as
``auto`` does. Writes results/head_bits.{json,md}.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import memjax as mj
from memjax.cache.policy import CachePolicy, Windows
from memjax.data import CODE, NOVEL
from memjax.evaluate.compare import kl_divergence
from memjax.evaluate.layerwise import next_hidden
from memjax.evaluate.report import save_json
from memjax.evaluate.suite import circumstances
from memjax.quantize import Dense
from memjax.quantize.auto import Pair, cheapest_sum, stream_codec

RESULTS = Path(__file__).parent / "results"
BITS = (2, 3, 4)
LIMITS = (2.5, 2.75, 3.0, 3.25, 3.5)  # bits of a code on average, scales not counted: they are the same everywhere


@jax.jit
def _mixed(layer, x):
    """What the mixer gives without coding, as the sum of kv heads' parts."""
    return _parts(layer, x, CachePolicy().init(_spec(layer, x)))


@jax.jit(static_argnames="policy")
def _coded(layer, x, policy):
    return _parts(layer, x, policy.init(_spec(layer, x)))


def _spec(layer, x):
    config = layer.mixer.config
    sizes = {"rope": config.rope, "scale": config.scale, "window": config.window, "softcap": config.softcap}
    return mj.CacheSpec(1, config.kv_heads, config.head_dim, x.shape[1], "float32", q_heads=config.q_heads, **sizes)


def _parts(layer, x, cache):
    """The mixer's output [K, 1, T, D] by kv head."""
    from memjax.models.through import through_cache

    mixer = layer.mixer
    q, k, v = mixer.project(layer.mixer_norm(x))
    kernel = mixer.out.kernel[...].reshape(k.shape[2], -1, x.shape[-1])
    projection = mixer.out.kernel[...].reshape(q.shape[2], mixer.config.head_dim, -1)
    read, _ = through_cache(cache, q, k, v, None, True, projection)
    return jnp.einsum("btkc,kcd->kbtd", read.reshape(*read.shape[:2], k.shape[2], -1), kernel)


@jax.jit
def _tokens(decoder, wanted, x):
    """KL divergence of each token of each row."""
    logits = lambda row: decoder.logits(decoder.norm(row))  # noqa: E731
    return jax.lax.map(lambda row: kl_divergence(logits(wanted[0]), logits(row)), x)


def measure(model, ids: np.ndarray) -> np.ndarray:
    """KL divergences [layer, keys or values, head, bits, token]."""
    decoder, states = model.decoder, [model.decoder.embed(jnp.asarray(ids)[None])]
    for layer in decoder.layers:
        states.append(next_hidden(layer, states[-1]))
    pairs = [[Pair(stream_codec(b), Dense()) for b in BITS], [Pair(Dense(), stream_codec(b)) for b in BITS]]
    found = []
    for i, layer in enumerate(decoder.layers):
        dense, rows = _mixed(layer, states[i]), []
        for side in pairs:
            policies = [CachePolicy(codec=pair, windows=Windows(4, 0)) for pair in side]
            change = jnp.stack([_coded(layer, states[i], policy) - dense for policy in policies], axis=1)  # [K, bits, 1, T, D]
            rows.append(layer.with_mlp(layer.with_mixed(states[i], dense.sum(axis=0) + change[:, :, 0])))
        x = jnp.stack(rows).reshape(-1, *states[i].shape[1:])
        for later in decoder.layers[i + 1 :]:
            x = next_hidden(later, x)
        heads = layer.mixer.config.kv_heads
        found.append(np.asarray(_tokens(decoder, states[-1], x)).reshape(2, heads, len(BITS), -1))
        print(f"layer {i + 1} of {len(decoder.layers)}", flush=True)
    return np.maximum(np.stack(found), 0.0)


def spend(learned: np.ndarray, judged: np.ndarray, average: float) -> dict[str, float]:
    """Summed divergences, as the judge sees them, of the best choices per layer and per head. [L, 2, K, O] both."""
    found, heads = {"bits": average}, learned.shape[2]
    for name, table, judge, weight in (
        ("by layer", learned.sum(axis=2), judged.sum(axis=2), heads),
        ("by head", learned, judged, 1),
    ):
        streams, judges = table.reshape(-1, len(BITS)), judge.reshape(-1, len(BITS))
        cost = [[weight * b for b in BITS]] * len(streams)
        chosen = cheapest_sum(streams.tolist(), cost, int(average * learned[..., 0].size))
        for which, rows in (("promised", streams), ("held out", judges)):
            found[f"{name}, {which}"] = float(sum(row[option] for row, option in zip(rows, chosen, strict=True)))
    return found


def markdown(result: dict) -> str:
    columns = ("by layer, promised", "by head, promised", "by layer, held out", "by head, held out")
    lines = ["# Bits by head", "", f"{result['model']}, {result['tokens']} tokens each of a novel and of code, static,"]
    lines += [f"{result['device']}, jax {result['versions']['jax']}. KL divergence in nats per token, summed over streams;"]
    lines += ["*promised*: on the tokens that bits were chosen by, *held out*: on the others. `benchmarks/head_bits.py`.", ""]
    lines += [f"| bits on average | {' | '.join(columns)} | gain, held out |", "|--:|" + "--:|" * 5]
    for row in result["rows"]:
        gain = 1 - row["by head, held out"] / row["by layer, held out"]
        lines += [f"| {row['bits']:g} | {' | '.join(f'{row[c]:.4f}' for c in columns)} | {gain:.1%} |"]
    lines += ["", "One number of bits for everything, held out: " + result["uniform"] + ".", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    model = mj.load(arguments.model)
    found = [measure(model, model.tokenizer.encode(text.read())[: arguments.tokens]) for text in (NOVEL, CODE)]
    tokens = np.concatenate(found, axis=-1)
    learned, judged = tokens[..., 0::2].mean(axis=-1), tokens[..., 1::2].mean(axis=-1)
    result = circumstances(model, "float32", arguments.tokens) | {"tokens": arguments.tokens, "bits": list(BITS)}
    result["rows"] = [spend(learned, judged, average) for average in LIMITS]
    result["uniform"] = ", ".join(f"{b} bits {judged[..., i].sum():.4f}" for i, b in enumerate(BITS))
    result["divergence"] = np.round(tokens.mean(axis=-1), 7).tolist()
    save_json(result, RESULTS / "head_bits.json")
    (RESULTS / "head_bits.md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
