"""The GPU kernels compile for real GPUs without spilling registers; whole decode steps fit TPUs as the ledger says.

Neither a GPU nor a TPU is needed, but their compilers: MEMJAX_AOT_PYTHON names a Python that has them (`make test` makes one
and passes it).
"""

import dataclasses
import os
import sys

import pytest
from process_helpers import python_with
from source_tree import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import aot_decode_step
import aot_gpu
from kernel_cases import Case

INT3 = [Case(keys="int3", values="int3"), Case(model="dim 64", keys="int3", values="int3")]
CASES = {
    "sm_90": [
        Case(keys="int4", values="int4"),
        Case(keys="int2", values="int2", page=64),
        *INT3,
        Case(keys="int2 by 128 slots, gain by slot", values="int2, gain by 128 slots", page=128),
        Case(op="mla_decode", model="deepseek-v3", keys="int8", values=None),
        Case(op="prefill", keys="int4", values="int4", batch=2, tokens=1024),
        Case(op="append", keys="int4", values="int4"),
        Case(keys="int4", values="sparse"),
    ],
    "sm_80": [Case(keys="int8", values="int8"), *INT3],
    "sm_100": [Case(keys="bf16", values="bf16"), *INT3],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", CASES)
def test_gpu_kernels_compile_and_spill_nothing(kind):
    python = python_with("jax_cuda13_plugin")
    rows = aot_gpu.compile_all(kind, [dataclasses.asdict(case) for case in CASES[kind]], python=python)
    assert [aot_gpu.problem(row) for row in rows] == [None] * len(rows)
    assert all(0 < each["reg"] <= 255 for row in rows for each in row["kernels"])
    # Of large programs no machine code is found: they are not compiled at all if they spill.
    assert any(row["kernels"] for row in rows)


SPILLING = """
import kernel_cases
from memjax.pallas_kernels.decode import gpu

def build(**fields):
    gpu.TILE = 512
    return kernel_cases.build(**fields)
"""


@pytest.mark.timeout(600)
def test_what_spills_is_not_compiled(tmp_path, monkeypatch):
    python = python_with("jax_cuda13_plugin")
    (tmp_path / "spilling.py").write_text(SPILLING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (row,) = aot_gpu.compile_all("sm_90", [dataclasses.asdict(Case(keys="int4", values="int4"))], "spilling:build", python)
    assert "spilling" in aot_gpu.problem(row)


def test_a_spill_is_a_problem():
    assert aot_gpu.problem({"kernels": [{"name": "memjax_decode", "reg": 255, "stack": 8, "local": 0}]}).startswith("spills")
    assert aot_gpu.problem({"error": "no such type"}) == "no such type"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tpu", aot_decode_step.TOPOLOGIES)
def test_a_decode_step_needs_what_the_ledger_says(tpu):
    python = python_with("libtpu")
    row = aot_decode_step.in_child(tpu, layers=2, python=python)
    assert aot_decode_step.problems(row) == []


def test_bytes_that_do_not_agree_are_problems():
    row = {"weights": 900, "ledger": 100, "arguments": 1040, "aliased": 50, "largest_array": 70, "decompressed_layer": 64}
    found = aot_decode_step.problems(row | {"kernels": 1, "layers": 2})
    assert [text.split()[0] for text in found] == ["arguments", "only", "an", "1"]
