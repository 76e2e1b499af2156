"""Write the golden payloads anew: `python -m tests.kernels.regenerate`.

A deliberate act: payloads are a wire format, so a change here means that old and new processes no
longer understand each other, and asks for a new wire id. Existing files are compared first, and
what would change is listed; `--write` writes. The inputs, values.f32 and residual.f32, are made
once and never again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from psq import kernels
from psq.codec import Codec, codec_specs, get_codec
from psq.kernels import Floats

FOLDER = Path(__file__).parents[2] / "proto" / "vectors" / "codec"
SEED = 12345
BLOCKS = ("sign:block=256", "sign:block=0", "log:k=2,block=256", "log:k=6,block=0")
MORE = ("uniform:bits=3,block=256", "lloyd-max:bits=3,block=0", "uniform:bits=4,block=8192")


def specs() -> tuple[str, ...]:
    """Codecs that have vectors."""
    return (*codec_specs(), *BLOCKS, *MORE)


def inputs() -> tuple[Floats, Floats]:
    """Return values and residual, f32[2300]: ordinary ones, zeros, tiny and large ones."""
    return tuple(np.fromfile(FOLDER / f"{name}.f32", "<f4") for name in ("values", "residual"))


def file_of(codec: Codec) -> Path:
    """Where a codec's payload lies."""
    return FOLDER / f"{codec.wire_id:04x}.payload"


def vector(codec: Codec) -> tuple[bytes, dict[str, Any]]:
    """Payload of the inputs, and what the manifest says of it."""
    values, residual = inputs()
    nan_at = None if "block=0" in codec.spec else values.size - 1
    if nan_at is not None:
        values[nan_at] = np.nan
    payload, out = np.zeros(codec.nbytes(values.size), np.uint8), np.zeros_like(values)
    codec.encode_ef(values, residual, payload, seed=SEED)
    codec.decode(payload, out)
    return payload.tobytes(), {
        "wire_id": codec.wire_id,
        "payload": file_of(codec).name,
        "nan_at": nan_at,
        "residual_sha256": hashlib.sha256(canonical(residual)).hexdigest(),
        "decoded_sha256": hashlib.sha256(canonical(out)).hexdigest(),
    }


def canonical(values: Floats) -> bytes:
    """Little-endian bytes with one kind of NaN."""
    return np.where(np.isnan(values), np.float32("nan"), values).astype("<f4").tobytes()


def make_inputs() -> None:
    """Write the inputs if they are not there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if (FOLDER / "values.f32").exists():
        return
    rng = np.random.default_rng(7)
    values, residual = (rng.standard_normal((2, 2300)) * [[1.0], [0.3]]).astype("<f4")
    values[:256] *= np.float32(1e-3)
    residual[:256] *= np.float32(1e-3)
    values[1024:1536], residual[1024:1536] = 0.0, 0.0
    values[1100], residual[1300] = -0.0, -0.0
    values[1536:1792] *= np.float32(2.0**-110)
    residual[1536:1792] *= np.float32(2.0**-110)
    values[2048:2100] *= np.float32(50.0)
    values.tofile(FOLDER / "values.f32")
    residual.tofile(FOLDER / "residual.f32")


def main() -> None:
    """Compare, list, and write if told to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write what differs")
    write = parser.parse_args().write
    make_inputs()
    manifest = {}
    with kernels.use(kernels.REFERENCE):
        for spec in specs():
            codec = get_codec(spec)
            payload, manifest[spec] = vector(codec)
            path = file_of(codec)
            if not path.exists() or path.read_bytes() != payload:
                print(f"{'writes' if write else 'would change'} {path.name}  {spec}")  # noqa: T201
                if write:
                    path.write_bytes(payload)
    body = {"numel": 2300, "seed": SEED, "vectors": manifest}
    if write:
        (FOLDER / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
