"""The package itself: wheel, build, imports, the same bits on every level, shards' spread.

    python bench/package.py [--quick] [--json]

- build: `pip wheel` of a copy of the sources, nothing built beforehand; wall-clock seconds. The
  copy holds what git tracks, and nothing is downloaded: build tools come from this environment.
- wheel: its bytes, and the native module's bytes in it, packed and unpacked.
- without a compiler: the same, with compilers that fail; then which kernels the wheel offers.
- imports: a fresh interpreter imports psq (and its client, without torch) or the native module
  alone, which needs NumPy imported; best and median of several.
- bits: every codec and the server's step on every level there is, one hash each; the seeds differ
  by codec, sizes are no multiple of a group.
- spread: bytes of the fullest server over those of the emptiest, for every size and S.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from peers.shapes import SIZES, shapes_of

from psq import kernels
from psq.codec import ShardCodec, codec_specs, get_codec
from psq.kernels import ServerStep
from psq.optim import Adam
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import AdamConfig

ROOT = Path(__file__).resolve().parent.parent
NUMEL = 3 * 4096 + 1000
NATIVE = "the native module alone"
IMPORTS = {
    "psq": "import psq",
    "psq.client, psq.codec, psq.kernels": "import psq.client, psq.codec, psq.kernels",
    NATIVE: "",
}
OFFERED = """import sys
sys.path.insert(0, {path!r})  # and not what an editable install of psq finds:
sys.meta_path[:] = [f for f in sys.meta_path if "skbc" not in type(f).__module__]
from psq import kernels
print(*kernels.available())
"""
DATA = ".gz"  # of the built-in tasks
SPREAD_SERVERS = (2, 4, 8)
BUILD_LIMIT_S = 600.0
IMPORT_LIMIT_S = 60.0


def main() -> None:
    options = parse()
    result: dict[str, Any] = {"imports": imports(options.repeats), "bits": bits(), **spread()}
    with tempfile.TemporaryDirectory(prefix="psq-package-") as folder:
        source = copy_sources(Path(folder) / "source")
        result["build"] = built(source, Path(folder) / "native")
        if not options.quick:
            result["no_compiler"] = without_compiler(source, Path(folder) / "pure")
    print(json.dumps(result) if options.json else table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="of each import")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="without the build that must fail")
    return parser.parse_args()


# ---- building


def copy_sources(target: Path) -> Path:
    """What git tracks, as it is in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607 - the git that is on PATH
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def built(source: Path, folder: Path, **environment: str) -> dict[str, Any]:
    """A wheel, and how long it took."""
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    start_s, start_cpu_s = time.perf_counter(), children_cpu_s()
    done = subprocess.run(
        [*argv, "--wheel-dir", str(folder), str(source)],
        check=False,
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        env={**os.environ, **environment},
    )
    took_s = time.perf_counter() - start_s
    if done.returncode:
        return {"failure": (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]}
    (wheel,) = folder.glob("*.whl")
    cpu_s = children_cpu_s() - start_cpu_s
    return {"seconds": took_s, "cpu_s": cpu_s, "wheel": str(wheel), **weighed(wheel)}


def children_cpu_s() -> float:
    """Of all that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def weighed(wheel: Path) -> dict[str, int]:
    """Bytes of a wheel, of the native module and of the tasks' data in it."""
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
    native = [info for info in files if info.filename.endswith(".so")]
    data = [info for info in files if info.filename.endswith(DATA)]
    return {
        "wheel_bytes": wheel.stat().st_size,
        "native_bytes": sum(info.compress_size for info in native),
        "native_unpacked_bytes": sum(info.file_size for info in native),
        "data_bytes": sum(info.compress_size for info in data),
    }


