"""Conformance of every policy: what attention over its cache has to give, however the text is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import (
    BATCH,
    CAPACITY,
    DIM,
    GROUPS,
    HEADS,
    ROPE,
    ROWS,
    SPEC,
    TOKENS,
    dense_oracle,
    oracle,
    qkv,
    quick_jit,
    relative_error,
    row_id,
    run,
    step,
)

import memjax as mj

CUTS = {"whole": [TOKENS], "sevens": [7] * 7, "ones": [1] * TOKENS}
TEXT = qkv(0)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_attention_over_the_cache_is_what_the_policy_says(row, cut):
    out, cache = run(row.policy, SPEC, TEXT, CUTS[cut])
    np.testing.assert_allclose(out, oracle(row, TEXT, CUTS[cut]), atol=2e-5)
    assert cache.length.tolist() == [TOKENS] * BATCH
    if row.evict is None:
        assert relative_error(out, dense_oracle(TEXT)) < row.bound
