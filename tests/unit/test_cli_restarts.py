"""What becomes of a process that died: another try, a job without it, or the end."""

from __future__ import annotations

import pytest

from psq_worker.restarts import Restarts

WORKERS = ("rank 0", "rank 1", "rank 2", "rank 3")


class View:
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, _who, text):
        self.lines.append(text)


class Processes:
    """Children with these codes; None: they run."""

    def __init__(self, *codes):
        self._codes = {**dict(zip(WORKERS, codes, strict=True)), "server": None}
        self.started = []

    def code(self, name):
        return self._codes[name]

    def running(self, *names):
        return any(self._codes[name] is None for name in names)

    def start(self, name, *_words, **_more):
        self.started.append(name)


def restarts_of(least, allowed=0):
    lost = {}
    made = Restarts(
        allowed,
        View(),
        servers=("server",),
        workers=WORKERS,
        least=least,
        on_lost=lost.__setitem__,
    )
    made.orders["rank 3"] = lambda: (["train"], {}, False)
    return made, lost


@pytest.mark.parametrize(
    ("least", "codes", "goes_on"),
    [
        (None, (None, None, None, 9), False),
        (3, (None, None, None, 9), True),
        (3, (None, None, 9, 9), False),
        (3, (0, 0, None, 9), False),  # one is there, and two that are not done are needed
        (1, (0, 0, None, 9), True),
        (3, (0, 0, 0, 9), True),  # whoever is done ends the job
        (3, (9, 9, 9, 9), False),
        (1, (9, 9, 9, 9), False),
    ],
)
def test_a_job_goes_on_while_so_many_are_there_as_its_rounds_need(least, codes, goes_on):
    restarts, lost = restarts_of(least)
    why = restarts.revive(Processes(*codes), "rank 3", 9)
    assert (why is None) == goes_on
    assert lost == ({"rank 3": 9} if goes_on else {})


def test_it_is_said_how_many_are_left_and_why_nobody_came_again():
    restarts, _ = restarts_of(2, allowed=1)
    children = Processes(None, 0, None, 137)
    assert restarts.revive(children, "rank 3", 137) == ""
    assert children.started == ["rank 3"]
    assert restarts.revive(children, "rank 3", 137) is None
    assert restarts.view.lines[-1] == (
        "rank 3 was killed by SIGKILL, given up after 1 restarts (--max-restarts): "
        "the job goes on with 3 of 4 workers (--min-workers 2)"
    )


def test_no_job_goes_on_without_its_server():
    restarts, lost = restarts_of(1)
    assert restarts.revive(Processes(None, None, None, None), "server", 9) is not None
    assert not lost
