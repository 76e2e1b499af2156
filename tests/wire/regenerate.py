"""Write the golden frames anew: `python -m tests.wire.regenerate`.

Says which files under `proto/vectors` differ from what this code makes of `manifest.json`, and with
`--write` writes them. The bytes are the protocol: if one changes, every client that exists breaks,
so this is done together with a new MAJOR (see `proto/README.md`), never to make a test pass.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from pathlib import Path
from typing import Any

from crc32c import crc32c

from psq_proto.frames import HEADER_BYTES, Header, encode_control, encode_frame
from psq_proto.messages import BODY_TYPES, ControlBody, Flags, MessageType

VECTORS = Path(__file__).parents[2] / "proto" / "vectors"
CRC_AT = HEADER_BYTES - 4


def load() -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((VECTORS / "manifest.json").read_text())
    return manifest


def header_of(entry: dict[str, Any]) -> Header:
    fields = dict(entry["header"])
    fields["type"] = MessageType[fields["type"]]
    fields["flags"] = Flags(fields.get("flags", 0))
    fields["run_id"] = bytes.fromhex(fields.get("run_id", "00" * 16))
    return Header(**fields)


def body_of(entry: dict[str, Any]) -> ControlBody | bytes:
    if "body_hex" in entry:
        return bytes.fromhex(entry["body_hex"])
    return BODY_TYPES[header_of(entry).type](**{k: _tuples(v) for k, v in entry["body"].items()})


def frame_of(entry: dict[str, Any]) -> bytes:
    header, body = header_of(entry), body_of(entry)
    made = encode_frame(header, body) if isinstance(body, bytes) else encode_control(header, body)
    return bytes(made)


def refused_of(entry: dict[str, Any], base: bytes) -> bytes:
    """The frame that `entry` makes of a good one: cut, added to, overwritten, or given a body."""
    frame = bytearray(base)
    if "body_hex" in entry:
        body = bytes.fromhex(entry["body_hex"])
        frame[HEADER_BYTES:] = body
        frame[CRC_AT - 8 : CRC_AT] = struct.pack("<II", len(body), crc32c(body))
    if "put" in entry:
        put = bytes.fromhex(entry["put"])
        frame[entry["at"] : entry["at"] + len(put)] = put
    if entry.get("reseal") or "body_hex" in entry:
        frame[CRC_AT:HEADER_BYTES] = struct.pack("<I", crc32c(frame[:CRC_AT]))
    frame += bytes.fromhex(entry.get("append", ""))
    return bytes(frame[: len(frame) - entry.get("cut", 0)])


def to_text(frame: bytes) -> str:
    """Hex: the header in five lines of 20 bytes, then the body in lines of 32."""
    head, body = frame[:HEADER_BYTES], frame[HEADER_BYTES:]
    lines = [head[at : at + 20].hex() for at in range(0, len(head), 20)]
    lines += [body[at : at + 32].hex() for at in range(0, len(body), 32)]
    return "\n".join(lines) + "\n"


def make() -> dict[str, str]:
    """Every file's text by its name."""
    manifest = load()
    frames = {entry["file"]: frame_of(entry) for entry in manifest["messages"]}
    refused = {
        entry["file"]: refused_of(entry, frames[entry["of"]]) for entry in manifest["refused"]
    }
    return {name: to_text(frame) for name, frame in (frames | refused).items()}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the files that differ")
    write = parser.parse_args().write
    made = make()
    kept = {path.relative_to(VECTORS).as_posix() for path in VECTORS.glob("*.hex")}
    kept |= {path.relative_to(VECTORS).as_posix() for path in VECTORS.glob("refused/*.hex")}
    differing = [
        name
        for name, text in made.items()
        if name not in kept or (VECTORS / name).read_text() != text
    ]
    for name in sorted(kept - made.keys()):
        sys.stdout.write(f"{name}: not in the manifest\n")
    for name in differing:
        sys.stdout.write(f"{name}: {'written' if write else 'differs'}\n")
        if write:
            (VECTORS / name).write_text(made[name])
    return 0 if write or not differing else 1


if __name__ == "__main__":
    sys.exit(main())
