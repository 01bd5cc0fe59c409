"""The command line: ``memjax`` generate, compare, eval, calibrate, sensitivity, gates, demo, plan, train, convert-mla."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from memjax.cli_convert import convert_mla
from memjax.cli_plan import plan
from memjax.cli_train import train
from memjax.data import NOVEL

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Small memory for LLM inference: quantized, evicting and tiered KV caches.",
)
_POLICY_HELP = "How the cache is made small, such as 'dense', 'int4(rotate=true)' or 'streaming(4,1020)+int8+host(256)'."
_MODEL_HELP = "smollm2-135m, a GGUF file, a checkpoint folder, or a hub id owner/name."
Model = Annotated[str, typer.Option("--model", "-m", help=_MODEL_HELP)]
_SUITES_HELP = " Default: the suite's. In the suite evict with an open budget, such as 'snapkv({budget})'."
_PLOTS = (".png", ".pdf", ".svg")
notes = Console(stderr=True)


def main() -> None:
    """Entry point: bad input ends with one line on stderr and exit status 2, without a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError, FloatingPointError, PermissionError, IsADirectoryError) as error:
        notes.print(Text("error: ", style="bold red").append(str(error), style="default"), soft_wrap=True)
        sys.exit(2)


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=notes, transient=True) as progress:
        yield progress


def _load(name: str):
    import memjax as mj

    with _bars() as progress:
        task = progress.add_task(f"loading {name}", total=None)
        return mj.load(name, progress=lambda done, total: progress.update(task, completed=done, total=total))


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no text file at {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    model: Model = "smollm2-135m",
    policy: Annotated[str, typer.Option("--policy", "--kv", help=_POLICY_HELP)] = "dense",
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 128,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    system: Annotated[str, typer.Option(help="System message of the chat.")] = "",
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: all.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this string; may be repeated.")] = None,
    capacity: Annotated[int | None, typer.Option(help="Tokens the cache is made for; default: as many as needed.")] = None,
    cache_dtype: Annotated[str | None, typer.Option(help="Dtype of what is not quantized.")] = None,
    chunk: Annotated[int, typer.Option(help="The prompt is read in chunks of so many tokens.")] = 256,
) -> None:
    """Continue a prompt through a compressed cache; the text appears as it is made."""
    import memjax as mj

    if bool(prompt) == (prompt_file is not None):
        raise ValueError("give either --prompt or --prompt-file, and not an empty prompt")
    text = prompt or _read_text(prompt_file)
    parsed = mj.policy(policy)
    sampler = mj.Sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    lm = _load(model)
    ids = text
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        rendered = mj.render_chat(lm.tokenizer, [*messages, {"role": "user", "content": text}])
        ids = lm.tokenizer.encode(rendered, add_bos=False)
    else:
        sys.stdout.write(text)
    options = {"policy": parsed, "max_new_tokens": max_new_tokens, "sampler": sampler, "seed": seed}
    options |= {"stop": stop or (), "capacity": capacity, "cache_dtype": cache_dtype, "chunk": chunk}
    generation = _stream_out(lm, ids, options)
    ledger = generation.cache
    notes.print(
        f"\n[dim]{generation.prompt_tokens} + {len(generation.tokens)} tokens ({generation.finish_reason}); cache {parsed}: "
        f"{ledger.device:,} bytes on the device, {ledger.host:,} on the host[/]",
        highlight=False,
    )


def _stream_out(lm, prompt, options: dict):
    """Writes the text as it comes; a bar on stderr until the first of it."""
    import memjax as mj

    with _bars() as progress:
        task = progress.add_task("reading the prompt", total=None)

        def show(phase: str, done: int, total: int) -> None:
            if phase == "prefill":
                progress.update(task, completed=done, total=total)

        running = mj.stream(lm, [prompt], on_progress=show, **options)
        pieces = next(running)
    while True:
        sys.stdout.write(pieces[0])
        sys.stdout.flush()
        try:
            pieces = next(running)
        except StopIteration as finished:
            sys.stdout.write("\n")
            return finished.value[0]


