"""Grouped-query attention as latent attention: exactness, what each loss costs, bytes, refusals, saving, healing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memjax as mj
from memjax.convert import mla
from memjax.convert.heal import Healing, divergences, heal
from memjax.convert.model import bytes_per_token, convert, grouped_query, input_moments, windows
from memjax.evaluate.compare import kl_divergence
from memjax.models.config import llama_config
from memjax.models.decoder import Decoder
from memjax.models.load import LanguageModel

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, DIM = 61, 48, 2, 6, 3, 16
WHOLE = KV_HEADS * DIM
ROPE = mj.Rope(DIM, 1e4)


def random_model(seed: int = 0, **changes) -> LanguageModel:
    ropes = changes.pop("ropes", (ROPE,) * LAYERS)
    windows_ = changes.pop("windows", (None,) * LAYERS)
    given = {"family": "llama", "vocab": VOCAB, "width": WIDTH, "layers": LAYERS, "q_heads": HEADS, "kv_heads": KV_HEADS}
    given |= {"head_dim": DIM, "mlp_width": 64, "norm_eps": 1e-5, "max_position": 256, "tied": True}
    config = llama_config(**given | changes, ropes=ropes, windows=windows_)
    return LanguageModel("random", Decoder(config, rngs=nnx.Rngs(seed)), None, (60,))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A random decoder whose queries and keys are large enough for attention to choose."""
    made = random_model()
    for layer in made.decoder.layers:
        for each in (layer.mixer.q, layer.mixer.k):
            each.kernel[...] = 2.0 * each.kernel[...]
    return made


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n) for n in (400, 300)]


