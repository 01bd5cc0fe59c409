"""Measurements as Markdown: the tables that the README and the results show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memjax.cache.parse import policy as parse
from memjax.evaluate.compare import Row
from memjax.evaluate.generated import UNCOMPRESSED
from memjax.evaluate.report import show
from memjax.quantize import Auto, KeyValueCodec


def markdown(rows: Sequence[Row]) -> str:
    """The main columns as a Markdown table."""
    header = "| policy | cache bytes | bits/value | x smaller | KL divergence | top-1 | perplexity | pass key |"
    lines = [header, "|---|--:|--:|--:|--:|--:|--:|---|"]
    for row in rows:
        total = row["bytes_device"] + row["bytes_host"] + row["bytes_disk"]
        found = {True: "found", False: "lost", None: "-"}[row.get("passkey_found")]
        lines.append(
            f"| `{row['policy']}` | {total:,} | {show(row['bits_per_value'], '.2f')} | {row['compression']:.2f} | "
            f"{row['kld_mean']:.2g} | {row['top1']:.3f} | {row['ppl']:.2f} | {found} |"
        )
    return "\n".join(lines)


def evaluation_markdown(result: Mapping) -> str:
    """All of an evaluation as a Markdown page."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"# Codecs on {result['model']}",
        "",
        f"`memjax eval --suite {result['suite']}`: {result['tokens']} tokens of each text in chunks of {result['chunk']}, "
        f"windows in {result['cache_dtype']}; {result['device']}, {versions}. KL divergence in nats per token to the "
        f"uncompressed float32 cache, with {result['bootstrap']['level']:.0%} intervals of the mean (blocks of "
        f"{result['bootstrap']['block']} tokens). Static: all tokens but the first four are compressed before any query sees "
        "them. Accumulated: compressed while read, as in use, with 4 sinks and the 64 newest tokens exact.",
        "",
        codec_markdown(result),
    ]
    if result["retrieval"]:
        lines += ["", *_retrieval_lines(result["retrieval"])]
    if result["samples"]:
        lines += ["", *_sample_lines(result["samples"])]
    return "\n".join(lines) + "\n"


def _retrieval_lines(rows: Sequence[Row]) -> list[str]:
    depths = [f"depth {depth:g}" for depth in rows[0]["depths"]]
    lines = [
        "## Pass keys",
        "",
        f"Hidden in {rows[0]['tokens']:,} tokens, compressed while they are read, before the question is known.",
        "",
        f"| policy | {' | '.join(depths)} |",
        "|---" * (1 + len(depths)) + "|",
    ]
    for row in rows:
        pairs = zip(row["found"], row["answers"], strict=True)
        answers = ["found" if found else f"{(answer or '').strip()!r}" for found, answer in pairs]
        lines.append(f"| `{row['name']}` | {' | '.join(answers)} |")
    return lines


def _sample_lines(rows: Sequence[Row]) -> list[str]:
    lines = ["## Samples", "", f"{rows[0]['new_tokens']} greedy tokens behind {rows[0]['prompt_tokens']} of each text."]
    for text in dict.fromkeys(row["text"] for row in rows):
        own = [row for row in rows if row["text"] == text]
        for name, sample in [("uncompressed", own[0]["uncompressed"]), *((row["name"], row["generated"]) for row in own)]:
            parted = {row["name"]: row["first_difference"] for row in own}.get(name)
            where = "" if name == "uncompressed" else f", the same up to token {parted}"
            where = ", the same throughout" if name != "uncompressed" and parted is None else where
            fence = "```"
            lines += ["", f"**{text}, `{name}`**{where}:", "", f"{fence}text", sample.strip("\n"), fence]
    return lines


def codec_markdown(result: Mapping, intervals: bool = True) -> str:
    """Codecs of an evaluation as a Markdown table: bits claimed and realised, quality by setting and text, pass keys found."""
    pairs = list(dict.fromkeys((row["setting"], row["text"]) for row in result["rows"]))
    found = {row["name"]: f"{sum(row['found'])} of {len(row['found'])}" for row in result["retrieval"]}
    header = ["codec", "bits by its paper", "realised at head_dim 64", "at 128"]
    header += [f"{setting}, {text}" for setting, text in pairs] + ["pass keys"] * bool(found)
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        codec, measured = parse(name).codec, next(row["bits_per_value"] for row in result["rows"] if row["name"] == name)
        bits = [codec.claimed_bits, *(realised_bits(codec, dim) for dim in (64, 128))]
        bits[1] = measured if isinstance(codec, Auto) else bits[1]  # the model's heads have 64
        cells = [f"`{name}`", *(show(each, ".4g") for each in bits)]
        for pair in pairs:
            (row,) = (row for row in result["rows"] if (row["name"], row["setting"], row["text"]) == (name, *pair))
            span = f" ({row['kld_low']:.2g} to {row['kld_high']:.2g})" if intervals else ""
            cells.append(f"{row['kld_mean']:.2g}{span}")
        lines.append("| " + " | ".join(cells + ([found.get(name, "-")] if found else [])) + " |")
    return "\n".join(lines)


def eviction_summary(result: Mapping) -> str:
    """Methods of an evaluation of evictors as a Markdown table: bytes and KL divergence at each kept part."""
    rows = [row for row in result["rows"] if row["name"] != UNCOMPRESSED]
    fractions = sorted({row["fraction"] for row in rows}, reverse=True)
    header = [f"x smaller | KL divergence, {fraction:g} kept" for fraction in fractions]
    lines = [f"| evictor | {' | '.join(header)} |", "|---" + "|--:|--:" * len(fractions) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["fraction"]: row for row in rows if row["name"] == name}
        shown = [own.get(fraction) for fraction in fractions]
        cells = ["- | -" if row is None else f"{row['compression']:.1f} | {row['kld_mean']:.2g}" for row in shown]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def realised_bits(codec: KeyValueCodec, dim: int) -> float | None:
    """Bits per value in the buffers, keys and values alike; None for a codec that differs from layer to layer."""
    if isinstance(codec, Auto):
        return None

    def mean(one: KeyValueCodec) -> float:
        return sum(stream.bits_per_value(dim) for stream in (one.keys, one.values)) / 2

    if codec.rest is None:
        return mean(codec)
    share = codec.salient / codec.tile
    positions = 32 / (2 * dim)  # of slots that both streams share
    return share * mean(codec) + (1 - share) * mean(codec.rest) + positions

