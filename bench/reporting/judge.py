"""The bars: what was measured, the target, whether it holds. Pure functions of the benches' JSON.

A bar whose figure is missing is not failed but `not run`, with the reason. No bar is rounded before
it is compared. Where a bar speaks of several codecs, the worst one counts and is named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]  # by the run's name: its kept file

AT_LEAST, AT_MOST = ">=", "<="
BEST = "best of the rounds"
NARROW = 0.75  # the v2 and v3 levels' share for sign
UNIFORM = ("uniform:bits=2", "uniform:bits=4", "uniform:bits=8")
LOG = ("log:k=0", "log:k=1", "log:k=2", "log:k=3", "log:k=6")
STOCHASTIC = tuple(f"{spec},stochastic=true" for spec in UNIFORM)
TWO_THREADS = ("log:k=2", "uniform:bits=4,stochastic=true")
KILO = 1e3
ACCURACY = 0.88  # of Fashion-MNIST, what bench/accuracy.py is told to reach


@dataclass(frozen=True, slots=True)
class Bar:
    """One line.

    Attributes:
        measured: none where it was not run.
        sense: ">=" or "<=".
        note: where the figure comes from, or why there is none.
    """

    name: str
    measured: float | None
    sense: str
    target: float
    note: str = ""

    @property
    def holds(self) -> bool | None:
        if self.measured is None:
            return None
        if self.sense == AT_LEAST:
            return self.measured >= self.target
        return self.measured <= self.target

    def line(self) -> str:
        word = {True: "yes", False: "NO", None: "not run"}[self.holds]
        figure = "" if self.measured is None else f"{self.measured:.3g}"
        tail = f"  ({self.note})" if self.note else ""
        return f"{word:8}{self.name:66}{figure:>8}  {self.sense} {self.target:<6g}{tail}"

    def cells(self) -> list[str]:
        word = {True: "yes", False: "**no**", None: "not run"}[self.holds]
        figure = "" if self.measured is None else f"{self.measured:.3g}"
        return [self.name, figure, f"{self.sense} {self.target:g}", word, self.note]


class MissingError(Exception):
    """There is no such figure, and why."""


def bars(results: Results) -> list[Bar]:
    """All of them, in the order of what they speak of."""
    return [
        bar
        for group in (
            codec_bars,
            server_bars,
            step_bars,
            memory_bars,
            package_bars,
            straggler_bars,
            advise_bars,
            timeline_bars,
            accuracy_bars,
        )
        for bar in group(results)
    ]


def bar(name: str, sense: str, target: float, figure: Callable[[], tuple[float, str]]) -> Bar:
    """A bar from a figure that may be missing."""
    try:
        measured, note = figure()
    except MissingError as error:
        return Bar(name, None, sense, target, str(error))
    return Bar(name, measured, sense, target, note)


def result_of(results: Results, name: str) -> Any:
    kept = results.get(name)
    if kept is None:
        msg = f"{name} was not run"
        raise MissingError(msg)
    if kept["error"]:
        raise MissingError(kept["error"])
    return kept["result"]


# ---- kernels


def codec_bars(results: Results) -> Iterator[Bar]:
    def worst(specs: tuple[str, ...], verb: str, level: str) -> tuple[float, str]:
        rows = result_of(results, "codecs")["rows"]
        found = [
            (row["ratio"], row["codec"])
            for row in rows
            if row["verb"] == verb
            and row["level"] == level
            and (row["codec"] in specs or not specs)
        ]
        if not found:
            msg = f"this machine has no level {level}"
            raise MissingError(msg)
        ratio, codec = min(found)
        return ratio, f"{codec}, {BEST}"

    top = top_level(results)
    for level in ("v4", "v3", "v2"):
        target = NARROW if level in ("v2", "v3") else 0.85
        name = f"{level} sign + EF encode / r2w1"
        yield bar(name, AT_LEAST, target, lambda at=level: worst(("sign",), "encode_ef", at))
    for name, specs, target in (
        ("uniform 2/4/8 bits", UNIFORM, 0.70),
        ("log 2/3/4 bits", LOG, 0.60),
        ("stochastic 2/4/8 bits", STOCHASTIC, 0.50),
    ):
        yield bar(
            f"{top} {name} + EF encode / r2w1, worst",
            AT_LEAST,
            target,
            lambda specs=specs: worst(specs, "encode_ef", top),
        )
    for verb, stream in (("decode", "w1"), ("decode_add", "r1w1")):
        yield bar(
            f"{top} sign {verb} / {stream}",
            AT_LEAST,
            0.90,
            lambda verb=verb: worst(("sign",), verb, top),
        )
        every = (*UNIFORM, *LOG)
        yield bar(
            f"{top} {verb} / {stream}, worst of uniform and log",
            AT_LEAST,
            0.90,
            lambda verb=verb, every=every: worst(every, verb, top),
        )
    for spec in TWO_THREADS:
        yield bar(
            f"two threads / one, {spec}",
            AT_LEAST,
            1.6,
            lambda spec=spec: two_threads(results, spec),
        )


def top_level(results: Results) -> str:
    kept = results.get("codecs") or {}
    rows = (kept.get("result") or {}).get("rows", [])
    return rows[0]["level"] if rows else "v4"


def two_threads(results: Results, spec: str) -> tuple[float, str]:
    for row in result_of(results, "two-threads"):
        if row["codec"] == spec:
            return row["best"], f"median {row['median']:.2f}"
    msg = f"{spec} is not among the cases"
    raise MissingError(msg)


def server_bars(results: Results) -> Iterator[Bar]:
    def ratio(case: str, *, run: str = "server", key: str = "best") -> tuple[float, str]:
        for row in result_of(results, run)["cases"]:
            if row["case"].endswith(case):
                return row[key], f"median {row['median']:.2f}" if key == "best" else BEST
        msg = f"{case} is not among the cases"
        raise MissingError(msg)

    for case, stream, target in (
        ("sign W=2 no answer", "r3w3", 0.80),
        ("sign W=2 weights 8 bits", "r3w3", 0.60),
        ("sign W=2 delta sign", "r4w4", 0.60),
        ("sign W=8 delta sign", "r4w4", 0.45),
        ("sign W=32 delta sign", "r4w4", 0.33),
    ):
        yield bar(f"server step {case} / {stream}", AT_LEAST, target, lambda case=case: ratio(case))
    for run, how in (("server", "shard by shard"), ("server-whole", "over whole vectors")):
        yield bar(
            f"server step, passes {how} / fused",
            AT_LEAST,
            1.5,
            lambda run=run: ratio("sign W=2 delta sign", run=run, key="passes"),
        )

    def torch() -> tuple[float, str]:
        found = result_of(results, "server")["torch"]
        if isinstance(found, str):
            raise MissingError(found)
        return found["best"], f"median {found['median']:.2f}"

    yield bar("whole server step W=2 / torch's fused Adam", AT_MOST, 1.5, torch)


# ---- end to end


def step_row(results: Results, rate: str, system: str) -> dict[str, Any]:
    (table,) = result_of(results, f"step-{rate}-25M")
    if "skipped" in table:
        raise MissingError(table["skipped"])
    for row in table["rows"]:
        if row["system"] == system:
            if "failure" in row:
                msg = f"{system}: {row['failure']}"
                raise MissingError(msg)
            return row
    msg = f"{system} is not among the systems"
    raise MissingError(msg)


def faster(results: Results, rate: str, ours: str, theirs: str) -> tuple[float, str]:
    """Best by best; the medians' ratio in the note."""
    own, peer = step_row(results, rate, ours), step_row(results, rate, theirs)
    median = peer["median_s"] / own["median_s"]
    best_ms, peer_ms = own["best_s"] * KILO, peer["best_s"] * KILO
    note = f"best {best_ms:.1f} against {peer_ms:.1f} ms, medians {median:.2f}"
    return peer["best_s"] / own["best_s"], note


