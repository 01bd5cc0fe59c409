"""The string form of policies: what is printed is read back, and what is wrong is answered with what is right."""

import dataclasses
import re

import pytest
from cache_helpers import ROWS, SPEC, row_id
from hypothesis import given
from hypothesis import strategies as st

import memjax as mj
from memjax.cache.parse import PARTS, signatures
from memjax.cache.policy import CachePolicy, LayerwisePolicy, Windows
from memjax.evict import Duo, Streaming
from memjax.offload import HostTier
from memjax.quantize import NF4, NVFP4, Auto, Dense, Fp8, FrontEnd, Gear, Int2, Int4, Int8, Kivi, KVarN, TurboQuant
from memjax.quantize.front import BALANCES, CENTRES
from memjax.quantize.turboquant import GRIDS, ROTATIONS, SCALES

count = st.integers(0, 5000)
bits = st.sampled_from([2, 2.5, 3, 3.5, 4])
gear_bases = st.sampled_from([Int4(True), Kivi(2, 32), TurboQuant(3, 2)])
codecs = st.one_of(
    st.just(Dense()),
    st.builds(Int8, st.booleans()),
    st.builds(Int4, st.booleans()),
    st.builds(Int2, st.booleans()),
    st.builds(Fp8, st.booleans(), st.sampled_from(["e4m3", "e5m2"])),
    st.sampled_from([NF4(), NVFP4(), Kivi(4, 64), KVarN(2, 2)]),
    st.builds(Auto, st.floats(0.5, 16), file=st.sampled_from(["", "my/table.json"])),
    st.builds(Auto, bytes=st.integers(1, 2**40)),
    st.builds(Gear, gear_bases, st.integers(1, 64), st.sampled_from([0.0, 0.02, 0.25])),
    st.builds(Gear, gear_bases, st.just(0), st.just(0.02)),
    st.builds(TurboQuant, bits, bits, st.sampled_from(SCALES), st.sampled_from(GRIDS), st.sampled_from(ROTATIONS)),
)
evictors = st.one_of(
    st.builds(Streaming, count, st.integers(1, 5000), st.sampled_from(["cache", "text"])),
    st.builds(Duo, st.floats(0, 1), count, st.integers(1, 5000), st.sampled_from(["", "my/gates.json"]), st.integers(1, 9)),
    st.builds(Duo, sinks=count, heads=st.sampled_from(["101", "0", "11"])),
)
balances = st.sampled_from(BALANCES)
fronts = st.one_of(
    st.builds(FrontEnd, st.sampled_from(CENTRES), balances),
    st.builds(FrontEnd, st.sampled_from(["auto", "rope"]), balances, pairs=st.integers(-1, 99)),
    st.just(FrontEnd(calibration="my/file")),
)


def with_front(policy: CachePolicy, front: FrontEnd | None) -> CachePolicy:
    unusual = policy.codec.lossy and front not in (None, policy.codec.front)
    return dataclasses.replace(policy, front=front) if unusual else policy


plain_policies = st.builds(
    CachePolicy,
    codec=codecs,
    evictor=st.none() | evictors,
    tier=st.none() | st.builds(HostTier, st.integers(1, 5000), st.integers(1, 5000)),
    windows=st.none() | st.builds(Windows, count, count),
)
policies = st.builds(with_front, plain_policies, st.none() | fronts)


@given(policy=policies, seed=st.randoms())
def test_what_is_printed_is_read_back(policy, seed):
    """In any order of the parts and with spaces anywhere."""
    text = str(policy)
    assert mj.policy(text) == policy
    parts = text.split("+")
    seed.shuffle(parts)
    spaced = " + ".join(parts).replace("(", " ( ").replace(",", " , ").replace("=", " = ")
    assert mj.policy(spaced) == policy
    assert str(mj.policy(spaced)) == text
    assert hash(mj.policy(spaced)) == hash(policy)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_the_tables_policies_print_as_they_are_written(row):
    policy = row.policy
    assert mj.policy(str(policy)) == policy
    assert policy.codec == row.codec


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("int4(true)", "int4(rotate=true)"),
        ("int4(TRUE)", "int4(rotate=true)"),
        ("int4()", "int4"),
        ("dense+int4", "int4"),
        ("fp8(e5m2,true)", "fp8(rotate=true,format=e5m2)"),
        ("streaming", "streaming(4,1020)"),
        ("streaming(window=8)", "streaming(4,8)"),
        ("streaming(8,window=16,positions=text)", "streaming(8,16,positions=text)"),
        ("host(page=4)", "host(256,4)"),
        ("int8+protect", "int8+protect(4,64)"),
        ("int4(balance=auto,centre=auto)", "int4"),
        ("int4(centre=none,balance=off)", "int4(centre=none,balance=off)"),
        ("kivi(4,centre=none,balance=off)", "kivi(4,32)"),
        ("int4(pairs=16,rotate=true)", "int4(rotate=true,pairs=16)"),
        ("  streaming(4,16)\n+int8 ", "streaming(4,16)+int8"),
    ],
)
def test_ways_of_writing_the_same(text, same):
    assert str(mj.policy(text)) == same


