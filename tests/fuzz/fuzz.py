"""Builds the libFuzzer targets of the native decoders, runs them, and counts what they executed.

    python tests/fuzz/fuzz.py --seconds 600            ten minutes, shared by all families
    python tests/fuzz/fuzz.py --family sign --runs 1000000
    python tests/fuzz/fuzz.py --merge                  renew the corpus that is committed

A target is `codec_fuzzer.cpp` for one family, with the kernels of every level, under
AddressSanitizer and UndefinedBehaviorSanitizer; it needs clang with its runtime (Debian: clang,
libclang-rt-14-dev). Inputs that found something new are kept under build/fuzz/inputs; the corpus
that is committed has a few of them for each family, one a line, in hexadecimal. Executions are
added up over all runs on this machine in build/fuzz/executions.json.

What breaks a law, or what a sanitizer reports, ends the run with exit code 1, and the input is kept
as build/fuzz/crash-FAMILY-...: run the target with that file as its only argument.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
NATIVE: Final = ROOT / "psq" / "native"
BUILD: Final = ROOT / "build" / "fuzz"
CORPUS: Final = HERE / "corpus"
COUNTS: Final = BUILD / "executions.json"

FAMILIES: Final = (
    "sign", "log", "uniform", "stochastic", "lloyd_max", "topk", "bf16", "fp32",
)  # fmt: skip
LEVELS: Final = ("v2", "v3", "v4")
MAX_INPUT_BYTES: Final = 192
CORPUS_INPUTS: Final = 48
"""Of each family, in the repository."""
GOAL_EXECUTIONS: Final = 100_000_000
COMPILE_S: Final = 900.0
MARGIN_S: Final = 120.0
"""How long a target may take beyond what it was given, to start and to end."""

# Not checked: pointer-overflow, because kernels compute where they would fetch ahead, beyond their
# arrays, and offsets of a residual that is absent; neither is read.
SANITIZERS: Final = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=pointer-overflow",
    "-fno-sanitize-recover=all",
)
# As CMakeLists.txt has them for the kernels.
KERNEL_FLAGS: Final = (
    "-O2", "-gline-tables-only", "-std=c++20", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wno-psabi",
)  # fmt: skip
# Not of comparisons and divisions, which -fsanitize=fuzzer-no-link adds: they are in the hot loops.
COVERAGE: Final = "-fsanitize-coverage=inline-8bit-counters,pc-table"
# The harness itself is plain: what it watches is not its own loops.
TARGET_FLAGS: Final = ("-O2", "-gline-tables-only", "-std=c++20", "-Wall", "-Wextra", "-Wno-psabi")


class CannotFuzzError(Exception):
    """There is no compiler here that makes such a target; the text says what is missing."""


class FoundError(Exception):
    """A target broke a law or was reported by a sanitizer; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one target did."""

    family: str
    executions: int
    per_second: int
    inputs: int
    peak_mb: int


def compiler() -> str:
    """A clang++ that links libFuzzer and the sanitizers.

    Raises:
        CannotFuzzError: there is none.
    """
    found = shutil.which("clang++")
    if found is None:
        msg = "clang++ is not installed: install clang and its runtime (Debian: libclang-rt-*-dev)"
        raise CannotFuzzError(msg)
    machine = subprocess.run(
        [found, "-dumpmachine"], capture_output=True, text=True, check=True
    ).stdout
    if not machine.startswith("x86_64"):
        msg = f"the targets compare the levels of x86-64, and this is {machine.strip()}"
        raise CannotFuzzError(msg)
    probe = "int LLVMFuzzerTestOneInput(const char *data, unsigned long size) { return 0; }"
    linked = subprocess.run(
        [found, "-x", "c", "-", "-fsanitize=fuzzer,address,undefined", "-o", "/dev/null"],
        input=probe,
        capture_output=True,
        text=True,
        check=False,
    )
    if linked.returncode:
        msg = f"{found} has no libFuzzer runtime: install it (Debian: libclang-rt-*-dev)"
        raise CannotFuzzError(msg)
    return found


def build(families: Sequence[str] = FAMILIES, *, short: int = 0) -> dict[str, Path]:
    """The targets, compiled where something they are made of is newer than they are.

    With `short` their payloads lack so many bytes, which each of them must then report.
    """
    clang = compiler()
    BUILD.mkdir(parents=True, exist_ok=True)
    made_of = [Path(__file__), *NATIVE.iterdir()]
    newest = max(path.stat().st_mtime for path in made_of)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda level: _level(clang, level, newest), LEVELS))
        targets = list(pool.map(lambda family: _target(clang, family, objects, short), families))
    return dict(zip(families, targets, strict=True))


def _level(clang: str, level: str, newest: float) -> Path:
    made = BUILD / f"level_{level}.o"
    if not made.exists() or made.stat().st_mtime < newest:
        flags = (*KERNEL_FLAGS, *SANITIZERS, COVERAGE, f"-march=x86-64-{level}")
        _compile([clang, *flags, "-c", str(NATIVE / f"level_{level}.cpp")], made)
    return made


def _target(clang: str, family: str, objects: Iterable[Path], short: int) -> Path:
    source, made = HERE / "codec_fuzzer.cpp", BUILD / f"fuzz_{family}{'_short' * bool(short)}"
    parts = [source, *objects]
    if not made.exists() or made.stat().st_mtime < max(part.stat().st_mtime for part in parts):
        defines = [f"-DPSQ_HAS_{level.upper()}=1" for level in LEVELS]
        defines += [f"-DPSQ_FUZZ_FAMILY=PSQ_{family.upper()}", f"-DPSQ_FUZZ_SHORT={short}"]
        harness = made.with_suffix(".o")
        _compile([clang, *TARGET_FLAGS, f"-I{NATIVE}", *defines, "-c", str(source)], harness)
        linked = [str(harness), *map(str, objects)]
        _compile([clang, *SANITIZERS, "-fsanitize=fuzzer", *linked], made)
    return made


def _compile(command: list[str], made: Path) -> None:
    partial = made.with_suffix(".partial")
    done = subprocess.run(
        [*command, "-o", str(partial)],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMPILE_S,
    )
    if done.returncode:
        msg = f"{' '.join(command)} failed:\n{done.stderr[-4000:]}"
        raise RuntimeError(msg)
    partial.rename(made)


def seed_inputs(family: str) -> Path:
    """The folder of the family's inputs, with those that are committed among them."""
    folder = BUILD / "inputs" / family
    folder.mkdir(parents=True, exist_ok=True)
    for number, line in enumerate((CORPUS / f"{family}.txt").read_text().split()):
        (folder / f"seed-{number:03}").write_bytes(bytes.fromhex(line))
    return folder


