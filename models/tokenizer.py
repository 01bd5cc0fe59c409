"""Tokenizers, from a checkpoint folder's tokenizer.json or from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from memjax.models.gguf_config import gguf_eos_ids
from memjax.models.safetensors import read_json

# How the byte-level BPE tokenizers of the supported models split text before merging (facts of each model's tokenizer.json).
_GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_SPLITS = {
    # What the format means by no pre-tokenizer or "default": these cuts, one after the other.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2_SPLIT,),
    "smollm": (r"\p{N}", _GPT2_SPLIT),
    "qwen2": (_GPT4_SPLIT % "",),
    "smaug-bpe": (_GPT4_SPLIT % "{1,3}",),
    **dict.fromkeys(_LLAMA3, (_GPT4_SPLIT % "{1,3}",)),
}
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # GGUF token types
_SPACE = "\u2581"  # how SentencePiece spells a space
_BROKEN = "\ufffd"  # what decoders put for bytes that are no character
_LONGEST_HELD = 16


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
        """Ids of a text; ``add_bos`` None: as the model wants it. Chat templates bring their own: pass False.

        Raises:
          ValueError: not a string, or one that is no Unicode text (a lone surrogate).
        """
        if not isinstance(text, str):
            raise ValueError(f"a tokenizer encodes a string, got {type(text).__name__}")
        text.encode("utf-8")
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
        """Builds the tokenizer that a GGUF file describes: byte-level BPE or SentencePiece's BPE.

        Raises:
          ValueError: another kind of tokenizer, one that splits text in an unknown way, or incomplete metadata.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if kind not in _GGUF_BACKENDS:
            raise ValueError(
                f"GGUF tokenizer model {kind!r} is not supported, only {' and '.join(map(repr, _GGUF_BACKENDS))}; "
                "put the model's tokenizer.json beside the GGUF file instead"
            )
        backend = _GGUF_BACKENDS[kind](metadata)
        types = metadata.get("tokenizer.ggml.token_type") or []
        marked = list(zip(metadata["tokenizer.ggml.tokens"], types, strict=False))
        for token_type, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
            special = token_type == _CONTROL
            add([AddedToken(token, special=special, normalized=False) for token, t in marked if t == token_type])
        # Files that do not say so leave it to the kind: SentencePiece and Llama 3 begin with BOS.
        wants_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3
        return cls(
            backend,
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", wants_bos)),
            eos_ids=gguf_eos_ids(metadata),
            chat_template=metadata.get("tokenizer.chat_template"),
        )


class TextStream:
    """Decodes ids one by one, holding back bytes that do not yet make a character.

    Decoding restarts at the group of ids before the pending one, so that a tokenizer's rule for leading spaces sees a
    neighbour, and costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._ids = tokenizer, []
        self._start, self._shown = 0, 0  # decoding begins at the id _start; _shown characters of that are out

    def feed(self, token: int) -> str:
        """The text that ``token`` completes; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._start :])
        # SentencePiece's decoder breaks a finished character, too, while the next one is unfinished; a long broken run is
        # damage, of which only the last bytes can still become a character.
        broken = len(text) - len(text.rstrip(_BROKEN))
        held = broken if broken <= _LONGEST_HELD else 3
        return self._show(text, len(text) - held, settled=held == 0)

    def flush(self) -> str:
        """Whatever is held back, broken characters included."""
        text = self._tokenizer.decode(self._ids[self._start :])
        return self._show(text, len(text), settled=True)

    def _show(self, text: str, end: int, settled: bool) -> str:
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        if new and settled:
            # One id is enough of a neighbour; skipped special ids decode to nothing and would be none.
            self._start, self._ids = 0, self._neighbour()
            self._shown = len(self._tokenizer.decode(self._ids))
        return new

    def _neighbour(self) -> list[int]:
        for first in range(len(self._ids) - 1, -1, -1):
            text = self._tokenizer.decode(self._ids[first:])
            if text and not text.startswith(_BROKEN):
                return self._ids[first:]
        return list(self._ids)


def _gguf_tokens(metadata: Mapping[str, Any], *keys: str) -> list[list]:
    lists = [metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", *keys)]
    for key, value in zip(("tokens", *keys), lists, strict=True):
        if not isinstance(value, list) or not value:
            raise ValueError(f"the GGUF file lacks tokenizer.ggml.{key}; put the model's tokenizer.json beside it")
    return lists


def _byte_level(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    split = metadata.get("tokenizer.ggml.pre", "default")
    if split not in _SPLITS:
        raise ValueError(f"GGUF pre-tokenizer {split!r} is not supported; the supported ones are {', '.join(_SPLITS)}")
    tokens, lines = _gguf_tokens(metadata, "merges")
    merges = [tuple(line.split(" ", 1)) for line in lines]
    backend = _backend(tokens, merges, ignore_merges=split in _LLAMA3)
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in _SPLITS[split]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE, whose merges are implied: any two pieces that make a third, best score first.

    Text begins with a space, as SentencePiece adds it, unless the file forbids.
    """
    tokens, scores = _gguf_tokens(metadata, "scores")
    if len(scores) != len(tokens):
        raise ValueError(f"the GGUF file has {len(tokens)} tokens and {len(scores)} scores")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    mergeable = {
        token: (score, i)
        for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=False))
        if kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE)
    }
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is not None and not 0 <= unknown < len(tokens):
        raise ValueError(f"tokenizer.ggml.unknown_token_id is {unknown}, but the GGUF file has {len(tokens)} tokens")
    backend = _backend(
        tokens,
        _implied_merges(mergeable),
        byte_fallback=_BYTE in types,
        fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spelled = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spelled] if prefixed else [spelled])
    plain = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)] if prefixed else plain)
    return backend


def _implied_merges(pieces: Mapping[str, tuple[float, int]]) -> list[tuple[str, str]]:
    found = []
    for piece, (score, i) in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-score, i, pieces[left][1], pieces[right][1], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


_GGUF_BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _backend(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the package raises bare Exception, or TypeError for pairs of another length
        raise ValueError(f"the GGUF file's tokenizer is damaged: {error}") from error


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