def test_the_functions_build_what_the_strings_say():
    built = mj.chain(mj.streaming(4, 1020), mj.int4(rotate=True), mj.host(256), mj.protect(8, 32))
    assert built == mj.policy("streaming(4,1020)+int4(rotate=true)+host(256)+protect(8,32)")
    assert mj.chain(mj.dense()) == mj.dense() == mj.policy("dense")


FRONT = "centre=auto, balance=auto, calibration=, pairs=-1"
KNOWN = f"the known ones are dense, int8(rotate=false, {FRONT}), int4(rotate=false, {FRONT}), int2("
WRONG = {
    "": "a policy is a text such as 'streaming(4,1020)+int4', got ''",
    "   ": "a policy is a text",
    "int5": f"unknown policy 'int5' in 'int5'; {KNOWN}",
    "INT4": "unknown policy 'INT4'",
    "int4+snapcache(1024)": "unknown policy 'snapcache'",
    "int4(": "cannot read 'int4('",
    "int4++int8": "cannot read '' in policy 'int4++int8'",
    "gear(int4+protect,2)": "gear corrects a codec such as int4 and nothing else",
    "gear(int4,two)": "gear needs rank to be a number (int), got 'two'",
    "gear(int4(rotate=true,4)": "cannot read 'gear(int4(rotate=true,4)'",
    "int4,int8": "cannot read 'int4,int8'",
    "int4(bits=3)": "int4 does not take 'bits=3'; it is int4(rotate=false, centre=auto",
    "dense(3)": "dense does not take '3'; it is dense without arguments",
    "int4(true,false)": "centre must be one of auto, none, fixed, rope, got 'false'",
    "int4(balance=yes)": "balance must be one of auto, off, channels, got 'yes'",
    "turboquant(4,4,centre=none,calibration=x)": "a calibration file decides centring and balance",
    "turboquant(5,4)": "TurboQuant codes have 2, 3 or 4 bits, got 5",
    "turboquant(4,4,scale=best)": "scale",
    "auto(0,3MiB,bits=3)": "auto does not take 'bits=3'",
    "auto(3.25,64MiB)": "auto needs either bits or bytes, a positive number, got bits=3.25, bytes=67108864",
    "auto(bytes=many)": "bytes must be a number such as 67108864 or 64MiB, with kB, MB, GB, KiB, MiB or GiB, got 'many'",
    "kivi(5)": "KIVI codes have 2, 3, 4, 8 bits, got 5",
    "kvarn(4,2,tile=1)": "tile",
    "progressive(refine=1.5)": "progressive needs refine between 0 and 1, got 1.5",
    "progressive(share=-0.1)": "progressive needs share between 0 and 1, got -0.1",
    "progressive(margin=nan)": "progressive needs margin between 0 and inf, got nan",
    "progressive(page=4)": "progressive needs pages of at least 8 slots, got 4; 128 fill a TPU's row of lanes",
    "int4(rotate=true,rotate=true)": "int4 does not take 'rotate=true'",
    "streaming(4,16,sinks=3)": "streaming does not take 'sinks=3'; it is streaming(sinks=4, window=1020, positions=cache)",
    "streaming(,16)": "streaming needs sinks to be a number (int), got ''",
    "streaming(4,sixteen)": "streaming needs window to be a number (int), got 'sixteen'",
    "streaming(4,16.5)": "streaming needs window to be a number (int), got '16.5'",
    "int4(rotate=1)": "int4 needs rotate to be true or false, got '1'",
    "streaming(-1,16)": "streaming needs sinks to be an integer of at least 0, got -1",
    "streaming(4,0)": "streaming needs window to be an integer of at least 1, got 0",
    "streaming(4,-16)": "streaming needs window to be an integer of at least 1, got -16",
    "streaming(4,16,positions=paper)": "streaming positions 'paper' is not one of cache, text",
    "fp8(e3m4)": "fp8 format 'e3m4' is not one of e4m3, e5m2",
    "host(0)": "host needs resident to be an integer of at least 1, got 0",
    "host(8,-4)": "host needs page to be an integer of at least 1, got -4",
    "protect(-1,8)": "protect needs sinks to be an integer of at least 0, got -1",
    "protect(1,-8)": "protect needs recent to be an integer of at least 0, got -8",
    "int4+int8": "cannot chain int4 and int8: both decide quantization; keep one of them",
    "streaming(4,16)+int8+streaming(4,8)": "both decide eviction",
    "host(8)+host(9)": "both decide placement",
    "protect(4,8)+int4+protect(4,8)": "both decide protection",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_explained(text):
    with pytest.raises(ValueError, match=re.escape(WRONG[text])):
        mj.policy(text)


@pytest.mark.parametrize("bad", [4.5, 4.0, "4", True, None])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda n: mj.streaming(n, 16), "streaming needs sinks"),
        (lambda n: mj.streaming(4, n), "streaming needs window"),
        (lambda n: mj.host(n), "host needs resident"),
        (lambda n: mj.host(8, n), "host needs page"),
        (lambda n: mj.protect(n, 8), "protect needs sinks"),
        (lambda n: mj.protect(4, n), "protect needs recent"),
        (lambda n: mj.protect_layers(mj.int4(), n), "protect_layers needs count"),
    ],
)
def test_numbers_of_tokens_are_integers(build, name, bad):
    with pytest.raises(ValueError, match=rf"{name} to be an integer of at least \d, got {re.escape(repr(bad))}"):
        build(bad)


