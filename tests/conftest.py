"""How every test runs: on eight virtual CPU devices and under strict dtype promotion.

JAX_PLATFORMS=cuda,cpu runs the suite on a GPU, JAX_COMPILATION_CACHE_DIR=... keeps compiled programs between
runs; neither is the default, so that a run depends on nothing but the code. TESTS_END=... (seconds since 1970) skips
what has not begun by then. Eight devices share the cores of
the machine: a test that times computation has to do it in a subprocess without XLA_FLAGS.
"""

import gc
import os
import time

VIRTUAL_DEVICES = 8

# Before jax is imported, and as environment variables, so that subprocesses of a test run in the same way.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
FLAG = f"--xla_force_host_platform_device_count={VIRTUAL_DEVICES}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    found = jax.device_count("cpu")
    if found != VIRTUAL_DEVICES:
        raise pytest.UsageError(
            f"the tests need {VIRTUAL_DEVICES} virtual CPU devices, found {found}: "
            "a pytest plugin used jax before tests/conftest.py could set XLA_FLAGS"
        )


def pytest_runtest_setup():
    if time.time() > float(os.environ.get("TESTS_END", "inf")):
        pytest.skip("no time is left")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program holds memory maps, of which Linux gives a process 65,530 and XLA dies at the limit."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def smollm2():
    """The real model that the package index carries."""
    import memjax as mj

    return mj.load("smollm2-135m")


@pytest.fixture(scope="session")
def tiny():
    """A random decoder of four layers, without a tokenizer: rotary, NoPE and sliding-window layers."""
    from flax import nnx

    from memjax.attention.rope import Rope
    from memjax.models.config import llama_config
    from memjax.models.decoder import Decoder
    from memjax.models.load import LanguageModel

    config = llama_config(
        family="llama",
        vocab=61,
        width=32,
        layers=4,
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        mlp_width=48,
        norm_eps=1e-5,
        max_position=256,
        ropes=(Rope(16), Rope(16), None, Rope(16)),
        windows=(None, None, None, 24),
        tied=True,
    )
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    return LanguageModel("tiny", decoder, None, eos_ids=(60,))


@pytest.fixture(scope="session")
def sensitivity_file(tmp_path_factory) -> str:
    """What ``auto`` reads, for two layers."""
    import numpy as np

    from memjax.quantize.sensitivity import OPTIONS, Sensitivity, save_sensitivity

    path = tmp_path_factory.mktemp("table") / "measured.json"
    losses = np.linspace(1.0, 0.1, len(OPTIONS)) * np.ones((2, 1, 1))
    save_sensitivity(path, Sensitivity("0123456789abcdef", 48, OPTIONS, losses, losses))
    return str(path)