def against_best(results: Results, rate: str) -> tuple[float, str]:
    """Against the best of the half-precision and compressed peers that ran."""
    found = []
    for peer in ("ddp-bf16", "ddp-fp16", "powersgd-1"):
        try:
            found.append((*faster(results, rate, "psq", peer), peer))
        except MissingError:
            continue
    if not found:
        msg = "no such peer ran"
        raise MissingError(msg)
    ratio, note, peer = min(found)
    return ratio, f"{peer}: {note}"


def step_bars(results: Results) -> Iterator[Bar]:
    fp32 = "ddp-fp32"
    for rate, ours, peer, target in (
        ("loopback", "psq", fp32, 2.0),
        ("10gbit", "psq", fp32, 3.0),
        ("1gbit", "psq", fp32, 12.0),
        ("1gbit", "psq", "ddp-bf16", 6.0),
        ("1gbit", "psq", "powersgd-1", 2.0),
        ("100mbit", "psq", fp32, 14.0),
        ("100mbit", "psq-s2", fp32, 25.0),
    ):
        servers = ", 2 servers beside the workers" if ours == "psq-s2" else ""
        yield bar(
            f"{rate}: times faster than {peer}{servers}, 25 M",
            AT_LEAST,
            target,
            lambda r=rate, o=ours, p=peer: faster(results, r, o, p),
        )
    yield bar(
        "loopback: times faster than the best compressed or half-precision peer",
        AT_LEAST,
        1.3,
        lambda: against_best(results, "loopback"),
    )

    def cpu() -> tuple[float, str]:
        own, peer = (step_row(results, "loopback", name) for name in ("psq", fp32))
        return own["cpu_s"] / peer["cpu_s"], "medians of CPU seconds a step"

    yield bar("loopback: CPU by that of ddp-fp32", AT_MOST, 0.55, cpu)
    for rate, ours in (("1gbit", "psq"), ("100mbit", "psq"), ("100mbit", "psq-s2")):
        yield bar(
            f"{rate}: step / floor of the wire, {ours}",
            AT_MOST,
            1.35,
            lambda r=rate, o=ours: over_floor(results, r, o),
        )
    yield bar(
        "worker replicas equal after every round of every run",
        AT_LEAST,
        1.0,
        lambda: equal(results),
    )


