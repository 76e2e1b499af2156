"""Any text or plan gives a value or one of psq's own errors: no other exception, no long wait."""

import contextlib
import copy

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psq.clock import parse_consistency
from psq.codec import codec_specs, get_codec
from psq.codec.registry import codec_of_wire_id
from psq.config import TABLES, Given, resolve
from psq.errors import ConfigError, PsqError, RemotePlanError
from psq.keys import read_public, read_secret
from psq.plan import Plan
from psq.presets import PRESETS, preset
from psq_proto.messages import U64_MAX

TENSORS = [("conv.weight", (8, 1, 3, 3)), ("fc.bias", (10,))]
ODD = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), U64_MAX)
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["", "sign", "fp32", "bsp", "topk:k=999", "a" * 5000, [], {}, [[]], {"a": 1}])
)
NUMBERS = st.integers(-3, 40) | st.floats() | st.sampled_from(["1e9", "nan", "", "0x1", "1_0"])


def places(plain, before=()):
    """Where every value of a nested map is."""
    pairs = plain.items() if isinstance(plain, dict) else enumerate(plain)
    for key, value in pairs:
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from places(value, (*before, key))


def put(plain, place, value):
    for key in place[:-1]:
        plain = plain[key]
    plain[place[-1]] = value


@given(st.sampled_from(sorted(PRESETS)), st.data())
def test_a_plan_with_any_value_anywhere_is_equal_or_refused(name, data):
    body = Plan.of(TENSORS, preset(name), 6).body
    plain = msgpack.unpackb(body)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(sorted(places(plain), key=str)))
        put(plain, place, copy.deepcopy(data.draw(ODD)))
    try:
        lied = msgpack.packb(plain)
        plan = Plan.parse(lied)
    except RemotePlanError:
        return
    assert plan.body == lied


@given(st.sampled_from(sorted(PRESETS)), st.data())
def test_a_plan_with_spoilt_bytes_is_equal_or_refused(name, data):
    body = bytearray(Plan.of(TENSORS, preset(name), 6).body)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        plan = Plan.parse(bytes(body))
    except RemotePlanError:
        return
    assert plan.body == bytes(body)


@given(st.text(max_size=60) | st.builds("{}:{}={}".format, st.sampled_from(codec_specs()),
       st.sampled_from(["k", "bits", "block", "norm", "clip"]), NUMBERS))  # fmt: skip
def test_any_text_is_a_codec_or_a_config_error(text):
    try:
        codec = get_codec(text)
    except ConfigError:
        return
    assert codec_of_wire_id(codec.wire_id).wire_id == codec.wire_id


@given(st.integers(-5, 70_000))
def test_any_number_is_a_codec_on_the_wire_or_refused(number):
    try:
        codec = codec_of_wire_id(number)
    except PsqError:
        return
    assert codec.wire_id == number


@given(st.text(max_size=40) | st.builds("{}:{},{}={}".format, st.sampled_from(["bsp", "ssp"]),
       NUMBERS, st.sampled_from(["quorum", "mads", "q"]), NUMBERS))  # fmt: skip
def test_any_text_is_a_consistency_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        parse_consistency(text)


SCALARS = st.one_of(
    st.integers(-(1 << 65), 1 << 65).map(str),
    st.floats().map(lambda x: repr(x).replace("e+", "e")),
    st.booleans().map(lambda x: str(x).lower()),
    st.text(st.characters(codec="utf-8", categories=["L", "N", "Zs"]), max_size=20).map(
        lambda text: f'"{text}"'
    ),
    st.sampled_from(["[]", "{}", "[1, 2]", "1979-05-27", '"tcp://[::1]:1"', '"tcp://*:0"', "''"]),
)


@pytest.fixture(scope="module")
def toml_path(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "psq.toml"


def resolved(path):
    """Every config of a file that is not refused."""
    for cls in TABLES.values():
        with contextlib.suppress(ConfigError):
            resolve(cls, {}, given=Given({}, str(path)), environ={})


@given(data=st.data())
def test_a_config_file_with_any_values_is_taken_or_a_config_error(toml_path, data):
    lines = []
    for table, cls in TABLES.items():
        lines.append(f"[{table}]")
        names = sorted(item.replace("_", "-") for item in cls.__dataclass_fields__)
        chosen = data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
        lines += [f"{name} = {data.draw(SCALARS)}" for name in chosen]
    toml_path.write_text("\n".join(lines))
    resolved(toml_path)


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_a_config_file_of_any_bytes_is_taken_or_a_config_error(toml_path, data):
    toml_path.write_bytes(data)
    resolved(toml_path)


@settings(max_examples=50)
@given(data=st.binary(max_size=200) | st.builds('{} = "{}"\n'.format, st.sampled_from(
       ["public", "secret", "ranks"]), st.text(max_size=50)).map(str.encode))  # fmt: skip
def test_a_key_file_of_any_bytes_is_a_config_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("keys") / "worker.secret"
    path.write_bytes(data)
    path.chmod(0o600)
    for read in (read_public, read_secret):
        with pytest.raises(ConfigError):
            read(path)