@app.command()
def compare(
    text_file: Annotated[Path, typer.Option(help="The text to read.")],
    policy: Annotated[list[str], typer.Option("--policy", "--kv", help=_POLICY_HELP + " May be repeated.")],
    model: Model = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens to read from the text's beginning.")] = 1024,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write the plot here (png, pdf, svg).")] = None,
    chunk: Annotated[int, typer.Option(help="Tokens read at a time.")] = 128,
    cache_dtype: Annotated[str, typer.Option(help="Dtype of what is not quantized.")] = "bfloat16",
    decode_tokens: Annotated[int, typer.Option(help="Tokens generated to time decoding; 0: none.")] = 16,
    protect_layers: Annotated[int, typer.Option(help="Keep the first and last N layers dense.")] = 0,
    passkey: Annotated[bool, typer.Option(help="Hide a pass key in the text and ask for it at the end.")] = False,
    passkey_depth: Annotated[float, typer.Option(help="Where it is hidden: 0 beginning, 1 end.")] = 0.5,
    static: Annotated[bool, typer.Option(help="Compress tokens before they are read (the papers' setting).")] = False,
) -> None:
    """Read a text through several policies; report bytes, quality and speed of each."""
    import memjax as mj
    from memjax.evaluate.compare import Setup
    from memjax.evaluate.passkey import Passkey

    policies = [mj.protect_layers(mj.policy(text), protect_layers) for text in policy]
    setup = Setup(chunk=chunk, cache_dtype=cache_dtype, decode_tokens=decode_tokens, static=static)
    key = Passkey(depth=passkey_depth) if passkey else None
    _check_targets(json_file, plot_file)
    text = _read_text(text_file)
    rows = _compare(_load(model), text, tokens, policies, setup, key)
    _report(rows, json_file, plot_file)


def _compare(lm, text: str, tokens: int, policies: list, setup, key) -> list[dict]:
    from memjax.evaluate.compare import compare as run

    ids = lm.tokenizer.encode(text)
    if not 2 <= tokens <= len(ids):
        raise ValueError(f"--tokens must lie between 2 and the text's {len(ids)} tokens, got {tokens}")
    ids = ids[:tokens] if key is None else key.hide(lm.tokenizer, ids[:tokens])
    steps = -(-tokens // setup.chunk) + len(policies)
    with _bars() as progress:
        task = progress.add_task("compiling", total=steps)
        return run(lm, ids, policies, setup, key, lambda done: progress.update(task, advance=1, description=done))


def _check_targets(json_file: Path | None, plot_file: Path | None) -> None:
    """What could not be written is found before anything is computed."""
    for target in (json_file, plot_file):
        if target is not None and not target.absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder {target.absolute().parent} to write {target.name} into")
        if target is not None and target.is_dir():
            raise IsADirectoryError(f"{target} is a folder, give the name of a file")
    if plot_file is not None and plot_file.suffix not in _PLOTS:
        raise ValueError(f"a plot's file name ends in {', '.join(_PLOTS)}, got {plot_file.name}")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=170)


def _report(rows: list[dict], json_file: Path | None, plot_file: Path | None) -> None:
    from memjax.evaluate.report import plot, save_json, table

    _console().print(table(rows))
    if json_file is not None:
        save_json(rows, json_file)
    if plot_file is not None:
        plot(rows, plot_file)


