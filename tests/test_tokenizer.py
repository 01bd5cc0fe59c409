"""Tokenizers against transformers and SentencePiece, text as it streams, and chat templates that mean harm.

The golden files are made by tests/goldens/make_tokenizer.py.
"""

import json
from pathlib import Path

import pytest
import tokenizers

from memjax.models import chat
from memjax.models.chat import render_chat
from memjax.models.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"
SMOLLM2 = json.loads((GOLDENS / "tokenizer_smollm2.json").read_text())["cases"]
SPM = json.loads((GOLDENS / "tokenizer_spm.json").read_text())
BYTES = tokenizers.pre_tokenizers.ByteLevel.alphabet()


def spm_metadata(**changed):
    lists = {f"tokenizer.ggml.{key}": SPM[key] for key in ("tokens", "scores", "token_type")}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    own = {"tokenizer.ggml.model": "llama"} | lists | {f"tokenizer.ggml.{key}": value for key, value in ids.items()}
    return own | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}


def bpe_metadata(pre, merges=("1 2", "12 3"), **changed):
    tokens = sorted(BYTES) + [merge.replace(" ", "") for merge in merges] + ["<end>", "<think>"]
    types = [1] * (len(tokens) - 2) + [3, 4]
    own = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": list(merges), "token_type": types}
    own |= {"bos_token_id": 0, "eos_token_id": len(tokens) - 2} | changed
    return {f"tokenizer.ggml.{key}": value for key, value in own.items() if value is not None}


@pytest.fixture(scope="module")
def spm():
    return Tokenizer.from_gguf(spm_metadata())


@pytest.mark.parametrize("case", SMOLLM2, ids=lambda case: case["text"][:20].encode("unicode_escape").decode())
def test_smollm2_ids_equal_transformers(smollm2, case):
    assert smollm2.tokenizer.encode(case["text"]) == case.get("digits", case["ids"])
    assert smollm2.tokenizer.decode(case["ids"], skip_special=False) == case["text"]


def test_only_numerals_beyond_ascii_differ_from_a_reader_without_the_digit_rule():
    differing = [case["text"] for case in SMOLLM2 if "digits" in case]
    assert 0 < len(differing) <= 2
    assert all(any(c.isnumeric() and not c.isascii() for c in text) for text in differing)


@pytest.mark.parametrize("case", SPM["cases"], ids=lambda case: case["text"][:20].encode("unicode_escape").decode())
def test_sentencepiece_ids_equal_sentencepiece(spm, case):
    ids = spm.encode(case["text"], add_bos=False)
    assert ids == case["ids"]
    assert spm.decode(ids) == case["text"]


def test_sentencepiece_without_a_space_in_front():
    tokenizer = Tokenizer.from_gguf(spm_metadata(add_space_prefix=False))
    text = "Call me Ishmael."
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.backend.id_to_token(ids[0]).startswith("\u2581")


def test_begin_and_end(smollm2, spm):
    assert (smollm2.tokenizer.add_bos, smollm2.tokenizer.bos_id, smollm2.tokenizer.eos_ids) == (False, 1, (2,))
    assert smollm2.tokenizer.encode("a", add_bos=True)[0] == 1
    assert smollm2.tokenizer.vocab_size == 49152
    assert (spm.add_bos, spm.bos_id, spm.eos_ids) == (True, 1, (2,))
    assert spm.encode("a") == [1, *spm.encode("a", add_bos=False)]
    assert not Tokenizer.from_gguf(spm_metadata(add_bos_token=False)).add_bos
    assert Tokenizer.from_gguf(bpe_metadata("llama-bpe")).add_bos
    assert not Tokenizer.from_gguf(bpe_metadata("qwen2")).add_bos
    assert Tokenizer.from_gguf(bpe_metadata("qwen2", eot_token_id=7, eom_token_id=5)).eos_ids == (5, 7, 258)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "a 123 it's", ["a", "Ġ", "1", "2", "3", "Ġit", "'s"]),
        ("gpt-2", "a 1234 it's", ["a", "Ġ1234", "Ġit", "'s"]),
        ("llama-bpe", "a 12345 IT'S\n\n!", ["a", "Ġ", "123", "45", "ĠIT", "'S", "ĊĊ", "!"]),
        ("smaug-bpe", "x=1234", ["x", "=", "123", "4"]),
        ("qwen2", "a 123 (b)", ["a", "Ġ", "1", "2", "3", "Ġ(", "b", ")"]),
        ("default", "a-b 12345!", ["a", "-", "b", "Ġ", "123", "45", "!"]),
    ],
)
def test_how_text_is_cut_before_merging(pre, text, pieces):
    backend = Tokenizer.from_gguf(bpe_metadata(pre)).backend
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_no_pre_tokenizer_means_default():
    metadata = bpe_metadata("default")
    named, unnamed = (Tokenizer.from_gguf(m) for m in (metadata, bpe_metadata(None)))
    assert unnamed.encode("a-b 12345!") == named.encode("a-b 12345!")


