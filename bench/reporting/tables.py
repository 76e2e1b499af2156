"""Markdown of each bench's JSON. Pure functions: what a bench prints itself is taken as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

STEP_TEXT = """A step is what a system does from given gradients to new weights, its optimizer
included; there is no forward and no backward pass. `loopback` is one machine's; the other rates are
network namespaces joined by links shaped with `tc tbf`, all on the cores of one machine. Systems
take turns. \"psq is faster\" divides by the first psq row: best step by best step, and the median
over the rounds of the ratio of the rounds' medians. `floor` is what the messages need on the
busiest way of a link. CPU is of all processes, servers included. Memory is the peak beyond
importing; weights and gradients of the model are in a worker's. `psq` sends 1 bit each way,
`psq-bf16` keeps the workers' residuals in bf16, `psq-default` is `server-adam`, `psq-qadam`
has Adam on the workers, `psq-s2` has 2 servers beside the workers. All torch rows use fused Adam;
`gloo-fp32` is bare all-reduce without DDP."""
CODEC_TEXT = """One thread. Ratios are the time of the in-place memory stream of the same pattern by
that of the kernel, best shard by shard, measured in turns: 1.00 is the speed of memory. The bytes
of the payload are not counted in a stream. `encode` has no stream of its pattern. Two threads:
speed by that of one, best (median)."""
SERVER_TEXT = """Decode-sum of all workers' payloads, Adam, and the answer with the server's error
feedback, in one pass, by the in-place stream (`r3w3`, `r4w4`). `passes` is the time of the same
step as separate passes by that of one: shard by shard, and in the second table over whole
vectors."""
SCALING_TEXT = """All processes share the cores that the title names: beyond as many processes, the
time of a step on loopback and on a fast link says how cores are shared, not how psq scales. One
server has a machine of its own; 2 and 4 stand beside the first workers. `floor` shows what
more servers save where links are the limit."""
MEMORY_TEXT = """Peak resident memory of the largest worker and server, beyond what importing
took, in bytes per parameter. `overhead` is a worker's without the model's weights and gradients (8
bytes). A server's staged payloads are in its figure, and beside it."""
VERBS = ("encode_ef", "encode_bf16", "encode", "decode", "decode_add")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first `words` columns are words; the others are figures."""
    rule = "|" + "---|" * words + "--:|" * (len(head) - words)
    lines = [f"| {' | '.join(head)} |", rule]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def joined(results: Any, one: Any) -> str:
    return "\n\n".join(one(result).strip() for result in results)


# ---- tables that the benches make themselves


def step(results: Any) -> str:
    import step as bench  # noqa: PLC0415 - scripts of this folder, each with its own imports

    return joined(results, bench.table)


def scaling(results: Any) -> str:
    import scaling as bench  # noqa: PLC0415

    return joined(results, bench.table)


def memory(result: Any) -> str:
    import memory as bench  # noqa: PLC0415

    return bench.table(result)


def advise(results: Any) -> str:
    import advise as bench  # noqa: PLC0415

    return joined(results, bench.table)


def accuracy(runs: Any) -> str:
    import accuracy as bench  # noqa: PLC0415
    from reporting.judge import ACCURACY  # noqa: PLC0415

    return bench.table(runs, ACCURACY).strip()


def transport(rows: Any) -> str:
    import transport as bench  # noqa: PLC0415

    return bench.table(rows)


def links(rows: Any) -> str:
    import netns as bench  # noqa: PLC0415

    return bench.table(rows)


def straggler(rows: Any) -> str:
    import straggler as bench  # noqa: PLC0415

    return bench.table(rows)


def package(result: Any) -> str:
    import package as bench  # noqa: PLC0415

    return bench.table(result)


# ---- tables made here


def codecs(result: Any) -> str:
    """A row for each codec and level."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["codec"], row["level"]), {})[row["verb"]] = row
    streams = ", ".join(f"{name} {speed:.2f}" for name, speed in result["streams"].items())
    head = ("codec", "level", *(f"{verb} G/s" for verb in VERBS), *ratio_heads())
    rows = [(*key, *rates(verbs), *ratios(verbs)) for key, verbs in found.items()]
    return f"Streams, G elements/s: {streams}.\n\n{markdown(head, rows, words=2)}"