@app.command("eval")
def evaluate(
    suite: Annotated[str, typer.Option(help="What to run: kv, codecs over a novel and a code file; evict, evictors.")] = "kv",
    model: Model = "smollm2-135m",
    policy: Annotated[list[str] | None, typer.Option("--policy", "--kv", help=_POLICY_HELP + _SUITES_HELP)] = None,
    tokens: Annotated[int | None, typer.Option(help="Read from each text's beginning; default: 1024, evict: 4096.")] = None,
    setting: Annotated[str, typer.Option(help="static (the papers'), accumulated (as in use) or both.")] = "both",
    retrieval: Annotated[bool, typer.Option(help="Ask for pass keys that were hidden at several depths.")] = True,
    retrieval_tokens: Annotated[int, typer.Option(help="Length of the text that hides them.")] = 4000,
    sample: Annotated[int, typer.Option(help="Generate so many tokens after each text; 0: none.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write the Pareto plot here (png, pdf, svg).")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens read at a time; default: 128, evict: 256.")] = None,
    cache_dtype: Annotated[str, typer.Option(help="Dtype of what is not quantized.")] = "bfloat16",
    fraction: Annotated[list[float] | None, typer.Option(help="evict: kept part of the tokens. May be repeated.")] = None,
    depth: Annotated[list[float] | None, typer.Option(help="evict: where a key is hidden, 0 to 1. May be repeated.")] = None,
    continuation: Annotated[int | None, typer.Option(help="evict: tokens behind the text, measured; default: 256.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here, for reading.")] = None,
    resume: Annotated[bool, typer.Option(help="evict: measure only what is not in the file of --json yet.")] = False,
) -> None:
    """Run a suite: quality with intervals beside realised bytes, pass keys, and samples, for each policy."""
    from memjax.evaluate.markdown import evaluation_markdown
    from memjax.evaluate.report import evaluation_tables, pareto_plot, save_json
    from memjax.evaluate.suite import Evaluation
    from memjax.evaluate.suite import evaluate as run

    _check_targets(json_file, plot_file)
    _check_targets(markdown_file, None)
    only = {"--fraction": fraction, "--depth": depth, "--continuation": continuation, "--resume": resume}
    if suite == "evict":
        if setting != "both" or sample:
            raise ValueError("the suite evict has no --setting and no --sample: it reads as in use and asks for keys")
        options = {"methods": policy, "fractions": fraction, "depths": depth if retrieval else (), "tokens": tokens}
        options |= {"chunk": chunk, "continuation": continuation, "cache_dtype": cache_dtype}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if v not in (None, [])}
        _evaluate_eviction(model, given, json_file, plot_file, markdown_file, resume)
        return
    if foreign := [option for option, value in only.items() if value]:
        raise ValueError(f"{foreign[0]} belongs to the suite evict, got --suite {suite}")
    tokens, chunk = 1024 if tokens is None else tokens, 128 if chunk is None else chunk
    if retrieval and retrieval_tokens < 1:
        raise ValueError(f"--retrieval-tokens must be at least 1, got {retrieval_tokens}; --no-retrieval leaves it out")
    wanted = Evaluation(
        suite, tuple(policy or ()), tokens, setting, retrieval_tokens if retrieval else 0, sample, chunk, cache_dtype
    )
    lm = _load(model)
    with _bars() as progress:
        task = progress.add_task("compiling", total=wanted.steps())
        result = run(lm, wanted, lambda done: progress.update(task, advance=1, description=done))
    for table in evaluation_tables(result):
        _console().print(table)
    if json_file is not None:
        save_json(result, json_file)
    if plot_file is not None:
        pareto_plot(result, plot_file)
    if markdown_file is not None:
        markdown_file.write_text(evaluation_markdown(result), encoding="utf-8")


def _evaluate_eviction(
    model: str, options: dict, json_file: Path | None, plot_file: Path | None, markdown_file: Path | None, resume: bool
) -> None:
    from memjax.evaluate.eviction import EvictionEvaluation, evaluate_eviction
    from memjax.evaluate.eviction_report import eviction_markdown, eviction_plot, eviction_table
    from memjax.evaluate.report import save_json

    wanted, known = EvictionEvaluation(**options), None
    if resume:
        if json_file is None or not json_file.exists():
            lacking = "no --json" if json_file is None else f"{json_file}, which does not exist"
            raise ValueError(f"--resume goes on with the results in --json FILE, got {lacking}")
        known = json.loads(json_file.read_text(encoding="utf-8"))
    keep = None if json_file is None else functools.partial(save_json, path=json_file)
    lm = _load(model)
    with _bars() as progress:
        task = progress.add_task("reading", total=wanted.steps())
        result = evaluate_eviction(lm, wanted, lambda done: progress.update(task, advance=1, description=done), known, keep)
    _console().print(eviction_table(result))
    if plot_file is not None:
        eviction_plot(result, plot_file)
    if markdown_file is not None:
        markdown_file.write_text(eviction_markdown(result), encoding="utf-8")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The calibration file to write (safetensors).")],
    text_file: Annotated[list[Path], typer.Option(help="A text to read. May be repeated: several kinds serve better.")],
    model: Model = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens to read from each text's beginning.")] = 2048,
) -> None:
    """Measure a model's keys, queries and values once, for policies such as 'turboquant(4,4,calibration=FILE)'."""
    from memjax.evaluate.calibrate import calibrate as run

    _check_targets(out, None)
    texts = [_read_text(path) for path in text_file]
    lm = _load(model)
    with _bars() as progress:
        task = progress.add_task("reading", total=lm.config.layers)
        ids = [lm.tokenizer.encode(text)[:tokens] for text in texts]
        run(lm, ids, out, progress=lambda done: progress.update(task, advance=1, description=done))
    Console().print(f"Wrote {out} ({sum(map(len, ids))} tokens, model {lm.fingerprint}).")


