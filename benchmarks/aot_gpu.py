"""Compiles the GPU kernels for real GPU generations on a machine without a GPU, and counts registers and spills.

    pip install 'jax-cuda13-plugin' 'jax-cuda13-pjrt' nvidia-cuda-nvcc nvidia-cuda-cuobjdump    # versions as jax's
    python benchmarks/aot_gpu.py [--gpu sm_90] [--only 'int4']

XLA's CUDA compiler is given a description of the device instead of a device; what comes out is the machine code that a GPU of
that kind would run. Its resource usage is read with cuobjdump. Nothing is run: that a kernel compiles does not prove that its
numbers are right. Writes results/aot_gpu.{json,md}; exits with 1 if a kernel fails to compile or spills registers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TIMEOUT = 900  # seconds for one child
SPILLS_FAIL = "--xla_gpu_fail_ptx_compilation_on_register_spilling=true"  # also where the machine code cannot be read
ELF = b"\x7fELF"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler asks about a device; NVIDIA's data sheets."""

    name: str
    capability: tuple[int, int]
    cores: int
    bandwidth: float  # bytes per second
    clock: float  # GHz
    l2: int
    memory: int
    shared: int  # bytes of shared memory per block that a kernel may ask for


GPUS = {
    "sm_80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2.039e12, 1.41, 40 << 20, 80 << 30, 163 << 10),
    "sm_90": Gpu("NVIDIA H200", (9, 0), 132, 4.8e12, 1.98, 60 << 20, 141 << 30, 227 << 10),
    "sm_100": Gpu("NVIDIA B200", (10, 0), 148, 8.0e12, 1.965, 126 << 20, 180 << 30, 227 << 10),
}


def description(gpu: Gpu) -> str:
    """XLA's target configuration, a text proto."""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared + 1024} shared_memory_per_block_optin: {gpu.shared}
  core_count: {gpu.cores} fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock} device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def missing() -> str | None:
    """What this interpreter's environment lacks; None: nothing."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "the CUDA compiler: pip install jax-cuda13-plugin jax-cuda13-pjrt, of jax's version"
    if cuobjdump() is None:
        return "cuobjdump: pip install nvidia-cuda-cuobjdump"
    return None


def cuobjdump() -> str | None:
    """Path of NVIDIA's tool that reads machine code."""
    found = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/**/bin/cuobjdump"))
    return str(found[0]) if found else shutil.which("cuobjdump")


# ---- in the child ----------------------------------------------------------------------------------------------------


@functools.cache
def _mesh(kind: str):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=description(GPUS[kind]), topology="1x1x1")
    return topologies.make_mesh(topology, (1, 1), ("data", "model"))