def without_compiler(source: Path, folder: Path) -> dict[str, Any]:
    """The wheel that comes out where every compiler fails, and what it says of its kernels."""
    shutil.rmtree(source / "build", ignore_errors=True)
    made = built(source, folder, CC="false", CXX="false")
    if "failure" in made:
        return made
    with zipfile.ZipFile(made["wheel"]) as archive:
        archive.extractall(folder / "unpacked")
    script = OFFERED.format(path=str(folder / "unpacked"))
    found = subprocess.run(
        [sys.executable, "-P", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        timeout=IMPORT_LIMIT_S,
    )
    return {**made, "kernels": found.stdout.split(), "error": found.stderr.strip()[-300:]}


# ---- how long imports take


def imports(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each import, in turn."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(repeats):
        for name, statement in IMPORTS.items():
            times[name].append(import_ms(name, statement))
    return [
        {"import": name, "best_ms": min(each), "median_ms": statistics.median(each)}
        for name, each in times.items()
    ]


def import_ms(name: str, statement: str) -> float:
    """Of one fresh interpreter; torch must not come with it."""
    before = ""
    if name == NATIVE:  # the extension by its path: its packages' __init__ would load more
        path = kernels._native.__file__  # noqa: SLF001 - the module that is being measured
        before = (
            f"import numpy, importlib.util as u\ns = u.spec_from_file_location('_native', {path!r})"
        )
        statement = "m = u.module_from_spec(s)\ns.loader.exec_module(m)"
    script = (
        f"import sys, time\n{before}\nstart = time.perf_counter()\n{statement}\n"
        "print(1e3 * (time.perf_counter() - start))\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        check=True,
        capture_output=True,
        text=True,
        timeout=IMPORT_LIMIT_S,
    )
    return float(done.stdout)


# ---- the same bits


def bits() -> dict[str, Any]:
    """One hash a level over all codecs and the server's step."""
    hashes = {level: digest(level) for level in kernels.available()}
    return {"hashes": hashes, "equal": len(set(hashes.values())) == 1, "codecs": len(codec_specs())}


def digest(level: str) -> str:
    found = hashlib.sha256()
    with kernels.use(level):
        for seed, spec in enumerate(codec_specs()):
            for array in of_codec(spec, seed):
                found.update(array.tobytes())
            for array in of_server(level, spec, seed):
                found.update(array.tobytes())
    return found.hexdigest()[:16]


def of_codec(spec: str, seed: int) -> list[np.ndarray]:
    codec, rng = get_codec(spec), np.random.default_rng(seed)
    x = rng.standard_normal(NUMEL, dtype=np.float32)
    residual = 0.1 * rng.standard_normal(NUMEL, dtype=np.float32)
    payload = np.zeros(codec.nbytes(NUMEL), np.uint8)
    codec.encode_ef(x, residual, payload, seed=seed)
    total = x.copy()
    codec.decode_add(payload, total)
    codec.decode(payload, x)
    return [payload, residual, total, x]


def of_server(level: str, spec: str, seed: int) -> list[np.ndarray]:
    """Two pushes, Adam, and the answer by the same codec, where a codec can be an answer."""
    codec, rng = get_codec(spec), np.random.default_rng(seed)
    vectors = {name: rng.random(NUMEL, dtype=np.float32) for name in ("x", "m", "v", "residual")}
    pushes = [np.zeros(codec.nbytes(NUMEL), np.uint8) for _ in range(2)]
    for push in pushes:
        codec.encode(rng.standard_normal(NUMEL, dtype=np.float32), push)
    adam = Adam(AdamConfig(), 0)
    adam.advance(1e-3)
    answer = np.zeros(codec.nbytes(NUMEL), np.uint8)
    kernels.get(level).server_step(
        ServerStep(
            uplink=codec.format,
            downlink=codec.format,
            segments=[NUMEL],
            payloads=pushes,
            scratch=np.empty(NUMEL, np.float32),
            answer=answer,
            delta=True,
            starts=[0],
            adam=adam.coefficients,
            **vectors,
        )
    )
    return [answer, *vectors.values()]


# ---- shards over servers


def spread() -> dict[str, Any]:
    rows = []
    recipe = preset("server-adam").with_codecs(uplink="sign", downlink="delta:sign")
    for size in SIZES:
        specs = [(f"p{i}", shape) for i, shape in enumerate(shapes_of(size))]
        for servers in SPREAD_SERVERS:
            plan = Plan.of(specs, recipe, 2, servers=servers)
            rows.append({"size": size, "servers": servers, "ratio": fullest_by_emptiest(plan)})
    return {"spread": rows}


def fullest_by_emptiest(plan: Plan) -> float:
    totals = []
    for server in range(plan.servers):
        shards = plan.for_server(server).owned
        codecs = [plan.recipe.uplink.codec, plan.recipe.downlink.codec]
        totals.append(
            sum(ShardCodec(get_codec(c), shard).nbytes for c in codecs for shard in shards)
        )
    return max(totals) / min(totals)


# ---- what came out


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | |", "|---|--:|"]
    made = result["build"]
    if "failure" in made:
        lines.append(f"| wheel | not built: {made['failure']} |")
    else:
        packed, unpacked = made["native_bytes"] / 1e3, made["native_unpacked_bytes"] / 1e3
        lines += [
            f"| clean build, s (CPU s) | {made['seconds']:.1f} ({made['cpu_s']:.1f}) |",
            f"| wheel, KB | {made['wheel_bytes'] / 1e3:.0f} |",
            f"| native module in it, KB (unpacked) | {packed:.0f} ({unpacked:.0f}) |",
            f"| data in it, KB | {made['data_bytes'] / 1e3:.0f} |",
        ]
    if pure := result.get("no_compiler"):
        offered = pure.get("failure") or " ".join(pure["kernels"]) or pure["error"]
        lines.append(f"| kernels where no compiler works | {offered} |")
    lines += [
        f"| import {row['import']}, ms, best (median) | {row['best_ms']:.1f} "
        f"({row['median_ms']:.1f}) |"
        for row in result["imports"]
    ]
    found = result["bits"]
    same = "equal" if found["equal"] else "DIFFERENT: " + json.dumps(found["hashes"])
    lines.append(
        f"| hash of {found['codecs']} codecs and the server's step on "
        f"{', '.join(found['hashes'])} | {same} |"
    )
    worst = max(result["spread"], key=lambda row: row["ratio"])
    lines.append(
        f"| shards: fullest over emptiest server, worst of all ({worst['size']}, S = "
        f"{worst['servers']}) | {worst['ratio']:.3f} |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
