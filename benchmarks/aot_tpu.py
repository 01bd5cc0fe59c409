"""Compiles programs for real TPU generations on a machine without a TPU, in child processes.

    pip install 'jax[tpu]'                  # on Linux x86-64; no TPU is needed
    python benchmarks/aot_tpu.py            # every case of kernel_cases.py for every generation; exits with 1 if one fails
    python benchmarks/aot_tpu.py --tpu v6e --only 'int4'

The compiler is libtpu's own, with all its rules for tiles, types and on-chip memory, but nothing is run: that a program
compiles does not prove that its numbers are right. Some failures abort the process, hence the children: each takes a batch
of requests and answers with JSON lines; one that dies or hangs costs the request it was on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
TIMEOUT = 240  # seconds for one compilation
BATCH = 40  # requests per child
ROOM = 5  # copies of the outputs that a program may hold, queries and their side columns among them
LARGEST_COPY = 0.1  # of the cache, for scales that change their layout
NO_COMPILER = 3  # exit status of a child that has none
FAILURE = re.compile(r"Check failed|INTERNAL|UNIMPLEMENTED|RESOURCE_EXHAUSTED|Mosaic failed|Error:")


@dataclass(frozen=True)
class Request:
    """A program to compile for a generation: ``build``, as "module:function", is called with ``fields``.

    What it returns has ``function``, ``arguments``, ``donate``, ``kernel`` and ``cache``, as ``kernel_cases.Program`` does.
    ``schedule`` asks for the kernel's bundles too.
    """

    tpu: str
    fields: dict
    build: str = "kernel_cases:build"
    schedule: bool = False


class NoCompilerError(RuntimeError):
    """The environment has no libtpu, or one that does not belong to its jax."""


def compile_all(requests: Sequence[Request], python: str = sys.executable, timeout: float = TIMEOUT) -> Iterator[dict]:
    """One dictionary per request, in order.

    It has ``arguments``, ``temporaries``, ``outputs``, ``aliased`` (bytes on the device), ``stored`` (of them in the cache,
    in logical sizes), ``copied`` (of the cache), ``in_place``, ``seconds``, and with ``schedule`` the kernel's ``grid`` and
    the counts of ``tpu_schedule.read``; or ``refused``, the sentence of a ``ValueError`` that names the reason; or ``error``.

    Raises:
      NoCompilerError: ``python`` has no libtpu that fits its jax; the message says what to install.
    """
    waiting = list(requests)
    while waiting:
        batch = [each for each in waiting[:BATCH] if each.schedule == waiting[0].schedule]
        answered = 0
        with tempfile.TemporaryDirectory() as folder:
            for row in _child(batch, python, timeout, Path(folder)):
                answered += 1
                yield row
        waiting = waiting[answered:]


def _child(batch: list[Request], python: str, timeout: float, folder: Path) -> Iterator[dict]:
    """Answers of one child: to the whole batch, or up to a request that kills it."""
    with open(folder / "stderr", "w+", encoding="utf-8", errors="replace") as stderr:
        command = [python, "-c", "import aot_tpu; aot_tpu.serve()"]
        environment = _environment(folder if batch[0].schedule else None)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
        process = subprocess.Popen(command, env=environment, text=True, **pipes)
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True)
        reader.start()
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write("".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in batch))
        try:
            for _ in batch:
                line = lines.get(timeout=timeout)
                if not line:
                    raise EOFError
                yield json.loads(line)
        except queue.Empty:
            yield {"error": f"not compiled within {timeout:g} seconds"}
        except EOFError:
            status = process.wait()
            stderr.seek(0)
            said = stderr.read().splitlines()
            if status == NO_COMPILER:
                raise NoCompilerError(said[-1]) from None
            why = [line for line in said if FAILURE.search(line)] or said[-1:]
            yield {"error": f"the compiler's process ended with {status}: {' '.join(why[:1])[:400]}"}
        finally:
            process.kill()
            process.wait()
            reader.join()
            process.stdout.close()


def _forward(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _environment(folder: Path | None) -> dict[str, str]:
    from tpu_schedule import LLO_FLAGS

    from memjax.plan.compiled import COMPILER_ENVIRONMENT

    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    added = {"PYTHONPATH": path} | COMPILER_ENVIRONMENT
    if folder is not None:
        added |= {"LIBTPU_INIT_ARGS": LLO_FLAGS.format(folder=folder), "AOT_TPU_SCHEDULES": str(folder)}
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | added


def serve() -> None:
    """A child: requests on the standard input, answers on the standard output, a line each."""
    lack = missing()
    if lack:
        print(lack, file=sys.stderr)
        sys.exit(NO_COMPILER)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the compiler prints is not an answer
    folder = os.environ.get("AOT_TPU_SCHEDULES")
    for line in sys.stdin:
        request = Request(**json.loads(line))
        print(json.dumps(answer(request, None if folder is None else Path(folder))), file=answers, flush=True)


def missing() -> str | None:
    """Which compiler this environment lacks; None if it has the one that its jax asks for."""
    jax = importlib.metadata.version("jax")
    asked = next(each for each in importlib.metadata.requires("jax") if each.startswith("libtpu"))
    wanted = re.sub(r"\s*;.*", "", asked)
    if importlib.util.find_spec("libtpu") is None:
        return f"{sys.executable} has no TPU compiler: pip install '{wanted}' (the one for jax {jax})"
    found = importlib.metadata.version("libtpu")
    if wanted.startswith("libtpu==") and not re.match(wanted.removeprefix("libtpu==").replace("*", ""), found):
        return f"libtpu {found} is not the compiler of jax {jax}: pip install '{wanted}'"
    return None


def versions(python: str = sys.executable) -> dict[str, str]:
    """Versions of what compiles in an environment."""
    names = ("jax", "jaxlib", "libtpu")
    script = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout)


def answer(request: Request, folder: Path | None) -> dict:
    """Compiles one program in this process."""
    start = time.perf_counter()
    try:
        row = _compile(request, folder)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        refused = isinstance(error, ValueError) and "cannot serve this case" in message
        return {"refused" if refused else "error": re.sub(r"\s+", " ", message)[:600]}
    finally:
        for path in () if folder is None else folder.glob("*.txt"):
            path.unlink()
    return row | {"seconds": round(time.perf_counter() - start, 2)}


@functools.cache
def _mesh(generation: str):
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=GENERATIONS[generation])
    return jax.sharding.Mesh(np.array(topology.devices[:1]).reshape(1, 1), ("data", "model"))


def _compile(request: Request, folder: Path | None) -> dict:
    import jax
    from tpu_schedule import read

    module, _, name = request.build.partition(":")
    program = getattr(importlib.import_module(module), name)(**request.fields)
    mesh = _mesh(request.tpu)
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), program.arguments)
    with jax.set_mesh(mesh):
        traced = jax.jit(program.function, donate_argnums=program.donate).trace(*placed)
        compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    row = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }
    cache = jax.tree.leaves(program.cache)
    row["in_place"] = bool(program.donate)
    row |= {"stored": sum(map(nbytes, cache)), "copied": copied(compiled.as_text(), {leaf.shape for leaf in cache})}
    row |= {name: getattr(program, name) for name in ("vectors", "vectors_per_step", "read") if hasattr(program, name)}
    if request.schedule:
        counted = read(folder, program.kernel, request.tpu, getattr(program, "prologues", 0))
        row |= {"grid": grid(traced.jaxpr.jaxpr, program.kernel), **counted}
    return row


def nbytes(leaf) -> int:
    """Bytes of an abstract array; types of four and two bits are packed on the device."""
    bits = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2}.get(leaf.dtype.name, 8 * leaf.dtype.itemsize)
    return math.prod(leaf.shape) * bits // 8


def copied(text: str, shapes: set[tuple[int, ...]]) -> int:
    """Bytes of arrays of these shapes that a program copies to another place or layout in the device's main memory.

    Small arrays that XLA holds in on-chip memory while a kernel reads them (``S(1)``, on v4 ``S(3)``) do not count.
    """
    total = 0
    for kind, dims, layout in re.findall(
        r"= \(?([a-z]+[0-9]+)[a-z0-9]*\[([0-9,]*)\](\S*)[^=]* copy(?:-start)?\(", text
    ):
        shape = tuple(map(int, filter(None, dims.split(","))))
        if shape in shapes and not re.search(r"S\([13]\)", layout):
            total += math.prod(shape) * int(re.sub(r"\D", "", kind)) // 8
    return total


def grid(jaxpr, kernel: str) -> list[int] | None:
    """The grid of the first kernel in a program whose name begins with ``kernel``."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            named = str(equation.params.get("name_and_src_info", equation.params.get("name")))
            if named.startswith(kernel):
                return [int(size) for size in equation.params["grid_mapping"].grid]
            continue
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)  # closed or not
            found = grid(inner, kernel) if hasattr(inner, "eqns") else None
            if found is not None:
                return found
    return None