def test_llama_3_prefers_whole_tokens_to_merges():
    """A piece that is a token is that token, even where no order of merges leads to it."""
    merges, tokens = ["b c"], [*sorted(BYTES), "bc", "abc", "<end>", "<think>"]
    changed = {"merges": merges, "tokens": tokens, "token_type": [1] * len(tokens)}
    whole, merged = (Tokenizer.from_gguf(bpe_metadata(pre, **changed)) for pre in ("llama-bpe", "smaug-bpe"))
    assert whole.encode("abc", add_bos=False) == [tokens.index("abc")]
    assert merged.encode("abc", add_bos=False) == [tokens.index("a"), tokens.index("bc")]


def test_qwen2_composes_characters():
    tokenizer = Tokenizer.from_gguf(bpe_metadata("qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_added_tokens():
    tokenizer = Tokenizer.from_gguf(bpe_metadata("qwen2"))
    end, think = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    ids = tokenizer.encode("a<think>b<end>")
    assert (ids[1], ids[3]) == (think, end)
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special=False) == "a<think>b<end>"
    assert (tokenizer.token(end), tokenizer.token(None)) == ("<end>", "")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "model None.*'gpt2' and 'llama'"),
        ({"tokenizer.ggml.model": "t5"}, r"'t5'.*tokenizer\.json"),
        (bpe_metadata("tekken"), "'tekken'.*default.*smollm.*qwen2"),
        (bpe_metadata("qwen2", merges=["a b c d"]), "damaged"),
        (bpe_metadata("qwen2") | {"tokenizer.ggml.merges": ["ab"]}, "damaged"),
        (bpe_metadata("qwen2") | {"tokenizer.ggml.merges": ["zz yy"]}, "damaged"),
        (bpe_metadata("qwen2") | {"tokenizer.ggml.merges": None}, r"lacks tokenizer\.ggml\.merges"),
        (bpe_metadata("qwen2") | {"tokenizer.ggml.tokens": None}, r"lacks tokenizer\.ggml\.tokens"),
        (spm_metadata(scores=None), r"lacks tokenizer\.ggml\.scores"),
        (spm_metadata(scores=[0.0]), "656 tokens and 1 scores"),
        (spm_metadata(unknown_token_id=10**6), "unknown_token_id"),
    ],
)
def test_incomplete_metadata_is_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(metadata)


def test_what_is_no_text_is_refused(spm):
    for text in (None, 3, b"bytes", ["a"]):
        with pytest.raises(ValueError, match="encodes a string"):
            spm.encode(text)
    with pytest.raises(ValueError, match="surrogates"):
        spm.encode("\ud800")


def folder_with(tmp_path, tokenizer, **files):
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.{'jinja' if name == 'chat_template' else 'json'}").write_text(text)
    return tmp_path


def test_a_folder(tmp_path, spm):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "chat_template": "old"}
    folder = folder_with(tmp_path, spm, tokenizer_config=config)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos, tokenizer.chat_template) == (1, (2,), False, "old")
    for case in SPM["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder_with(tmp_path, spm, tokenizer_config=config | {"chat_template": named})
    assert Tokenizer.from_folder(folder).chat_template == "plain"
    folder_with(tmp_path, spm, chat_template="own file")
    assert Tokenizer.from_folder(folder).chat_template == "own file"


def test_a_folder_whose_post_processor_adds_bos(tmp_path):
    tokenizer = Tokenizer.from_gguf(spm_metadata())
    tokenizer.backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, tokenizer, tokenizer_config={"bos_token": "<s>"}))
    assert tokenizer.add_bos
    assert tokenizer.encode("a").count(1) == 1