def logits(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(model.decoder.logits(model.decoder(jnp.asarray(tokens, jnp.int32))[0]))


def through_a_cache(model: LanguageModel, tokens: np.ndarray, pieces: list[int]) -> np.ndarray:
    cache, found = model.init_cache(mj.policy("dense"), len(tokens), 128, "float32"), []
    read = jax.jit(lambda decoder, piece, cache: decoder(piece, cache))
    for piece in np.split(tokens, np.cumsum(pieces)[:-1], axis=1):
        hidden, cache = read(model.decoder, jnp.asarray(piece, jnp.int32), cache)
        found.append(np.asarray(model.decoder.logits(hidden)))
    return np.concatenate(found, axis=1)


@pytest.fixture(scope="module")
def tokens(texts) -> np.ndarray:
    return np.random.default_rng(5).integers(0, VOCAB, (2, 80))


def test_a_rope_can_have_any_frequencies():
    freqs = np.concatenate([mj.Rope(64, 1e5).inv_freq(1).astype(np.float64)] * 3 + [[0.3, 1e-6]])
    found = mla.frequency_rope(freqs).inv_freq(4096).astype(np.float64)
    assert np.abs(found / freqs - 1).max() < 1e-7


@pytest.mark.parametrize("pieces", [None, [64, 16], [32, 33] + [1] * 15], ids=["uncached", "chunked", "decoded"])
def test_the_exact_form_equals_the_original(model, tokens, pieces):
    exact, expected = convert(model), logits(model, tokens)
    assert exact.config.blocks[0].mixer.kv_rank == exact.config.blocks[0].mixer.rope_dim == WHOLE
    found = logits(exact, tokens) if pieces is None else through_a_cache(exact, tokens, pieces)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("rope", [mj.Rope(DIM, 1e4, interleaved=True), mj.Rope(DIM, 1e4, kind="linear", factor=2.0)])
def test_the_exact_form_knows_other_rotary_embeddings(rope, tokens):
    model = random_model(ropes=(rope,) * LAYERS)
    np.testing.assert_allclose(logits(convert(model), tokens), logits(model, tokens), atol=1e-4)


def scores(q: np.ndarray, k: np.ndarray, rope: mj.Rope, scale: float) -> np.ndarray:
    """[N, T, T] of q [T, N, H] and k [T, N, H], in float64."""
    angles = np.arange(len(q))[:, None] * rope.inv_freq(len(q)).astype(np.float64)
    turn = np.exp(1j * angles)[:, None]
    first, second = rope.pairs
    q, k = ((x[..., first] + 1j * x[..., second]) * turn for x in (q, k))
    return scale * np.einsum("tnc,snc->nts", q, k.conj()).real


@pytest.mark.parametrize("plain", [False, True])
def test_turning_across_heads_leaves_scores_unchanged(model, texts, plain):
    layer, moment = grouped_query(model.decoder.layers[0]), input_moments(model, texts)[0]
    groups = mla.components(layer, moment, ROPE, plain=plain)
    kept = (KV_HEADS,) * (DIM // 2)
    latent = mla.to_latent(layer, moment, groups, kept, WHOLE, plain=plain)
    x = np.random.default_rng(1).standard_normal((70, WIDTH))
    before = scores(
        np.einsum("td,dnh->tnh", x, layer.q),
        np.repeat(np.einsum("td,dkh->tkh", x, layer.k), HEADS // KV_HEADS, axis=1),
        ROPE,
        1.0,
    )
    rotary = np.repeat((x @ latent.kv_a[:, WHOLE:])[:, None], HEADS, axis=1)
    turned = mla.frequency_rope(mla.rotary_freqs(groups, kept))
    after = scores(np.einsum("td,dnh->tnh", x, latent.q)[..., DIM:], rotary, turned, 1.0)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    energy = np.array([group.energy for group in groups])
    assert (np.diff(energy, axis=1) <= 0).all()
    assert (energy[:, 0] > 1.05 * energy.mean(axis=1)).all()


def test_the_original_queries_and_values_stay(model, texts):
    layer, moment = grouped_query(model.decoder.layers[1]), input_moments(model, texts)[1]
    groups = mla.components(layer, moment, ROPE)
    latent = mla.to_latent(layer, moment, groups, (1,) * (DIM // 2), 2 * WHOLE - DIM)
    x = np.random.default_rng(1).standard_normal((9, WIDTH))
    values = np.einsum("tr,nrv->tnv", x @ latent.kv_a[:, : 2 * WHOLE - DIM], latent.up_value)
    expected = np.repeat(np.einsum("td,dkh->tkh", x, layer.v), HEADS // KV_HEADS, axis=1)
    np.testing.assert_allclose(values, expected, atol=1e-9)
    np.testing.assert_array_equal(latent.q[..., :DIM], layer.q)


def mean_kl(model: LanguageModel, original: LanguageModel, ids: np.ndarray) -> float:
    return float(divergences(model.decoder, original.decoder, ids).mean())


@pytest.mark.parametrize("plain", [False, True])
def test_divergence_falls_with_rank(model, texts, tokens, plain):
    ranks = (8, 24, 36, WHOLE)
    found = [mean_kl(convert(model, rank, WHOLE, texts, plain=plain), model, tokens[0]) for rank in ranks]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1e-3
    assert found[-1] < 1e-6


def test_divergence_falls_with_rotary_channels(model, texts, tokens):
    sizes = (8, 24, 40, WHOLE)
    found = [mean_kl(convert(model, 2 * WHOLE - size, size, texts), model, tokens[0]) for size in sizes]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1e-3
    assert found[-1] < 1e-6


def test_weighting_and_choosing_do_better_than_the_plain_method(model, texts, tokens):
    own, published = (convert(model, 32, DIM, texts, plain=plain) for plain in (False, True))
    assert mean_kl(own, model, tokens[0]) < mean_kl(published, model, tokens[0])


def test_folded_frequencies_are_shared(model, texts):
    folded = convert(model, 40, DIM, texts, fold=4, plain=True)
    found = np.unique(folded.config.blocks[0].mixer.rope.inv_freq(1))
    expected = np.exp(np.log(ROPE.inv_freq(1).astype(np.float64)).reshape(-1, 4).mean(axis=1))
    np.testing.assert_allclose(found[::-1], expected, rtol=1e-6)


def test_slow_frequencies_lose_their_rotation_first(model, texts):
    layer, moment = grouped_query(model.decoder.layers[0]), input_moments(model, texts)[0]
    groups = mla.components(layer, moment, ROPE)
    kept = mla.keep_pairs([groups], 8, mla.Distances(reach=8))
    assert sum(kept) == 8
    assert kept[-1] == 0
    assert kept[0] + kept[1] >= 4


@pytest.mark.parametrize(("rank", "rope_dim"), [(WHOLE, WHOLE), (20, 12)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_per_token_are_the_ledgers(model, texts, rank, rope_dim, dtype):
    made = convert(model, rank, rope_dim, texts)
    expected = (rank + rope_dim) * jnp.dtype(dtype).itemsize * LAYERS
    assert bytes_per_token(made, dtype) == expected
    held = [mj.nbytes(made.init_cache(mj.policy("dense"), 1, size, dtype)).total for size in (64, 96)]
    assert held[1] - held[0] == 32 * expected
    assert bytes_per_token(model, dtype) == 2 * WHOLE * jnp.dtype(dtype).itemsize * LAYERS


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 2 * WHOLE - 11, "rope_dim": 12}, "rank must lie between 1 and 84"),
        ({"rank": 0, "rope_dim": 12}, "rank must lie between"),
        ({"rank": 16, "rope_dim": 13}, "rope_dim must be even"),
        ({"rank": 16, "rope_dim": WHOLE + 2}, "rope_dim must be even and between 2 and kv_heads x head_dim = 48"),
        ({"rank": 16, "rope_dim": 12, "fold": 3}, "fold must divide the 8 frequencies"),
        ({"rank": 16, "rope_dim": 12, "texts": ()}, "give texts"),
        ({"rank": 16, "rope_dim": 12, "texts": ([3],)}, "at least 2 token ids"),
    ],
)
def test_impossible_sizes_are_refused(model, texts, options, reason):
    with pytest.raises(ValueError, match=reason):
        convert(model, **{"texts": texts} | options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"windows": (None, 16)}, "sliding window, but layer 1"),
        ({"ropes": (ROPE, None)}, "no rotary embedding, but layer 1"),
        ({"ropes": (ROPE, mj.Rope(DIM, 5e5))}, "layer 1 differs"),
        ({"ropes": (mj.Rope(8),) * 2}, "all 16 channels"),
        ({"qk_norm": True}, "norms on queries and keys"),
        ({"qkv_bias": True}, "biases"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        convert(random_model(**changes))


def test_a_converted_model_is_refused(model):
    with pytest.raises(ValueError, match="layer 0 is latent"):
        convert(convert(model))


def test_a_converted_model_is_saved_and_loaded_by_name(model, texts, tokens, tmp_path):
    made = convert(model, 24, 12, texts)
    mj.save_model(tmp_path / "mla", made.decoder)
    loaded = mj.load(tmp_path / "mla")
    assert loaded.config == made.config
    np.testing.assert_array_equal(logits(loaded, tokens), logits(made, tokens))


def test_kl_divergence_is_the_textbooks():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    found = kl_divergence(jnp.log(jnp.float32(p)) + 3.0, jnp.log(jnp.float32(q)))
    np.testing.assert_allclose(found, 0.25 * np.log(2), rtol=1e-6)


@functools.cache
def zipf_text(length: int, seed: int) -> tuple[int, ...]:
    """Text with structure to learn: a random walk on a fixed table of likely successors."""
    follows = np.random.default_rng(3).integers(0, VOCAB, (VOCAB, 4))
    rng, ids = np.random.default_rng(seed), [0]
    for choice in rng.integers(0, 4, length - 1):
        ids.append(int(follows[ids[-1], choice]))
    return tuple(ids)


@pytest.mark.parametrize("trained", ["attention", "all"])
def test_healing_lowers_divergence_on_unseen_text(model, trained):
    text, unseen = zipf_text(2048, 1), zipf_text(128, 2)
    broken = convert(model, 12, 8, [text[:512]])
    before = [np.asarray(each) for each in jax.tree.leaves(nnx.state(broken.decoder))]
    healing = Healing(steps=40, batch=4, length=32, learning_rate=3e-3, trained=trained)
    seen: list[int] = []
    result = heal(broken, model, [text], healing, unseen, 20, lambda step, _: seen.append(step))
    assert seen == list(range(1, 41))
    assert len(result.losses) == 40
    assert [step for step, _ in result.held_out] == [0, 20, 40]
    first, last = result.held_out[0][1], result.held_out[-1][1]
    assert last < 0.8 * first
    assert last == pytest.approx(mean_kl(result.model, model, unseen), rel=1e-4)
    for old, new in zip(before, jax.tree.leaves(nnx.state(broken.decoder)), strict=True):
        np.testing.assert_array_equal(old, new)
    mlps = [nnx.state(each.decoder.layers[0].mlp) for each in (broken, result.model)]
    same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *mlps))
    assert same == (trained == "attention")


def test_healing_refuses_what_cannot_work(model, texts):
    with pytest.raises(ValueError, match="positive learning rate"):
        Healing(learning_rate=0.0)
    with pytest.raises(ValueError, match="attention, all"):
        Healing(trained="mlp")
    with pytest.raises(ValueError, match="2 rows of 1024 tokens, got 0"):
        heal(model, model, texts, Healing(length=1024))
    other = dataclasses.replace(model, decoder=random_model(vocab=67).decoder)
    with pytest.raises(ValueError, match="vocabularies differ: 61 and 67"):
        heal(model, other, texts)


class Letters:
    """A tokenizer: one token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % VOCAB for letter in text]


def test_the_command_converts_heals_and_saves(model, monkeypatch, capsys, tmp_path):
    from memjax import cli

    text, out = tmp_path / "text.txt", tmp_path / "mla"
    text.write_text("It is a truth universally acknowledged, that a single man must be in want of a wife. " * 12)
    monkeypatch.setattr(cli, "_load", lambda _: dataclasses.replace(model, tokenizer=Letters()))
    save = mj.save_model
    monkeypatch.setattr("memjax.models.checkpoint.save_model", lambda folder, decoder, _: save(folder, decoder))
    options = ["--text-file", text, "--rank", 20, "--rope-dim", 12, "--held-out", 64]
    options += ["--heal-steps", 3, "--heal-batch", 2, "--heal-length", 32]
    monkeypatch.setattr("sys.argv", ["memjax", "convert-mla", "--out", str(out), *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    numbers = [cell.strip() for cell in next(line for line in printed.splitlines() if " 20 " in line).split("│")[1:-1]]
    assert numbers[:4] == ["20", "12", str(4 * WHOLE * LAYERS), str(64 * LAYERS)]
    assert 0 < float(numbers[5]) < 10
    assert mj.load(out).config.blocks[0].mixer.kv_rank == 20


def test_the_command_refuses_a_folder_in_use(monkeypatch, capsys, tmp_path):
    from memjax import cli

    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["memjax", "convert-mla", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "is not empty; save into a new folder" in capsys.readouterr().err


def test_windows_cut_a_text_into_rows():
    assert windows(range(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(range(3), 4).tolist() == [[0, 1, 2]]