def ratio_heads() -> list[str]:
    return [f"{verb} / stream" for verb in VERBS if verb != "encode"]


def rates(verbs: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{verbs[verb]['gelements_s']:.2f}" if verb in verbs else "" for verb in VERBS]


def ratios(verbs: dict[str, dict[str, Any]]) -> list[str]:
    shown = [verb for verb in VERBS if verb != "encode"]
    return [f"{verbs[verb]['ratio']:.2f}" if verb in verbs else "" for verb in shown]


def two_threads(rows: Any) -> str:
    head = ("codec", "level", "two threads by one: best", "median")
    body = [(r["codec"], r["level"], f"{r['best']:.2f}", f"{r['median']:.2f}") for r in rows]
    return markdown(head, body, words=2)


def worker(result: Any) -> str:
    head = ("Adam and push on the worker", "level", "residual", "G/s", "of r4w3", "passes / fused")
    body = [
        (
            row["codec"],
            row["level"],
            row["residual"],
            f"{row['gelements_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['passes']:.2f}",
        )
        for row in result["rows"]
    ]
    return markdown(head, body, words=3)


def adam(result: Any) -> str:
    head = ("Adam alone", "G/s", "of its stream", "stream")
    body = [
        (name, f"{result['gelements_s'][name]:.2f}", f"{ratio:.2f}", stream)
        for name, (stream, ratio) in result["ratios"].items()
    ]
    return markdown(head, body)


def server(result: Any) -> str:
    head = ("step", "ms", "best", "median", "stream", "passes / fused")
    body = [
        (
            row["case"],
            f"{row['ms']:.1f}",
            f"{row['best']:.2f}",
            f"{row['median']:.2f}",
            row["stream"],
            f"{row['passes']:.2f}",
        )
        for row in result["cases"]
    ]
    torch = result["torch"]
    said = (
        torch
        if isinstance(torch, str)
        else "{step}: {best:.2f} (median {median:.2f}).".format(**torch)
    )
    return f"{result['numel']:,} values.\n\n{markdown(head, body)}\n\n{said}"


def timeline(result: Any) -> str:
    """Whatever figures it has."""
    if not isinstance(result, dict):
        return str(result)
    figures = [
        (name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
        for name, value in result.items()
    ]
    return markdown(("", ""), figures)


# ---- the summary at the top


def summary(results: dict[str, Any], rates_shown: Sequence[str]) -> str:
    """Times faster than what one could pick instead, at 25 M: best, and medians."""
    peers = ("ddp-fp32", "ddp-bf16", "powersgd-1")
    head = ("25 M values, 2 workers", "psq's step, ms", *(f"times faster than {p}" for p in peers))
    body = []
    for rate in rates_shown:
        kept = results.get(f"step-{rate}-25M")
        rows = {} if not kept or kept["error"] else rows_of(kept["result"])
        ours = rows.get("psq")
        if ours is None:
            body.append((rate, "not measured", *[""] * len(peers)))
            continue
        body.append((rate, f"{1e3 * ours['best_s']:.1f}", *(times(rows.get(p)) for p in peers)))
        if "psq-s2" in rows:
            beside = rows["psq-s2"]
            figures = [times(rows.get(p), beside) for p in peers]
            body.append((f"{rate}, 2 servers", f"{1e3 * beside['best_s']:.1f}", *figures))
    return markdown(head, body)


def rows_of(step_tables: Any) -> dict[str, dict[str, Any]]:
    """The rows that were measured, by system."""
    return {
        row["system"]: row
        for table in step_tables
        for row in table.get("rows", [])
        if "failure" not in row
    }


def times(peer: dict[str, Any] | None, ours: dict[str, Any] | None = None) -> str:
    """Best by best, and the medians in brackets."""
    if peer is None:
        return ""
    if ours is None:
        return f"{peer['faster_best']:.1f} ({peer['faster_median']:.1f})"
    best, median = peer["best_s"] / ours["best_s"], peer["median_s"] / ours["median_s"]
    return f"{best:.1f} ({median:.1f})"