def over_floor(results: Results, rate: str, ours: str) -> tuple[float, str]:
    row = step_row(results, rate, ours)
    best = row["best_s"] / row["floor_s"]
    return row["median_s"] / row["floor_s"], f"median; best {best:.2f}; frame headers are 1.046"


def equal(results: Results) -> tuple[float, str]:
    """1 if all ranks of every psq row that ran had the same weights, else 0."""
    rows = [
        row
        for name, kept in results.items()
        if name.startswith("step-") and not kept["error"]
        for table in kept["result"]
        for row in table.get("rows", [])
        if row["system"].startswith("psq") and "failure" not in row
    ]
    if not rows:
        msg = "no step was measured"
        raise MissingError(msg)
    unequal = [row["system"] for row in rows if not row["replicas_equal"]]
    return float(not unequal), f"{len(rows)} rows" if not unequal else f"not: {', '.join(unequal)}"


# ---- what it takes


def memory_bars(results: Results) -> Iterator[Bar]:
    def of(case: str, residual: str, key: str) -> tuple[float, str]:
        for row in result_of(results, "memory")["rows"]:
            if row["case"] == case and row["residual"] == residual:
                if "failure" in row:
                    raise MissingError(row["failure"])
                return row[key], f"{case}, residual {residual}"
        msg = f"{case} with residual {residual} is not among the cases"
        raise MissingError(msg)

    def server() -> tuple[float, str]:
        peak, _ = of("server-adam-1bit", "f32", "server")
        payloads, note = of("server-adam-1bit", "f32", "server_payloads")
        return peak - payloads, f"{note}; without {payloads:.2f} of staged payloads"

    yield bar("server's peak memory, bytes a parameter", AT_MOST, 17, server)
    for case, residual, target, what in (
        ("server-adam-1bit", "f32", 5, "no moments"),
        ("server-adam-1bit", "bf16", 5, "no moments"),
        ("qadam-1bit", "f32", 13, "moments in f32"),
        ("qadam-1bit", "bf16", 13, "moments in f32"),
    ):
        yield bar(
            f"worker's own memory, {what}, residual {residual}, bytes a parameter",
            AT_MOST,
            target,
            lambda c=case, r=residual: of(c, r, "overhead"),
        )


