"""Which kernels a process gets, and that every one of them needs no other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from psq import kernels
from psq.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHOW = "from psq import kernels; print(kernels.level(), *kernels.available())"
HIDE = "import sys; sys.modules['psq.kernels._native'] = None; "
ROUND_TRIP = """
import numpy as np
from psq.codec import get_codec
codec = get_codec('uniform:bits=4')
values, out = np.linspace(-1, 1, 700, dtype=np.float32), np.zeros(700, np.float32)
payload = bytearray(codec.nbytes(700))
codec.encode(values, payload)
codec.check(payload, 700)
codec.decode(payload, out)
print(round(float(abs(out - values).max()), 2))
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_best_level_is_the_default():
    assert run(SHOW, PSQ_KERNEL="").stdout.split()[0] == kernels.available()[0]


@pytest.mark.parametrize("name", kernels.available())
def test_the_environment_forces_a_level(name):
    assert run(SHOW, PSQ_KERNEL=name).stdout.split()[0] == name


def test_a_level_that_cannot_run_here_fails_and_says_which_can():
    process = run(SHOW, PSQ_KERNEL="v9")
    assert process.returncode != 0
    assert "kernel level 'v9' cannot run here" in process.stderr
    assert ", ".join(kernels.available()) in process.stderr


def test_without_native_code_the_reference_does_everything():
    process = run(HIDE + SHOW)
    assert process.stdout.split() == ["reference", "reference"]
    assert run(HIDE + ROUND_TRIP).stdout == run(ROUND_TRIP).stdout == "0.07\n"


def test_without_native_code_a_forced_level_fails_and_says_why():
    process = run(HIDE + SHOW, PSQ_KERNEL="v2")
    assert process.returncode != 0
    assert "installed without native code" in process.stderr


def test_importing_kernels_needs_neither_torch_nor_zmq():
    code = "import sys, psq.codec; print(sorted({'torch', 'zmq'} & set(sys.modules)))"
    assert run(code).stdout == "[]\n"


def test_use_changes_the_level_and_changes_it_back():
    before = kernels.level()
    with kernels.use("reference") as inside:
        assert kernels.active() is inside
        assert kernels.level() == "reference"
    assert kernels.level() == before


def test_use_of_an_unknown_level_changes_nothing():
    before = kernels.level()
    with pytest.raises(ConfigError, match="cannot run here"), kernels.use("v9"):
        pass
    assert kernels.level() == before


def test_native_kernels_of_an_older_build_are_refused_with_advice(monkeypatch):
    class Older:
        @staticmethod
        def levels():
            return ("v3",)

        class Level:
            encode = decode = payload_finite = topk_ascends = all_finite = name = None

    monkeypatch.setattr(kernels, "_native", Older)
    with pytest.raises(ConfigError, match=r"older than psq \(no block_norms\): install psq again"):
        kernels.get("v3")


# ---- object files of the build, where there is one -----------------------------------------------


def object_file(level):
    found = sorted(ROOT.glob(f"build/*/CMakeFiles/_native.dir/psq/native/level_{level}.cpp.o"))
    if not found:
        pytest.skip(f"no object file of level {level} under build/: nothing was compiled here")
    return found[0]


def output_of(tool, *arguments):
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


# VEX: every name that begins with v, but the two that are no vectors. EVEX: its registers, masks,
# broadcasts and roundings, and the names that have no VEX form.
VEX = r"\tv(?!err\b|erw\b)[a-z0-9]+\b"
EVEX = (
    r"%zmm\d|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%k[0-7]\b|\{1to|\{r[nduz]-sae\}"
    r"|\tv(?:pternlog|movdq[au](?:8|16|32|64)\b|perm[it]2|pro[lr]|rndscale|p?blendm|pmov[dqw][bwd]\b"
    r"|range|getexp|getmant|scalef|fixupimm|pandn?[dq]\b|px?or[dq]\b|(?:insert|extract)[fi]\d+x)"
)
FOREIGN = {"v2": rf"{VEX}|{EVEX}", "v3": EVEX}


@pytest.mark.parametrize("level", FOREIGN)
def test_a_level_uses_no_instruction_of_a_higher_one(level):
    code = output_of("objdump", "-d", "--no-show-raw-insn", str(object_file(level)))
    found = re.search(FOREIGN[level], code)
    assert found is None, code[max(found.start() - 200, 0) : found.end()]
    assert len(re.findall("%xmm", code)) > 1000  # it was the code that was searched
    assert ("%ymm" in code) == (level == "v3")


def test_the_highest_level_would_be_found_in_the_others():
    code = output_of("objdump", "-d", "--no-show-raw-insn", str(object_file("v4")))
    assert all(re.search(pattern, code) for pattern in FOREIGN.values())


@pytest.mark.parametrize(
    ("line", "levels"),
    [
        ("  10:\taddps  %xmm1,%xmm2", []),
        ("  10:\tverr   %ax", []),
        ("  10:\tvpaddd %xmm1,%xmm2,%xmm3", ["v2"]),
        ("  10:\tvzeroupper", ["v2"]),
        ("  10:\tvpermps 0x8(%rsp),%ymm15,%ymm1", ["v2"]),
        ("  10:\tvpaddd (%rax){1to8},%ymm2,%ymm3", ["v2", "v3"]),
        ("  10:\tvpternlogd $0x1,%xmm1,%xmm2,%xmm3", ["v2", "v3"]),
        ("  10:\tvmovdqu64 (%rax),%xmm17", ["v2", "v3"]),
        ("  10:\tvmovdqu32 (%rax),%ymm1", ["v2", "v3"]),
        ("  10:\tkmovw  %k1,%eax", ["v2", "v3"]),
    ],
)
def test_an_instruction_is_foreign_to_the_levels_below_it(line, levels):
    assert [name for name, pattern in FOREIGN.items() if re.search(pattern, line)] == levels


@pytest.mark.parametrize("level", ["v2", "v3", "v4", "neon"])
def test_a_level_shares_no_function_with_another(level):
    symbols = [line.split()[-2:] for line in output_of("nm", str(object_file(level))).splitlines()]
    exported = [name for kind, name in symbols if kind.isupper() and kind != "U"]
    assert exported == [f"psq_kernels_{level}"]
    needed = {name for kind, name in symbols if kind == "U"}
    assert needed <= {"memcpy", "memset", "memmove", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
