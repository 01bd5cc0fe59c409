"""The same step, compiled: bytes per device as the TPU's own compiler counts them, on a machine without a TPU.

Some failures of the compiler abort its process: it runs in a child, ``python -m memjax.plan.compiled``, which reads a request
from its standard input and answers with a line of JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

MISSING = "not compiled: pip install 'jax[tpu]'"
TIMEOUT = 3600.0  # seconds
_FAILURE = re.compile(r"Check failed|INTERNAL|UNIMPLEMENTED|RESOURCE_EXHAUSTED|Mosaic failed|Error:")
COMPILER_ENVIRONMENT = {  # of a process that compiles for a TPU on a machine without one
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Request:
    """A decode step to compile.

    Attributes:
      config: ``ModelConfig.to_json()``.
      policy: its text.
      batch, context: sequences, and tokens that each layer's cache is made for.
      dtype: of weights and of what the cache does not quantize.
      topology: JAX's name of it.
      mesh: devices along ``data`` and ``model``.
    """

    config: dict
    policy: str
    batch: int
    context: int
    dtype: str
    topology: str
    mesh: tuple[int, int]


@dataclass(frozen=True)
class Compiled:
    """What the compiler says, bytes per device.

    Attributes:
      arguments: weights, cache and tokens as they lie in HBM.
      temporaries: what the step needs beside them, at its peak.
      outputs: results that do not take the place of an argument.
      code: the program.
      aliased: arguments that are updated in place.
      host: arguments in host memory.
      kernels: calls of Pallas kernels.
      seconds: the compilation took.
    """

    arguments: int
    temporaries: int
    outputs: int
    code: int
    aliased: int
    host: int
    kernels: int
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of HBM."""
        return self.arguments + self.temporaries + self.outputs + self.code


class CompileError(RuntimeError):
    """The step was not compiled; the message says why.

    Attributes:
      too_large: the compiler refused it for lack of memory.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.too_large = "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message


def compiler_available(python: str = sys.executable) -> bool:
    """Whether libtpu is installed, here or beside another interpreter."""
    if python == sys.executable:
        return importlib.util.find_spec("libtpu") is not None
    return subprocess.run([python, "-c", "import libtpu"], capture_output=True).returncode == 0


def compile_in_child(request: Request, python: str = sys.executable, timeout: float = TIMEOUT) -> Compiled:
    """Compiles in a process of its own.

    Raises:
      CompileError: the compiler refuses, dies, or takes longer than ``timeout`` seconds.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | COMPILER_ENVIRONMENT
    command = [python, "-m", "memjax.plan.compiled"]
    if python == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    asked = json.dumps(dataclasses.asdict(request))
    try:
        done = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise CompileError(f"not compiled within {timeout:g} seconds") from None
    if done.returncode:
        raise CompileError(_reason(done.stderr) or f"the compiler's process ended with {done.returncode}")
    return Compiled(**json.loads(done.stdout.splitlines()[-1]))


def _reason(stderr: str) -> str:
    """The line that says why; libtpu logs errors (E0000 ...) that are none."""
    said = [line for line in stderr.splitlines() if line.strip() and not re.match(r"[EWI]\d{4} ", line)]
    failures = [line for line in said if _FAILURE.search(line)]
    lines = [line for line in failures if "RESOURCE_EXHAUSTED" in line] or failures[-1:] or said[-1:] or [""]
    return re.sub(r"\s+", " ", lines[0])[:400]


def compile_here(request: Request) -> Compiled:
    """Compiles in this process, which must see libtpu."""
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import memjax as mj
    from memjax.models.config import ModelConfig
    from memjax.models.decoder import cache_specs
    from memjax.plan.placement import AXES, abstract_decoder, place_cache, place_weights

    start, config = time.perf_counter(), ModelConfig.from_json(request.config)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=request.topology).devices
    mesh = Mesh(np.array(devices).reshape(request.mesh), AXES)
    decoder = place_weights(abstract_decoder(config, request.dtype), mesh)
    cache = place_cache(mj.policy(request.policy), cache_specs(config, request.batch, request.context, request.dtype), mesh)
    rows = NamedSharding(mesh, PartitionSpec(AXES[0]))
    token = jax.ShapeDtypeStruct((request.batch,), jnp.int32, sharding=rows)
    placed = jax.tree.map(lambda leaf: leaf.sharding, cache)
    with jax.set_mesh(mesh):
        step = jax.jit(mj.decode_step, donate_argnums=1, out_shardings=(rows, placed))
        compiled = step.lower(decoder, cache, token).compile()
    memory = compiled.memory_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        host=memory.host_argument_size_in_bytes,
        kernels=compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        seconds=round(time.perf_counter() - start, 1),
    )


def main() -> None:
    """A child: one request, one answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the compiler prints is no answer
    fields = json.load(sys.stdin)
    found = compile_here(Request(**fields | {"mesh": tuple(fields["mesh"])}))
    print(json.dumps(dataclasses.asdict(found)), file=answers, flush=True)


if __name__ == "__main__":
    main()