@pytest.mark.parametrize("thing", [None, 4, mj.int4()])
def test_only_texts_are_parsed(thing):
    with pytest.raises(ValueError, match="a policy is a text"):
        mj.policy(thing)


@pytest.mark.parametrize("parts", [(), (None,), (mj.int4(), "int8"), (mj.per_layer(mj.int4(), {}),)])
def test_only_policies_of_one_layer_are_chained(parts):
    with pytest.raises(ValueError, match="chain"):
        mj.chain(*parts)


def test_help_names_every_part():
    texts = signatures()
    assert set(texts) == set(PARTS)
    for name, text in texts.items():
        needed = {"budget": 256} if "budget=0" in text else {}
        text, part = text.replace(" ", "").replace("budget=0", "budget=256"), PARTS[name](**needed)
        if name == "massfold":  # stands with a budget only
            text, part = f"h2o(256)+{text}", mj.chain(mj.h2o(256), part)
        assert mj.policy(text) == part


def test_a_policy_per_layer():
    policy = mj.per_layer(mj.int4(), {0: mj.dense(), -1: mj.int8(), 2: mj.streaming(4, 16)})
    assert isinstance(policy, LayerwisePolicy)
    chosen = [policy.for_layer(i, 5) for i in range(5)]
    assert chosen == [mj.dense(), mj.int4(), mj.streaming(4, 16), mj.int4(), mj.int8()]
    assert [layer.policy for layer in policy.init([SPEC] * 5)] == chosen
    assert hash(policy) == hash(mj.per_layer(mj.int4(), {2: mj.streaming(4, 16), -1: mj.int8(), 0: mj.dense()}))
    assert str(policy) == "int4; int8 on layers -1; dense on layers 0; streaming(4,16) on layers 2"


def test_the_outer_layers_can_be_protected():
    policy = mj.protect_layers(mj.int4(), 2)
    assert [str(policy.for_layer(i, 6)) for i in range(6)] == ["dense", "dense", "int4", "int4", "dense", "dense"]
    assert [str(policy.for_layer(i, 3)) for i in range(3)] == ["dense"] * 3
    assert mj.protect_layers(mj.int4(), 0) == mj.int4()


def test_wrong_layers_are_refused():
    with pytest.raises(ValueError, match="count to be an integer of at least 0, got -1"):
        mj.protect_layers(mj.int4(), -1)
    with pytest.raises(ValueError, match=r"layers \[-4, 7\], but the model has 3"):
        mj.per_layer(mj.int4(), {7: mj.dense(), -4: mj.dense()}).init([SPEC] * 3)
    with pytest.raises(ValueError, match="needs the specs of all layers"):
        mj.per_layer(mj.int4(), {0: mj.dense()}).init(SPEC)
    with pytest.raises(ValueError, match="chain composes policies"):
        mj.per_layer(mj.int4(), {0: "int8"})
