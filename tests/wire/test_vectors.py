from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest

from psq_proto.errors import RemoteWireError
from psq_proto.frames import decode_control, decode_frame
from psq_proto.messages import BODY_TYPES, MessageType

# The whole protocol in one number. It changes when a frame's bytes do: that breaks every client
# there is, see proto/vectors/README.md.
ALL_BYTES_SHA256 = "c8d19909573601ede5f4ae3512fd4897fa1ec2796cd2a17179acba5b8bb0cd52"

_path = Path(__file__).with_name("regenerate.py")
_spec = importlib.util.spec_from_file_location("wire_regenerate", _path)
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

MANIFEST = golden.load()
MESSAGES = [pytest.param(entry, id=entry["file"]) for entry in MANIFEST["messages"]]
REFUSED = [pytest.param(entry, id=entry["file"]) for entry in MANIFEST["refused"]]


def kept(name: str) -> bytes:
    return bytes.fromhex((golden.VECTORS / name).read_text())


def crc32c_bit_by_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("entry", MESSAGES)
def test_the_fields_of_each_golden_frame_give_its_bytes(entry: dict[str, Any]) -> None:
    assert golden.frame_of(entry) == kept(entry["file"])


@pytest.mark.parametrize("entry", MESSAGES)
def test_the_bytes_of_each_golden_frame_give_its_fields(entry: dict[str, Any]) -> None:
    frame = decode_frame(kept(entry["file"]))
    wanted = golden.header_of(entry)
    for name in wanted.__slots__:
        if name not in ("body_len", "body_crc"):
            assert getattr(frame.header, name) == getattr(wanted, name), name
    body = decode_control(frame) if frame.header.type in BODY_TYPES else bytes(frame.body)
    assert body == golden.body_of(entry)


@pytest.mark.parametrize("entry", MESSAGES)
def test_a_stranger_with_the_specification_reads_each_golden_frame(entry: dict[str, Any]) -> None:
    frame = kept(entry["file"])
    names = [
        *("magic", "major", "type", "codec", "run_id", "epoch", "incarnation", "rank", "flags"),
        *("seq", "round", "version", "rate", "plan", "shard", "part"),
        *("body_len", "body_crc", "header_crc"),
    ]
    fields = dict(zip(names, struct.unpack("<4sBBH16sIIIIQQQdQIIIII", frame[:100]), strict=True))
    assert (fields.pop("magic"), fields.pop("major")) == (b"PSQW", 1)
    assert fields.pop("header_crc") == crc32c_bit_by_bit(frame[:96])
    assert fields.pop("body_crc") == crc32c_bit_by_bit(frame[100:])
    assert fields.pop("body_len") == len(frame) - 100
    expected = dict.fromkeys(fields, 0) | {"run_id": "00" * 16} | entry["header"]
    expected["type"] = MessageType[entry["header"]["type"]]
    assert fields | {"run_id": fields["run_id"].hex()} == expected
    if "body" in entry:
        assert json.dumps(msgpack.unpackb(frame[100:])) == json.dumps(entry["body"])
    else:
        assert frame[100:].hex() == entry["body_hex"]


@pytest.mark.parametrize("entry", REFUSED)
def test_each_golden_fault_is_refused_and_named(entry: dict[str, Any]) -> None:
    with pytest.raises(RemoteWireError, match=entry["words"]):
        decode_control(decode_frame(kept(entry["file"])))


def test_every_message_type_has_a_golden_frame() -> None:
    assert {entry["header"]["type"] for entry in MANIFEST["messages"]} == set(
        MessageType.__members__
    )


def test_no_golden_byte_has_changed_and_no_file_is_left_over() -> None:
    made = golden.make()
    files = {
        path.relative_to(golden.VECTORS).as_posix()
        for pattern in ("*.hex", "refused/*.hex")
        for path in golden.VECTORS.glob(pattern)
    }
    assert files == set(made)
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(kept(name))
    assert {name for name in files if made[name] != (golden.VECTORS / name).read_text()} == set()
    assert digest.hexdigest() == ALL_BYTES_SHA256