def test_damaged_folders_are_named(tmp_path, spm):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    folder_with(tmp_path, spm, tokenizer_config="[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold a JSON object"):
        Tokenizer.from_folder(tmp_path)


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    pieces = [*map(stream.feed, ids), stream.flush()]
    return pieces, "".join(pieces)


@pytest.mark.parametrize("case", SPM["cases"], ids=lambda case: case["text"][:20].encode("unicode_escape").decode())
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_streams_never_break_a_character(smollm2, spm, kind, case):
    tokenizer = smollm2.tokenizer if kind == "byte-level" else spm
    ids = tokenizer.encode(case["text"], add_bos=False)
    pieces, text = streamed(tokenizer, ids)
    assert text == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_appears_as_soon_as_it_is_whole(spm, smollm2):
    ids = smollm2.tokenizer.encode("one two three")
    assert streamed(smollm2.tokenizer, ids)[0] == ["one", " two", " three", ""]
    euro = spm.encode("€", add_bos=False)
    assert streamed(spm, euro)[0][-3:] == ["", "€", ""]


def test_a_stream_keeps_the_space_after_a_skipped_token(spm):
    hello, world = spm.encode("at", add_bos=False), spm.encode("the", add_bos=False)
    ids = [1, *hello, 1, 2, *world, 1]
    assert streamed(spm, ids)[1] == spm.decode(ids) == "at the"


def test_a_real_replacement_character_survives(smollm2):
    ids = smollm2.tokenizer.encode("a\ufffdb\ufffd")
    assert streamed(smollm2.tokenizer, ids)[1] == "a\ufffdb\ufffd"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_bytes_that_are_no_text_do_not_hold_a_stream_for_ever(smollm2, spm, kind):
    tokenizer = smollm2.tokenizer if kind == "byte-level" else spm
    bad = tokenizer.backend.token_to_id(tokenizers.pre_tokenizers.ByteLevel(False, False).pre_tokenize_str("ÿ")[0][0][-1])
    bad = spm.backend.token_to_id("<0xFF>") if kind == "sentencepiece" else bad
    stream = tokenizer.stream()
    shown = "".join(stream.feed(bad) for _ in range(64))
    assert len(shown) >= 48
    after = "".join(map(stream.feed, tokenizer.encode("fine", add_bos=False))) + stream.flush()
    assert after.endswith("fine")
    assert len(shown + after) == 64 + len(after.lstrip("\ufffd"))


def test_flushing_gives_what_is_held(spm):
    first = spm.encode("€", add_bos=False)
    stream = spm.stream()
    assert [stream.feed(i) for i in first[:-1]] == [""] * (len(first) - 1)
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


class Templated:
    """As much of a tokenizer as rendering needs."""

    bos_id, eos_ids = 0, (1,)

    def __init__(self, template):
        self.chat_template = template

    def token(self, token_id):
        return "" if token_id is None else ("<s>", "</s>")[token_id]


MESSAGES = [{"role": "user", "content": "Hi ö"}, {"role": "assistant", "content": None, "tool_calls": []}]
FIRST = [{"role": "user", "content": "What is the capital of Japan?"}]


def test_the_embedded_template(smollm2):
    assert render_chat(smollm2.tokenizer, FIRST) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not render_chat(smollm2.tokenizer, FIRST, add_generation_prompt=False).endswith("assistant\n")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hi ö</s>"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ m['role'] }}{% endfor %}", "1/2user2/2assistant"),
        ("{% for m in messages %}\n    {% if loop.first %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}", "user\n"),
        ("{% for m in messages %}{% if m.content %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}", "assistant"),
        ("{{ messages[:1]|tojson }}", '[{"role": "user", "content": "Hi ö"}]'),
        ("{{ {'a': [1]}|tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s ~ m.role[0] %}{% endfor %}{{ ns.s }}", "ua"),
        ("{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}", "3210"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join('-') }}", "Hi ö"),
        ("{{ ', '.join(['a', 'b']) }}{{ 'a b'.split(' ')[-1]|upper }}{{ ' x '|trim|replace('x', 'y') }}", "a, bBy"),
        ("{{ '%s has %05d' % ('a', 42) }}{{ '{:>3}|{}'.format(7, 100000) }}{{ '-' * 3 }}", "a has 00042  7|100000---"),
        ("{{ strftime_now('%Y')|int > 2000 }}{{ extra }}{{ nothing is defined }}", "Trueyes" + "False"),
        ("{% for i in range(2000) %}{% for j in range(20) %}x{% endfor %}{% endfor %}", "x" * 40_000),
        ("{% for i in range(9) if i is odd %}{{ i }}{% else %}none{% endfor %}", "1357"),
    ],
)
def test_what_templates_use(template, text):
    assert render_chat(Templated(template), MESSAGES, extra="yes") == text


