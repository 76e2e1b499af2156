"""A worker's part of a timeline: written once, when the worker leaves."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from psq.client import Client
from psq.errors import StateError
from psq.timeline import Process, Timeline, check_writable, write_part

__all__ = ["begin_recording", "write_recording"]

_log = logging.getLogger("psq.torch")


def begin_recording(filename: str | None) -> Timeline | None:
    """A timeline, if it is to go to a file.

    Raises:
        StateError: it could not be written there.
    """
    if filename is None:
        return None
    check_writable(Path(filename))
    return Timeline()


def write_recording(path: Path, recorder: Timeline, client: Client, *, must_work: bool) -> None:
    """Write what was recorded, beside `path`.

    Raises:
        StateError: it cannot be written; only logged unless it `must_work`, since after an error of
            the worker there is a worse one to hear of.
    """
    process, job = Process("rank", client.rank), f"{client.plan.job_digest:016x}"
    offsets = [
        {"server": server, **asdict(offset)}
        for server, offset in enumerate(client.clock_offsets)
        if offset is not None
    ]
    try:
        written = write_part(path, recorder, process, job=job, offsets=offsets)
    except StateError as error:
        if must_work:
            raise
        _log.error("%s", error)
        return
    if lost := recorder.lost_spans:
        _log.info("%s holds the end of the job: %d spans before are lost", written, lost)
