"""A smoke run of the libFuzzer targets; `make fuzz` runs them for long. See fuzz.py.

Without clang and its runtime each of these is skipped, and says what is missing.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # the first compiles every level under sanitizers

RUNS = 3000
SEED = 20_240_607


def load_fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


fuzz = load_fuzz()


@pytest.fixture(scope="module")
def targets():
    try:
        return fuzz.build()
    except fuzz.CannotFuzzError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("family", fuzz.FAMILIES)
def test_no_payload_makes_a_decoder_read_beyond_it_or_levels_differ(targets, family):
    run = fuzz.fuzz(targets[family], family, runs=RUNS, seed=SEED)
    assert run.executions >= RUNS


@pytest.mark.usefixtures("targets")
def test_a_read_beyond_a_payload_would_be_found():
    short = fuzz.build(["sign"], short=1)["sign"]
    with pytest.raises(fuzz.FoundError, match="heap-buffer-overflow"):
        fuzz.fuzz(short, "sign", runs=RUNS, seed=SEED)


def test_without_a_compiler_nothing_is_fuzzed_and_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(fuzz.shutil, "which", lambda _: None)
    with pytest.raises(fuzz.CannotFuzzError, match="clang"):
        fuzz.build()


def test_a_compiler_without_its_runtime_is_no_reason_to_fail(monkeypatch, tmp_path):
    bare = tmp_path / "clang++"
    bare.write_text('#!/bin/sh\n[ "$1" = -dumpmachine ] && echo x86_64-linux && exit 0\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(fuzz.shutil, "which", lambda _: str(bare))
    with pytest.raises(fuzz.CannotFuzzError, match="no libFuzzer runtime"):
        fuzz.build()