def main() -> int:
    from kernel_cases import as_request, decode_cases, other_cases, refused_cases, served

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", nargs="+", choices=GENERATIONS, default=list(GENERATIONS))
    parser.add_argument("--only", default="", help="a part of the names of cases")
    arguments = parser.parse_args()
    todo: list[tuple[str, object, str | None]] = []
    for tpu in arguments.tpu:
        todo += [(tpu, case, None) for case in [*decode_cases(), *other_cases()] if served(tpu, case)]
        todo += [(tpu, case, reason) for case, reason in refused_cases(tpu)]
    todo = [each for each in todo if arguments.only in each[1].name]
    failed = 0
    rows = compile_all([Request(tpu, as_request(case)) for tpu, case, _ in todo])
    for (tpu, case, reason), row in zip(todo, rows, strict=True):
        wrong = problem(row, reason)
        failed += wrong is not None
        print(f"{'FAILS' if wrong else 'fine '} {tpu:4} {case.name}: {wrong or summary(row)}", flush=True)
    print(f"{len(todo)} cases, {failed} fail")
    return int(failed > 0)


def problem(row: dict, reason: str | None = None) -> str | None:
    """What is wrong with the answer to a case that should compile (``reason`` None) or be refused for a reason."""
    if reason is not None:
        return None if reason in row.get("refused", "") else f"not refused because of {reason!r}: {row}"
    if "temporaries" not in row:
        return row.get("refused") or row["error"]
    # Queries and outputs may change their layout, the cache may not.
    if row["temporaries"] >= row["stored"] + ROOM * row["outputs"] * (not row["in_place"]):
        return f"temporaries of {row['temporaries']:,} bytes beside a cache of {row['stored']:,}"
    if row["copied"] > LARGEST_COPY * row["stored"]:
        return f"copies {row['copied']:,} bytes of a cache of {row['stored']:,}"
    return "the cache is not updated in place" if row["in_place"] and row["aliased"] < row["stored"] else None


def summary(row: dict) -> str:
    if "refused" in row:
        return f"refused: {row['refused']}"
    return f"{row['temporaries']:,} bytes of temporaries, {row['copied']:,} copied, {row['seconds']} s"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        sys.exit(main())
    except NoCompilerError as error:
        sys.exit(str(error))