def fuzz(target: Path, family: str, *, seconds: float = 0, runs: int = 0, seed: int = 0) -> Run:
    """Run one target for so many seconds or executions.

    Raises:
        FoundError: it found something.
    """
    limits = [f"-runs={runs}"] if runs else [f"-max_total_time={max(1, round(seconds))}"]
    if seed:
        limits.append(f"-seed={seed}")
    done = subprocess.run(
        [
            str(target),
            str(seed_inputs(family)),
            f"-max_len={MAX_INPUT_BYTES}",
            f"-artifact_prefix={BUILD}/crash-{family}-",
            "-print_final_stats=1",
            "-timeout=30",
            "-rss_limit_mb=2048",
            "-entropic=0",
            "-reload=0",
            *limits,
        ],
        env={"ASAN_OPTIONS": "quarantine_size_mb=4:malloc_context_size=1:intercept_memcmp=0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        timeout=None if runs else seconds + MARGIN_S,
    )
    if done.returncode:
        msg = f"{family}: exit code {done.returncode}\n{done.stderr[-6000:]}"
        raise FoundError(msg)
    return _run_of(family, done.stderr)


def _run_of(family: str, said: str) -> Run:
    def number(name: str) -> int:
        found = re.search(rf"stat::{name}:\s+(\d+)", said)
        if found is None:
            msg = f"{family}: no {name} in\n{said[-2000:]}"
            raise FoundError(msg)
        return int(found[1])

    inputs = len(list((BUILD / "inputs" / family).iterdir()))
    return Run(
        family,
        number("number_of_executed_units"),
        number("average_exec_per_sec"),
        inputs,
        number("peak_rss_mb"),
    )


def count(run: Run) -> int:
    """Add a run to what was executed on this machine so far; returns the family's sum."""
    counts = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    counts[run.family] = counts.get(run.family, 0) + run.executions
    COUNTS.write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n")
    return int(counts[run.family])


def merge(target: Path, family: str) -> int:
    """Renew the family's committed corpus; returns how many inputs it has."""
    found, least = seed_inputs(family), BUILD / "least" / family
    shutil.rmtree(least, ignore_errors=True)
    least.mkdir(parents=True)
    subprocess.run(
        [str(target), "-merge=1", f"-max_len={MAX_INPUT_BYTES}", str(least), str(found)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=COMPILE_S,
    )
    inputs = sorted((path.read_bytes() for path in least.iterdir()), key=lambda b: (len(b), b))
    step = max(1, len(inputs) // CORPUS_INPUTS)
    lines = [each.hex() for each in inputs[::step][:CORPUS_INPUTS]]
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{family}.txt").write_text("\n".join(lines) + "\n")
    return len(lines)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz the native decoders.")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all families together")
    parser.add_argument("--runs", type=int, default=0, help="executions a family, not seconds")
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--merge", action="store_true", help="renew the committed corpus")
    return parser.parse_args()


def main() -> int:
    asked = _arguments()
    families = tuple(asked.family or FAMILIES)
    try:
        targets = build(families)
    except CannotFuzzError as error:
        _say(f"SKIPPED: nothing was fuzzed: {error}")
        return 0
    _say("family      executions    a second  inputs  peak MB   in all on this machine")
    for family, target in targets.items():
        try:
            run = fuzz(target, family, seconds=asked.seconds / len(families), runs=asked.runs)
        except FoundError as error:
            _say(f"FOUND: {error}")
            return 1
        sum_so_far = count(run)
        share = 100 * sum_so_far / GOAL_EXECUTIONS
        _say(
            f"{family:<10} {run.executions:>11,} {run.per_second:>11,} {run.inputs:>7,}"
            f" {run.peak_mb:>8,}   {sum_so_far:>13,} ({share:.1f} % of {GOAL_EXECUTIONS:,})"
        )
        if asked.merge:
            _say(f"{family:<10} corpus of {merge(target, family)} inputs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
