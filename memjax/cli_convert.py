"""``memjax convert-mla``: a model with grouped-query attention gets latent attention, is healed, and is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from memjax.data import CODE, NOVEL

_CALIBRATION = 4096  # tokens of each text that statistics are taken from


def convert_mla(
    out: Annotated[Path, typer.Option(help="New folder for the converted model; --model reads it back.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model to convert, as for generate.")] = "smollm2-135m",
    rank: Annotated[int | None, typer.Option(help="Channels of the latent; default: those of all keys (exact).")] = None,
    rope_dim: Annotated[int | None, typer.Option(help="Rotary channels; default: those of all keys (exact).")] = None,
    fold: Annotated[int, typer.Option(help="Take so many neighbouring frequencies as one (FreqFold).")] = 1,
    plain: Annotated[bool, typer.Option(help="TransMLA as published, without this library's weighting.")] = False,
    text_file: Annotated[list[Path] | None, typer.Option(help="Texts to learn from. Default: a novel and code.")] = None,
    held_out: Annotated[int, typer.Option(help="Tokens at the first text's end that are only measured.")] = 512,
    heal_steps: Annotated[int, typer.Option(help="Steps of distillation from the original; 0: none.")] = 0,
    heal_length: Annotated[int, typer.Option(help="Tokens of a row in healing.")] = 256,
    heal_batch: Annotated[int, typer.Option(help="Rows of a step.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Its peak in healing.")] = 5e-5,
    train: Annotated[str, typer.Option(help="What healing changes: attention or all.")] = "attention",
) -> None:
    """Convert grouped-query attention into latent attention (MLA); report bytes and KL divergence; save."""
    from memjax.cli import _bars, _load
    from memjax.convert.heal import Healing
    from memjax.models.checkpoint import save_model

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; save into a new folder")
    if heal_steps < 0 or held_out < 1:
        raise ValueError(f"--heal-steps must be at least 0 and --held-out at least 1, got {heal_steps} and {held_out}")
    healing = Healing(heal_steps, heal_batch, heal_length, learning_rate, trained=train) if heal_steps else None
    texts = _texts(text_file)
    original = _load(model)
    if original.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer to read texts with")
    ids = [original.tokenizer.encode(text) for text in texts]
    if len(ids[0]) <= 2 * held_out:
        raise ValueError(f"the first text has {len(ids[0])} tokens, too few to hold out {held_out} of them")
    ids[0], measured = ids[0][:-held_out], ids[0][-held_out:]
    options = {"rank": rank, "rope_dim": rope_dim, "fold": fold, "plain": plain}
    with _bars() as progress:
        converted, row = _run(progress, original, ids, measured, options, healing)
    save_model(out, converted.decoder, converted.tokenizer)
    console = Console()
    console.print(_table(row))
    console.print(f"Wrote {out}.")


def _texts(files: list[Path] | None) -> list[str]:
    from memjax.cli import _read_text

    return [_read_text(path) for path in files] if files else [text.read() for text in (NOVEL, CODE)]


def _run(progress: Progress, original, ids: list, measured: list, options: dict, healing) -> tuple:
    """The converted model, and the table's row."""
    import numpy as np

    from memjax.convert.heal import divergences, heal
    from memjax.convert.model import bytes_per_token, convert

    task = progress.add_task("reading", total=2 * original.config.layers)
    update = lambda done: progress.update(task, advance=1, description=done)  # noqa: E731
    converted = convert(original, texts=[text[:_CALIBRATION] for text in ids], progress=update, **options)
    mixer = converted.config.blocks[0].mixer
    row = {"rank": mixer.kv_rank, "rope_dim": mixer.rope_dim}
    row |= {"before": bytes_per_token(original), "after": bytes_per_token(converted)}
    row["kl"] = float(np.mean(divergences(converted.decoder, original.decoder, measured)))
    if healing is not None:
        task = progress.add_task("healing", total=healing.steps)
        show = lambda step, loss: progress.update(task, completed=step, description=f"healing, loss {loss:.4f}")  # noqa: E731
        converted = heal(converted, original, ids, healing, progress=show).model
        row["healed"] = float(np.mean(divergences(converted.decoder, original.decoder, measured)))
    return converted, row


def _table(row: dict) -> Table:
    table = Table(title="grouped-query to latent attention; KL divergence to the original, nats per token, held-out text")
    for name in ("rank", "rotary", "bytes/token before", "after", "KL converted", "KL healed"):
        table.add_column(name, justify="right")
    healed = f"{row['healed']:.4f}" if "healed" in row else "-"
    before, after = f"{row['before']:,}", f"{row['after']:,}"
    table.add_row(str(row["rank"]), str(row["rope_dim"]), before, after, f"{row['kl']:.4f}", healed)
    return table
