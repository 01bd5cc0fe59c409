"""Tokenizers, from a checkpoint folder's tokenizer.json or from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from memjax.models.safetensors import read_json

# How the byte-level BPE tokenizers of the supported models split text before merging (facts of each model's tokenizer.json).
_GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _GPT4_SPLIT % "{1,3}", "qwen2": _GPT4_SPLIT % "", "smaug-bpe": _GPT4_SPLIT % "{1,3}"}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types


class Tokenizer:
    """Text to ids and back.

    Attributes:
      bos_id: id that begins a text, if the model wants one.
      add_bos: whether ``encode`` puts it there.
      eos_ids: ids that end a text.
      chat_template: Jinja source, if the model has one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        add_bos: bool = False,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ):
        self.backend, self.bos_id, self.add_bos = backend, bos_id, add_bos
        self.eos_ids, self.chat_template = tuple(eos_ids), chat_template

    @property
    def vocab_size(self) -> int:
        """Ids, added tokens included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of a text; ``add_bos`` None: as the model wants it. Chat templates bring their own: pass False."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        wanted = self.add_bos if add_bos is None else add_bos
        return [self.bos_id, *ids] if wanted and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, token_id: int | None) -> str:
        """The token's own text ("" for None)."""
        return "" if token_id is None else self.backend.id_to_token(token_id)

    def stream(self) -> TextStream:
        """An incremental decoder."""
        return TextStream(self)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja.

        Raises:
          FileNotFoundError, ValueError: no tokenizer.json, or it cannot be read.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} cannot be read: {error}") from error
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        bos, eos = (_special_id(backend, config.get(f"{kind}_token")) for kind in ("bos", "eos"))
        starts_with_bos = bos is not None and backend.encode("a").ids[:1] == [bos]
        return cls(
            backend,
            bos_id=bos,
            add_bos=starts_with_bos,
            eos_ids=() if eos is None else (eos,),
            chat_template=_chat_template(folder, config),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Builds the byte-level BPE tokenizer that a GGUF file describes.

        Raises:
          ValueError: another kind of tokenizer, or one that splits text in an unknown way.
        """
        kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
        if kind != "gpt2":
            raise ValueError(
                f"GGUF tokenizer model {kind!r} is not supported, only byte-level BPE ('gpt2'); "
                "put the model's tokenizer.json beside the GGUF file instead"
            )
        tokens = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
        vocab = {token: i for i, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split == "llama-bpe"))
        backend.pre_tokenizer = _pre_tokenizer(split)
        backend.decoder = decoders.ByteLevel()
        if split == "qwen2":
            backend.normalizer = normalizers.NFC()
        types = metadata.get("tokenizer.ggml.token_type", [])
        for token, token_type in zip(tokens, types, strict=False):
            if token_type in (_CONTROL, _USER_DEFINED):
                added = AddedToken(token, special=token_type == _CONTROL, normalized=False)
                (backend.add_special_tokens if token_type == _CONTROL else backend.add_tokens)([added])
        eos = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")} - {None}
        return cls(
            backend,
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
            eos_ids=sorted(eos),
            chat_template=metadata.get("tokenizer.chat_template"),
        )


class TextStream:
    """Decodes ids one by one, holding back bytes that do not yet make a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._ids, self._start, self._shown = tokenizer, [], 0, 0

    def feed(self, token: int) -> str:
        """The text that ``token`` completes; may be empty."""
        self._ids.append(token)
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        # Decoding restarts at the last shown token, so that a tokenizer's rule for leading spaces sees a neighbour.
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """Whatever is held back, broken characters included."""
        text = self._pending()
        self._start = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split in ("default", "gpt-2"):
        return plain
    if split == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if split in _SPLITS:
        cut = pre_tokenizers.Split(Regex(_SPLITS[split]), behavior="isolated")
        return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(["default", "gpt-2", "smollm", *_SPLITS])
    raise ValueError(f"GGUF pre-tokenizer {split!r} is not supported; the supported ones are {known}")


def _special_id(backend: tokenizers.Tokenizer, token: str | Mapping[str, Any] | None) -> int | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return None if text is None else backend.token_to_id(text)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
