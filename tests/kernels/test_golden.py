"""Payloads committed once stay the same bytes, on every level."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from psq.codec import codec_of_wire_id, get_codec
from psq.errors import RemotePayloadError

FOLDER = Path(__file__).parents[2] / "proto" / "vectors" / "codec"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())


def load(name):
    return np.fromfile(FOLDER / f"{name}.f32", "<f4").astype(np.float32)


def digest(values):
    plain = np.where(np.isnan(values), np.float32("nan"), values).astype("<f4")
    return hashlib.sha256(plain.tobytes()).hexdigest()


@pytest.mark.parametrize("spec", MANIFEST["vectors"])
def test_encoding_gives_the_committed_bytes(level, spec):
    codec, expected = get_codec(spec), MANIFEST["vectors"][spec]
    values, residual = load("values"), load("residual")
    if expected["nan_at"] is not None:
        values[expected["nan_at"]] = np.nan
    payload = np.zeros(codec.nbytes(values.size), np.uint8)
    codec.encode_ef(values, residual, payload, seed=MANIFEST["seed"])
    assert payload.tobytes() == (FOLDER / expected["payload"]).read_bytes(), level.name
    assert digest(residual) == expected["residual_sha256"]


@pytest.mark.parametrize("spec", MANIFEST["vectors"])
def test_committed_bytes_decode_to_the_committed_values(level, spec):
    expected = MANIFEST["vectors"][spec]
    codec, out = codec_of_wire_id(expected["wire_id"]), np.zeros(MANIFEST["numel"], np.float32)
    assert codec.spec == spec
    codec.decode((FOLDER / expected["payload"]).read_bytes(), out)
    assert digest(out) == expected["decoded_sha256"], level.name


@pytest.mark.parametrize("spec", MANIFEST["vectors"])
def test_only_payloads_with_the_nan_are_refused(level, spec):
    entry = MANIFEST["vectors"][spec]
    payload = (FOLDER / entry["payload"]).read_bytes()
    if entry["nan_at"] is None:
        get_codec(spec).check(payload, MANIFEST["numel"])
        return
    with pytest.raises(RemotePayloadError, match="NaN or Inf"):
        get_codec(spec).check(payload, MANIFEST["numel"])
    assert level.name


def test_the_script_that_makes_the_vectors_agrees_with_them():
    path = Path(__file__).with_name("regenerate.py")
    spec = importlib.util.spec_from_file_location("regenerate", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert set(script.specs()) == set(MANIFEST["vectors"])
    for name in script.specs():
        payload, entry = script.vector(get_codec(name))
        assert entry == MANIFEST["vectors"][name]
        assert script.file_of(get_codec(name)).read_bytes() == payload