def package_bars(results: Results) -> Iterator[Bar]:
    def of(read: Callable[[Any], tuple[float, str]]) -> Callable[[], tuple[float, str]]:
        return lambda: read(result_of(results, "package"))

    client = "psq.client, psq.codec, psq.kernels"
    native = "the native module alone"
    yield bar("wheel, KB, with the tasks' data", AT_MOST, 500, of(lambda r: wheel(r, 0)))
    yield bar("wheel, KB, without the tasks' data", AT_MOST, 500, of(lambda r: wheel(r, 1)))
    yield bar("native module in the wheel, KB", AT_MOST, 500, of(native_kb))
    yield bar("clean build, s", AT_MOST, 60, of(build_s))
    yield bar("import psq, ms", AT_MOST, 60, of(lambda r: import_ms(r, "psq")))
    yield bar(f"import {client} (NumPy in it), ms", AT_MOST, 60, of(lambda r: import_ms(r, client)))
    yield bar(f"import {native}, ms", AT_MOST, 10, of(lambda r: import_ms(r, native)))
    yield bar("one hash over codecs and server's step on all levels", AT_LEAST, 1.0, of(same_bits))
    yield bar("shards: fullest over emptiest server, worst", AT_MOST, 1.05, of(spread))
    yield bar("without a compiler it installs as pure Python", AT_LEAST, 1.0, of(pure))


def build_of(package: Any) -> dict[str, Any]:
    build: dict[str, Any] = package["build"]
    if "failure" in build:
        raise MissingError(build["failure"])
    return build


def wheel(package: Any, without_data: int) -> tuple[float, str]:
    build = build_of(package)
    data = build["data_bytes"] / KILO
    return build["wheel_bytes"] / KILO - without_data * data, f"data {data:.0f} KB"


def native_kb(package: Any) -> tuple[float, str]:
    build = build_of(package)
    return build["native_bytes"] / KILO, f"unpacked {build['native_unpacked_bytes'] / KILO:.0f} KB"


def build_s(package: Any) -> tuple[float, str]:
    build = build_of(package)
    return build["seconds"], f"CPU {build['cpu_s']:.0f} s"


def import_ms(package: Any, name: str) -> tuple[float, str]:
    for row in package["imports"]:
        if row["import"] == name:
            return row["best_ms"], f"best; median {row['median_ms']:.1f}"
    msg = f"{name} is not among the imports"
    raise MissingError(msg)


def same_bits(package: Any) -> tuple[float, str]:
    found = package["bits"]
    return float(found["equal"]), f"{found['codecs']} codecs on {', '.join(found['hashes'])}"


def spread(package: Any) -> tuple[float, str]:
    worst = max(package["spread"], key=lambda row: row["ratio"])
    return worst["ratio"], f"{worst['size']}, S = {worst['servers']}"


def pure(package: Any) -> tuple[float, str]:
    found = package.get("no_compiler")
    if found is None or "failure" in found:
        raise MissingError((found or {}).get("failure", "left out by --quick"))
    return float(found["kernels"] == ["reference"]), f"kernels: {' '.join(found['kernels'])}"