def loop(body, count=60):
    return "{% set ns = namespace(s='aa') %}{% for i in range(" + str(count) + ") %}" + body + "{% endfor %}"


HARMFUL = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['json'] }}",
    "code of a function": "{{ strftime_now.__code__.co_consts }}",
    "attribute filter": "{{ (''|attr('__class__')).__mro__ }}",
    "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "changing the messages": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "huge range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "nested filtered loops": "{% for i in range(90000) %}{% for j in range(90000) if false %}{% endfor %}{% endfor %}",
    "long filters": "{% for i in range(90000) %}{{ range(90000)|sum }}{% endfor %}",
    "recursive loops": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "long string": "{{ 'a' * 10**10 }}",
    "long list": "{{ 10**10 * [1] }}",
    "huge number": "{{ 9**9**9 }}",
    "growing number": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "doubling by ~": loop("{% set ns.s = ns.s ~ ns.s %}"),
    "doubling by +": loop("{% set ns.s = ns.s + ns.s %}"),
    "doubling by set": loop("{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}"),
    "long output": "{% set a = 'a' * 9000000 %}{{ a }}{{ a }}",
    "padding method": "{{ 'x'.center(10**9) }}",
    "padding filter": "{{ 'x'|center(10**9) }}",
    "padding %": "{{ '%9999999999d' % 1 }}",
    "padding %*": "{{ '%*d' % (10**9, 1) }}",
    "padding format": "{{ '{:>9999999999}'.format('a') }}",
    "padding format given": "{{ '{:>{w}}'.format('a', w=10**9) }}",
    "padding format filter": "{{ '%9999999999d'|format(1) }}",
    "replace method": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "replace filter": "{% set a = 'a' * 1000000 %}{{ a|replace('a', a) }}",
    "join method": "{% set a = 'a' * 1000000 %}{{ a.join(a) }}",
    "join filter": "{% set a = 'a' * 1000000 %}{{ a|join(a) }}",
    "indent": "{{ ('\n' * 1000000)|indent(9999) }}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_templates_are_stopped(name, monkeypatch):
    monkeypatch.setattr(chat, "_SECONDS", 0.5)
    with pytest.raises(ValueError, match="chat template cannot be rendered"):
        render_chat(Templated(HARMFUL[name]), MESSAGES)
    assert len(MESSAGES) == 2


@pytest.mark.parametrize("name", ["''.__class__", "raise_exception.__globals__", "''|attr('__class__')|attr('__mro__')"])
def test_what_the_sandbox_hides_prints_as_nothing(name):
    assert render_chat(Templated(f"<{{{{ {name} }}}}>"), MESSAGES) == "<>"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, FIRST, "no chat template"),
        ("x" * 200_001, FIRST, "200001 characters"),
        ("{{ raise_exception('no system role') }}", FIRST, "no system role"),
        ("{% for %}", FIRST, "cannot be rendered"),
        ("{{ messages['x'].y }}", FIRST, "cannot be rendered"),
        ("{{ 1 / 0 }}", FIRST, "division by zero"),
        ("x", [], "at least one message"),
        ("x", ["hello"], "'hello'"),
        ("x", [{"content": "a"}], "'role' and 'content'"),
        ("x", [{"role": "user"}], "'role' and 'content'"),
    ],
)
def test_chat_errors_say_what_is_wrong(template, messages, message):
    with pytest.raises(ValueError, match=message):
        render_chat(Templated(template), messages)