@app.command()
def sensitivity(
    out: Annotated[Path, typer.Option(help="The sensitivity file to write (JSON).")],
    text_file: Annotated[list[Path], typer.Option(help="A text to read. May be repeated: several kinds serve better.")],
    model: Model = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens to read from each text.")] = 512,
    skip: Annotated[int, typer.Option(help="Tokens of each text to leave out before them.")] = 0,
    by_head: Annotated[bool, typer.Option("--by-head", help="Measure each kv head, for policies with by_head=true.")] = False,
) -> None:
    """Measure how many bits each layer's keys and values need, for policies such as 'auto(bits=3.25,file=FILE)'."""
    from memjax.evaluate.sensitivity import measure_sensitivity
    from memjax.quantize.sensitivity import save_sensitivity

    _check_targets(out, None)
    if skip < 0:
        raise ValueError(f"--skip must be at least 0, got {skip}")
    texts = [_read_text(path) for path in text_file]
    lm = _load(model)
    with _bars() as progress:
        task = progress.add_task("compiling", total=lm.config.layers * len(texts))
        ids = [lm.tokenizer.encode(text)[skip:][:tokens] for text in texts]
        table = measure_sensitivity(
            lm, ids, by_head=by_head, progress=lambda done: progress.update(task, advance=1, description=done)
        )
    save_sensitivity(out, table)
    Console().print(f"Wrote {out} ({table.tokens} tokens, model {table.fingerprint}).")


@app.command()
def gates(
    out: Annotated[Path, typer.Option(help="The gates file to write (JSON).")],
    model: Model = "smollm2-135m",
    text_file: Annotated[Path | None, typer.Option(help="A text to hide numbers in. Default: an excerpt of a novel.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read of it.")] = 1400,
    sinks: Annotated[int, typer.Option(help="First tokens that a streaming head keeps.")] = 64,
    window: Annotated[int, typer.Option(help="Newest tokens that a streaming head keeps.")] = 256,
) -> None:
    """Estimate which heads retrieve from far away, for policies such as 'duo(share=0.5,file=FILE)'."""
    from memjax.evaluate.gates import hide_and_recite, measure_gates
    from memjax.evict.gates import save_gates

    _check_targets(out, None)
    text = NOVEL.read() if text_file is None else _read_text(text_file)
    lm = _load(model)
    ids, recited = hide_and_recite(lm.tokenizer, lm.tokenizer.encode(text)[:tokens], window)
    with _bars() as progress:
        task = progress.add_task("reading", total=lm.config.layers)
        update = lambda done: progress.update(task, advance=1, description=done)  # noqa: E731
        found = measure_gates(lm, ids, recited, sinks, window, update)
    save_gates(out, found)
    Console().print(f"Wrote {out} ({len(ids)} tokens, model {found.fingerprint}).")


_PLAIN = "centre=none,balance=off"  # the formats themselves: the front end takes longer to compile than the demo should
DEMO_POLICIES = ("dense", f"int8({_PLAIN})", f"int4({_PLAIN})", f"int4(rotate=true,{_PLAIN})")
DEMO_POLICIES += ("streaming(4,508)", f"streaming(4,508)+int4(rotate=true,{_PLAIN})")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table and the plot.")] = Path("demo_out"),
    tokens: Annotated[int, typer.Option(help="Tokens of the novel to read.")] = 1536,
) -> None:
    """A real model reads a novel with a pass key hidden in it, through six caches, and answers from each."""
    import memjax as mj
    from memjax.evaluate.compare import Setup
    from memjax.evaluate.passkey import Passkey

    out.mkdir(parents=True, exist_ok=True)
    text, lm, key = NOVEL.read(), _load("smollm2-135m"), Passkey(depth=0.5)
    policies = [mj.policy(policy) for policy in DEMO_POLICIES]
    rows = _compare(lm, text, tokens, policies, Setup(), key)
    _report(rows, out / "compare.json", out / "compare.png")
    chosen = "int4(rotate=true)"
    ids = key.hide(lm.tokenizer, lm.tokenizer.encode(text)[:tokens]) + key.question_tokens(lm.tokenizer)
    answer = mj.generate(lm, ids, policy=chosen, max_new_tokens=12, cache_dtype="bfloat16")[0]
    console = Console()
    console.print(f"\nAsked for the pass key ({key.key}) at the end of the text, the model answers from the {chosen} cache:")
    console.print(f"  [bold]The secret pass key is{answer.text}[/]", highlight=False)
    console.print(f"Wrote {out / 'compare.json'} and {out / 'compare.png'}.")


app.command()(train)
app.command()(convert_mla)
app.command()(plan)

if __name__ == "__main__":
    main()
