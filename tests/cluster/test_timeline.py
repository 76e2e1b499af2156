"""psq launch --timeline-filename: one trace of real processes, however the job ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest

from psq.timeline import Phase, Process, Timeline, write_part

DEADLINE_S = 90.0
SLACK_US = 1.0  # times in the file are rounded to nanoseconds
WORKER_PHASES = {"compute", "encode", "push", "decode", "zero", "wait"}
SERVER_PHASES = {"receive", "reduce", "broadcast", "wait"}
STEPS = 6

# Trains a model of many shards; the rank that is named ends itself before its last step.
TRAIN = """
import os
import signal
import sys
import torch
import psq.torch

torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6)))
steps, victim = int(sys.argv[1]), int(sys.argv[2])
with psq.torch.Worker(model, lr=0.01) as ps:
    for step in range(steps):
        if ps.rank == victim and step == steps - 1:
            if sys.argv[3] == "raise":
                raise RuntimeError("a fault of the script")
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.ones(4, 512)).square().mean().backward()
        ps.step()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def run(folder, *words, **variables):
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PSQ_")}
    return subprocess.run(
        [sys.executable, "-m", "psq_worker.cli", *words],
        cwd=folder,
        env={**kept, "COLUMNS": "100", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def spans_of(path):
    """Spans by process and phase."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found = defaultdict(lambda: defaultdict(list))
    for event in events:
        if event["ph"] == "X":
            found[names[event["pid"]]][event["name"]].append(event)
    return found


def end(span):
    return span["ts"] + span["dur"]


def one(spans, **args):
    """The first of these spans with these arguments."""
    return next(s for s in spans if args.items() <= s["args"].items())


@pytest.mark.parametrize("overlap", ["--overlap", "--no-overlap"])
def test_a_launched_job_leaves_one_trace_of_every_process_phase_and_shard(folder, overlap):
    words = ["-n", "2", "-s", "2", overlap, "--timeline-filename", "t.json"]
    result = run(folder, "launch", *words, "train.py", "--", str(STEPS), "-1")
    assert result.returncode == 0, result.stderr
    assert "timeline in t.json" in result.stderr
    assert [path.name for path in folder.glob("t*.json")] == ["t.json"]
    spans = spans_of(folder / "t.json")
    assert set(spans) == {"rank 0", "rank 1", "server 0", "server 1"}
    for process, phases in spans.items():
        assert set(phases) == (WORKER_PHASES if process.startswith("rank") else SERVER_PHASES)
    owners = {
        s["args"]["shard"]: process
        for process in ("server 0", "server 1")
        for s in spans[process]["reduce"]
    }
    assert set(owners.values()) == {"server 0", "server 1"}
    assert min(s["ts"] for phases in spans.values() for p in phases.values() for s in p) == 0.0
    for shard, owner in owners.items():
        for step in range(STEPS):
            check_chain(spans, owner, shard, step)


def check_chain(spans, owner, shard, step):
    """One shard's way through one round: each stage begins after what it needs has begun."""
    at = {"shard": shard, "round": step}
    reduced = one(spans[owner]["reduce"], **at)
    broadcast = one(spans[owner]["broadcast"], **at)
    assert end(reduced) <= broadcast["ts"] + SLACK_US
    for rank in (0, 1):
        worker = spans[f"rank {rank}"]
        encoded, pushed = one(worker["encode"], **at), one(worker["push"], **at)
        received = one(spans[owner]["receive"], rank=rank, **at)
        assert end(encoded) <= pushed["ts"] + SLACK_US
        assert pushed["ts"] <= received["ts"] + SLACK_US
        assert end(received) <= reduced["ts"] + SLACK_US
        assert broadcast["ts"] <= one(worker["decode"], **at)["ts"] + SLACK_US


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_failed_job_leaves_a_trace_of_those_who_could_write(folder, how):
    words = ["launch", "-n", "2", "-s", "2", "train.py", "--", str(STEPS), "1", how]
    result = run(folder, *words, PSQ_TIMELINE_FILENAME="t.json")
    assert result.returncode == (1 if how == "raise" else 137), result.stderr
    survivors = {"rank 0", "server 0", "server 1"} | ({"rank 1"} if how == "raise" else set())
    spans = spans_of(folder / "t.json")
    assert survivors - {"rank 0"} <= set(spans) <= survivors
    assert [path.name for path in folder.glob("t*.json")] == ["t.json"]
    missing = re.search(r", without ([^:]*):", result.stderr)
    named = set(missing[1].split(", ")) if missing else set()
    assert named == {"rank 0", "rank 1", "server 0", "server 1"} - set(spans)
    if "rank 0" not in spans:  # it was told to end while it waited: there is not always time
        return
    rounds = {s["args"]["round"] for s in spans["rank 0"]["encode"]}
    assert rounds == set(range(STEPS))  # the last was said and never answered


def test_a_trace_that_cannot_be_written_is_refused_before_anything_starts(folder):
    words = ["launch", "--timeline-filename", "missing/t.json", "train.py", "--", "2", "-1"]
    result = run(folder, *words)
    assert result.returncode == 65
    assert "cannot write a timeline to missing/t.json" in result.stderr
    assert " on tcp://" not in result.stderr


def test_parts_are_merged_by_hand_and_kept(folder):
    for number in range(2):
        recorder = Timeline()
        recorder.add(Phase.ENCODE, 1.0 + number, end_s=3.0, shard=number)
        write_part(folder / "t.json", recorder, Process("rank", number), job="abc")
    parts = ["t.rank0.json", "t.rank1.json"]
    result = run(folder, "merge-timeline", *parts, "-o", "all.json")
    assert result.returncode == 0, result.stderr
    assert "all.json: 2 events of 2 processes" in result.stderr
    spans = spans_of(folder / "all.json")
    assert [phases["encode"][0]["ts"] for phases in spans.values()] == [0.0, 1e6]
    assert all((folder / part).exists() for part in parts)
    again = run(folder, "merge-timeline", "all.json", "-o", "more.json")
    assert again.returncode == 65
    assert "is no part of a timeline" in again.stderr