# ---- what it does


def straggler_bars(results: Results) -> Iterator[Bar]:
    def row() -> dict[str, Any]:
        for found in result_of(results, "straggler"):
            if found["rule"].startswith("ssp"):
                return found
        msg = "no ssp rule was run"
        raise MissingError(msg)

    def throughput() -> tuple[float, str]:
        found = row()
        note = f"{found['rule']}, best by best; median {found['ratio_median']:.2f}"
        return found["ratio_best"], note

    def stale() -> tuple[float, str]:
        found = row()
        bound = int(found["rule"].split(":")[1].split(",")[0])
        return float(
            found["max_staleness"] <= bound
        ), f"{found['max_staleness']} under {found['rule']}"

    yield bar(
        "ssp, one worker 4x slower: rounds a second by those without", AT_LEAST, 0.9, throughput
    )
    yield bar("ssp: staleness never beyond K", AT_LEAST, 1.0, stale)


def advise_bars(results: Results) -> Iterator[Bar]:
    for rate in ("100mbit", "1gbit", "10gbit", "25gbit"):
        yield bar(
            f"codec=auto at {rate}: time of what it chose by the best fixed choice's",
            AT_MOST,
            1.03,
            lambda rate=rate: chosen(results, rate),
        )


def chosen(results: Results, rate: str) -> tuple[float, str]:
    for case in result_of(results, "advise"):
        if case["rate"] != rate:
            continue
        if "skipped" in case:
            raise MissingError(case["skipped"])
        if case.get("chosen_over_best") is None:
            msg = "auto did not run, or chose what is no candidate"
            raise MissingError(msg)
        note = (
            f"chose {case['chosen']}, best {case['best']}, auto itself {case['auto_over_best']:.2f}"
        )
        return case["chosen_over_best"], note
    msg = "this rate is not among the cases"
    raise MissingError(msg)


def timeline_bars(results: Results) -> Iterator[Bar]:
    def share() -> tuple[float, str]:
        found = result_of(results, "timeline")
        spans, each = found["spans_a_step_at_most"], found["span_us"]
        return found["spans_share_of_best_step"], f"{spans:.0f} spans of {each:.2f} us"

    def steps() -> tuple[float, str]:
        found = result_of(results, "timeline")
        median = found["step_with_by_without_median"]
        noise = f"noise {found['noise_best']:.3f}, {found['noise_median']:.3f}"
        return found["step_with_by_without_best"], f"best; median {median:.3f}; {noise}"

    yield bar("timeline: time of its spans, share of a step", AT_MOST, 0.01, share)
    yield bar("timeline: step with by step without", AT_MOST, 1.01, steps)


def accuracy_bars(results: Results) -> Iterator[Bar]:
    name = f"100mbit: time to accuracy {ACCURACY:g}, best PowerSGD 1-4 by best psq"
    yield bar(name, AT_LEAST, 1.0, lambda: sooner(result_of(results, "accuracy")))


def sooner(runs: Any) -> tuple[float, str]:
    """Medians over the seeds of seconds to the target; who never reached it takes for ever."""
    times: dict[str, list[float]] = {}
    for run in runs:
        for row in run["rows"]:
            reached = (point[1] for point in row["points"] if point[3] >= ACCURACY)
            times.setdefault(row["system"], []).append(next(reached, math.inf))
    medians = {name: statistics.median(each) for name, each in times.items()}
    ours, peer = (
        min(((t, name) for name, t in medians.items() if name.startswith(kind)), default=None)
        for kind in ("psq", "powersgd")
    )
    if ours is None or peer is None or math.isinf(ours[0]):
        msg = "psq or PowerSGD did not run, or psq never got there"
        raise MissingError(msg)
    note = f"{ours[1]} {ours[0]:.1f} s, {peer[1]} {peer[0]:.1f} s, {len(runs)} seed(s)"
    return peer[0] / ours[0], note