def compile_case(kind: str, fields: dict, build: str) -> dict:
    """Compiles one case and reads its kernels' resources."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    module, function = build.split(":")
    mesh = _mesh(kind)
    place = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        program = getattr(importlib.import_module(module), function)(**fields)
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), program.arguments)
        compiled = jax.jit(program.function, donate_argnums=program.donate).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "kernels": resources(compiled.runtime_executable().serialize(), program.kernel),
    }


def resources(executable: bytes, kernel: str) -> list[dict]:
    """Registers per thread, bytes of stack (what is spilled lies there) and shared memory of kernels by their name's start.

    Empty where the image could not be found in the executable, whose format is not documented.
    """
    found = []
    for code in machine_code(executable):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code)
            file.flush()
            command = [cuobjdump(), "--dump-resource-usage", file.name]
            done = subprocess.run(command, capture_output=True, text=True)  # fails on bytes that only look like an image
        for name, usage in re.findall(r"Function (\w+):\s*\n\s*(.*)", done.stdout):
            if name.startswith(kernel):
                numbers = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
                found.append({"name": name, **numbers})
    return found


def machine_code(executable: bytes) -> Iterator[bytes]:
    """ELF images in a serialised executable, which holds them compressed with Snappy at offsets that it does not tell."""
    start = 0
    while start < len(executable):
        data, end = _unsnap(executable, start)
        at = data.find(ELF)
        start = end if at >= 0 else start + 1
        while at >= 0:
            yield data[at:]
            at = data.find(ELF, at + len(ELF))


def _unsnap(source: bytes, at: int) -> tuple[bytes, int]:
    """What a raw Snappy stream beginning at ``at`` holds, nothing if none does, and its end (Snappy's format_description)."""
    length = shift = 0
    while True:
        if at >= len(source):
            return b"", at
        byte = source[at]
        at, length, shift = at + 1, length | (byte & 127) << shift, shift + 7
        if byte < 128:
            break
        if shift > 28:
            return b"", at
    if not 4_000 < length < 16_000_000:
        return b"", at
    out = bytearray()
    try:
        while len(out) < length:
            tag, at = source[at], at + 1
            kind = tag & 3
            if kind == 0:
                size = (tag >> 2) + 1
                if size > 60:
                    extra = size - 60
                    size, at = int.from_bytes(source[at : at + extra], "little") + 1, at + extra
                if at + size > len(source):
                    return b"", at
                out += source[at : at + size]
                at += size
                continue
            if kind == 1:
                size, back, at = ((tag >> 2) & 7) + 4, (tag >> 5) << 8 | source[at], at + 1
            else:
                width = 2 if kind == 2 else 4
                size, back, at = (tag >> 2) + 1, int.from_bytes(source[at : at + width], "little"), at + width
            if not 0 < back <= len(out):
                return b"", at
            for _ in range(size):
                out.append(out[-back])
    except IndexError:
        return b"", at
    return (bytes(out), at) if len(out) == length else (b"", at)


def serve() -> None:
    """Answers requests on standard input, JSON lines of (kind, fields, build), with JSON lines."""
    for line in sys.stdin:
        kind, fields, build = json.loads(line)
        try:
            answer = compile_case(kind, fields, build)
        except Exception as error:
            lines = [text for text in str(error).splitlines() if text.strip()] or [type(error).__name__]
            answer = {"error": lines[0][:400]}
        print("@" + json.dumps(answer), flush=True)


# ---- in the parent ---------------------------------------------------------------------------------------------------


def compile_all(
    kind: str, cases: Sequence[dict], build: str = "kernel_cases:build", python: str = sys.executable
) -> list[dict]:
    """Compiles cases for one kind of GPU in a child; a child that dies leaves an error for the rest."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": SPILLS_FAIL, "TF_CPP_MIN_LOG_LEVEL": "3"}
    requests = "".join(json.dumps([kind, fields, build]) + "\n" for fields in cases)
    command = [python, "-W", "ignore", "-c", "import aot_gpu; aot_gpu.serve()"]
    done = subprocess.run(
        command, input=requests, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=TIMEOUT
    )
    answers = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:400]
    return answers + [{"error": f"the compiler's process died: {reason}"}] * (len(cases) - len(answers))


def problem(row: dict) -> str | None:
    """What is wrong with a row."""
    if "error" in row:
        return row["error"]
    spilled = [each for each in row["kernels"] if each.get("stack", 0) or each.get("local", 0)]
    return f"spills registers: {spilled}" if spilled else None


def report(rows: list[dict]) -> str:
    names = ("memjax", "jax", "jax-cuda13-plugin")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines = [
        "# GPU kernels, compiled without a GPU",
        "",
        f"{versions}; devices: {', '.join(f'{kind} {gpu.name}' for kind, gpu in GPUS.items())}. Nothing was run.",
        "Registers per thread / bytes of stack (spills lie there) / bytes of shared memory per block. Written by",
        "`benchmarks/aot_gpu.py`.",
        "",
        f"| case | {' | '.join(GPUS)} |",
        f"|---|{'---|' * len(GPUS)}",
    ]
    cases = dict.fromkeys(row["case"] for row in rows)
    for case in cases:
        cells = []
        for kind in GPUS:
            row = next((row for row in rows if row["case"] == case and row["gpu"] == kind), None)
            if row is None:
                cells.append("-")
            elif "error" in row:
                cells.append(row["error"][:120].replace("|", "/"))
            elif not row["kernels"]:
                cells.append("compiled, resources not readable")
            else:
                worst = max(row["kernels"], key=lambda each: each.get("reg", 0))
                cells.append(" / ".join(str(worst.get(key, 0)) for key in ("reg", "stack", "shared")))
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def gpu_cases() -> list:
    """The cases of kernel_cases.py, with pages that a GPU likes instead of a TPU's."""
    from kernel_cases import Case, decode_cases, other_cases

    small = [Case(keys="int4", values="int4", page=page) for page in (16, 64)]
    return [case for case in [*decode_cases(), *other_cases(), *small] if case.slots_per_step is None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    lacking = missing()
    if lacking:
        parser.error(f"this needs {lacking}")
    cases, rows = [case for case in gpu_cases() if arguments.only in case.name], []
    for kind in arguments.gpu:
        old = GPUS[kind].capability < (8, 9)
        served = [case for case in cases if not (old and "e4m3" in (case.keys, case.values))]
        for case, answer in zip(served, compile_all(kind, [dataclasses.asdict(case) for case in served]), strict=True):
            rows.append({"gpu": kind, "case": case.name} | answer)
            print(f"{kind} {case.name}: {problem(rows[-1]) or rows[-1]['kernels']}", flush=True)
    if arguments.gpu == list(GPUS) and not arguments.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "aot_gpu.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "aot_gpu.md").write_text(report(rows))
    return int(any(problem(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
