"""The specification's tables say what the code does."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from psq.kernels import Family
from psq.layout import MAX_SHARDS
from psq.plan import MAX_SERVERS, MAX_WORLD_SIZE
from psq_proto.frames import HEADER_BYTES, Header
from psq_proto.limits import CONTROL_LIMITS, INIT_PART_NUMEL, PLAN_LIMITS
from psq_proto.messages import (
    BODY_TYPES,
    DATA_TYPES,
    MAX_CONTROL_BYTES,
    MAX_PAYLOAD_BYTES,
    ErrorCode,
    MessageType,
    from_worker,
)
from psq_proto.server_session import _CODES
from psq_proto.transitions import OVER, TRANSITIONS, State

SPECIFICATION = (Path(__file__).parents[2] / "proto" / "README.md").read_text()
SIZES = {"4 B": 4, "16 B": 16, "u8": 1, "u16": 2, "u32": 4, "u64": 8, "f64": 8}


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after some words, without its head."""
    after = SPECIFICATION[SPECIFICATION.index(heading) :]
    lines = re.search(r"(^\|.*\n)+", after, re.MULTILINE)
    assert lines is not None
    rows = [line.strip("|").split("|") for line in lines[0].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_header_table_lists_every_field_at_its_place() -> None:
    rows = table("## Frame")
    offset = 0
    for at, size, *_ in rows:
        assert int(at) == offset
        offset += SIZES[size]
    assert offset == HEADER_BYTES
    named = {row[2] for row in rows}
    assert named - {"magic", "header_crc"} == set(Header.__slots__)
    assert struct.calcsize("<4sBBH16sIIIIQQQdQIIIII") == HEADER_BYTES


def test_the_message_table_lists_every_type_with_its_sender_and_body() -> None:
    listed = {}
    for number, name, sender, body, _ in table("## Messages"):
        kind = MessageType[name]
        assert (int(number), sender == "worker") == (kind, from_worker(kind))
        listed[kind] = body
    assert listed == {
        kind: "raw" if kind in DATA_TYPES else "control" if kind in BODY_TYPES else "none"
        for kind in MessageType
    }


def test_the_body_table_lists_every_field() -> None:
    listed = {}
    for names, fields in table("A control body is a msgpack map"):
        words = re.sub(r"\(.*?\)|\[.*?\]+", "", re.sub(r'"\w+"(, "\w+")*( or "\w+")?', "", fields))
        for name in names.split(", "):
            listed[name] = [field.split()[0] for field in words.split(",")]
    assert listed == {kind.name: list(body.__slots__) for kind, body in BODY_TYPES.items()}


def test_the_state_table_is_the_automaton() -> None:
    read: dict[State, dict[MessageType, State]] = {state: {} for state in State}
    for states, moves in table("The table (a message sent or received"):
        for move in filter(None, moves.split("; ")):
            kinds, after = move.split(" -> ")
            named = {State(word) for word in states.split(", ") if word != "each of these"}
            rows = named or set(State) - OVER
            for row in rows:
                for kind in kinds.split(", "):
                    read[row][MessageType[kind]] = row if after == "the same" else State(after)
    assert read == TRANSITIONS


def test_the_error_table_lists_every_code_and_whether_it_is_fatal() -> None:
    listed = {code: fatal for code, fatal, _ in table("## ERROR codes")}
    assert set(listed) == set(ErrorCode)
    for _, code, fatal in _CODES:
        assert listed[code].startswith("yes" if fatal else "no")


def test_the_codec_table_lists_every_family() -> None:
    listed = dict(row[0].split(" ", 1) for row in table("Codec id:"))
    assert [int(number) for number in listed] == list(Family)
    for number, name in listed.items():
        assert Family(int(number)).name.lower().replace("_", "-") in name


def test_the_limits_are_those_of_the_code() -> None:
    assert (MAX_PAYLOAD_BYTES, MAX_CONTROL_BYTES, INIT_PART_NUMEL) == (1 << 20, 65_536, 262_144)
    rows = dict(table("## Limits"))
    assert rows["a job"] == (
        f"{MAX_SHARDS:,} shards, {MAX_WORLD_SIZE:,} workers, {MAX_SERVERS} servers"
    )
    of_raw_bodies = rows[
        f"body of {', '.join(kind.name for kind in MessageType if kind in DATA_TYPES)}"
    ]
    assert of_raw_bodies == "1 MiB (2^20 B)"
    for limits, row in ((CONTROL_LIMITS, "control body"), (PLAN_LIMITS, "PLAN")):
        for number in (limits.str_bytes, limits.array_items, limits.map_items, limits.items):
            assert f"{number:,}" in rows[row]
        assert f"nesting {limits.depth}" in rows[row]
