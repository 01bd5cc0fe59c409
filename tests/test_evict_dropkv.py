"""DropKV: scores against the softmax without a token, also where one token gets nearly everything."""

import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import SPEC, quick_jit, relative_error, run
from test_evict import BUDGET, CUTS, TEXT, WINDOWS, result

import memjax as mj
from memjax.evict.dropkv import LeaveOneOut
from memjax.evict.observer import Look


@pytest.mark.parametrize("peak", [0.0, 6.0, 9.0])
def test_scores_are_the_change_of_outputs_without_a_token(peak):
    """``peak``: the logit of one token above the others; at 9 it leaves them a few thousandths in all."""
    draw = np.random.default_rng(2).standard_normal
    logits, v = draw((2, 3, 4, 12)), draw((2, 3, 8, 12))
    logits[..., 5] += peak
    lse = np.log(np.exp(logits).sum(-1))
    probability = np.exp(logits - lse[..., None])
    out = np.einsum("bkms,bkhs->bkmh", probability, v)
    weights = np.array([[1.0, 0.5, 0.0, 2.0]] * 2)
    expected = np.zeros((2, 3, 12))
    for j in range(12):
        others = np.delete(np.arange(12), j)
        rest = np.exp(logits[..., others])
        without = np.einsum("bkms,bkhs->bkmh", rest / rest.sum(-1, keepdims=True), v[..., others])
        p = probability[..., j, None]
        np.testing.assert_allclose(without - out, p / (1 - p) * (out - v[:, :, None, :, j]), atol=1e-9)
        change = np.square((without - out) * (1 - p) / (1 - p + 1e-6)).sum(-1)
        expected[..., j] = np.einsum("bkm,bm->bk", change, weights)
    arrays = [jnp.asarray(x, jnp.float32) for x in (logits, lse, weights, out, v)]
    found = quick_jit(lambda a, b, c, d, v: LeaveOneOut(4).score(Look(a, b, c, d, lambda: v)))(*arrays)
    np.testing.assert_allclose(found, expected, rtol=2e-3 if peak > 6 else 2e-4)


def test_values_come_out_of_their_codes():
    exact, _ = result(f"dropkv({BUDGET},window=4)", "sevens")
    policy = mj.policy(f"dropkv({BUDGET},window=4)+int8(centre=fixed){WINDOWS}")
    out, cache = run(policy.init(SPEC), TEXT, CUTS["sevens"])
    assert relative_error(out, exact) < 0.1
    assert mj.nbytes(cache) == mj.predict_nbytes(policy, SPEC)
