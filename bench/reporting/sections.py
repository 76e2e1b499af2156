"""What the page has, section by section: the commands, and how their JSON becomes tables.

A section that no command could measure is still there, and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reporting import tables
from reporting.runs import Run

from psq import kernels

LEVELS = ",".join(level for level in kernels.available() if level != "reference") or "reference"
TOP = kernels.available()[0]
EVERY = "psq,psq-bf16,psq-default,psq-qadam"
LEAN = "psq,psq-default,ddp-fp32,ddp-bf16,powersgd-1"
PEERS = "ddp-fp32,gloo-fp32,ddp-bf16,ddp-fp16,powersgd-1"  # all that run at once must fit memory
OTHERS = "psq,powersgd-2,powersgd-4,mxnet-2bit,ray,onebit-adam"
SLOW = "psq-s2,ddp-fp32,ddp-bf16,powersgd-1,powersgd-2,powersgd-4"
RATES = ("loopback", "10gbit", "1gbit", "100mbit")
SMALL = "--rounds 3 --seconds 0.5"
TWO_THREADS = "sign log:k=2 log:k=6 uniform:bits=4,stochastic=true lloyd-max:bits=4,block=256"

ToTables = Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of the page.

    Attributes:
        text: what the reader should know before the tables.
        runs: the commands, in the order they are run and shown.
        shown: how each run's JSON is shown; one for all, or one each.
    """

    name: str
    title: str
    text: str
    runs: tuple[Run, ...]
    shown: tuple[ToTables, ...]

    def table_of(self, index: int) -> ToTables:
        return self.shown[index if len(self.shown) > 1 else 0]

    @property
    def expected_s(self) -> float:
        return sum(run.expected_s for run in self.runs)


def step(  # noqa: PLR0913 - a line of the table below
    rate: str, size: str, systems: str, words: str, expected_s: float, *, more: str = ""
) -> Run:
    return Run(
        f"step-{rate}-{size}{more}",
        f"step.py --rates {rate} --sizes {size} --systems {systems} {words}",
        f"step.py --rates {rate} --sizes 1M --systems psq,ddp-fp32 --rounds 2 --seconds 0.2",
        expected_s,
        takes_cache=True,
    )


STEPS = (
    *(step(rate, "1M", LEAN, SMALL, 35) for rate in RATES[:3]),
    step("100mbit", "1M", LEAN, SMALL, 40),
    *(step(rate, "11.7M", LEAN, SMALL, 40) for rate in RATES[:2]),
    step("1gbit", "11.7M", LEAN, "--rounds 3 --seconds 1", 45),
    step("100mbit", "11.7M", LEAN, "--rounds 2 --seconds 1 --least-steps 1", 70),
    step("loopback", "25M", f"{EVERY},{PEERS}", "--rounds 5 --seconds 1", 110),
    step("loopback", "25M", OTHERS, "--rounds 2 --seconds 1", 75, more="-others"),
    step("10gbit", "25M", LEAN, "--rounds 5 --seconds 1", 60),
    step("1gbit", "25M", f"{EVERY},{SLOW}", "--rounds 3 --seconds 1 --least-steps 1", 100),
    step(
        "100mbit",
        "25M",
        "psq,psq-s2,psq-default,ddp-fp32,ddp-bf16,powersgd-1,powersgd-4",
        "--rounds 2 --seconds 2 --least-steps 1",
        190,
    ),
)

SECTIONS = (
    Section(
        "step",
        "Step time",
        tables.STEP_TEXT,
        STEPS,
        (tables.step,),
    ),
    Section(
        "accuracy",
        "Time to accuracy over 100 Mbit/s",
        "Real training on Fashion-MNIST; the time of scoring is not counted. Systems that have "
        "trained for longer than the stated limit take no more steps.",
        (
            Run(
                "accuracy",
                "accuracy.py --rate 100mbit --target 0.88 --give-up-s 45",
                "accuracy.py --steps 64 --systems psq-local-8,powersgd-1",
                330,
                writes_file=True,
            ),
        ),
        (tables.accuracy,),
    ),
    Section(
        "codecs",
        "Codecs and worker kernels",
        tables.CODEC_TEXT,
        (
            Run(
                "codecs",
                f"codec.py --levels {LEVELS} --rounds 9",
                f"codec.py --levels {LEVELS} --rounds 1 --numel 1048576",
                70,
            ),
            Run(
                "two-threads",
                f'codec.py --halves --rounds 9 --verbs encode_ef --codecs "{TWO_THREADS}"',
                f"codec.py --halves --rounds 1 --numel 2097152 --verbs encode_ef "
                f'--codecs "{TWO_THREADS}"',
                8,
            ),
            Run(
                "worker",
                f"worker.py --levels {LEVELS} --rounds 9",
                "worker.py --rounds 1 --numel 1048576",
                20,
            ),
            Run(
                "adam",
                f"optim.py --levels {LEVELS} --rounds 9",
                "optim.py --rounds 1 --numel 1048576",
                12,
            ),
        ),
        (tables.codecs, tables.two_threads, tables.worker, tables.adam),
    ),
    Section(
        "server",
        "The server's step",
        tables.SERVER_TEXT,
        (
            Run(
                "server",
                f"server.py --levels {LEVELS} --rounds 9",
                "server.py --rounds 1 --numel 1048576",
                80,
            ),
            Run(
                "server-whole",
                "server.py --rounds 7 --uplinks sign --workers 2 --shard 25000000",
                "server.py --rounds 1 --uplinks sign --workers 2 --numel 1048576",
                8,
            ),
        ),
        (tables.server,),
    ),
    Section(
        "scaling",
        "More workers, more servers",
        tables.SCALING_TEXT,
        (
            Run(
                "scaling",
                "scaling.py --size 1M --rounds 2 --seconds 0.5",
                "scaling.py --quick",
                180,
                takes_cache=True,
            ),
        ),
        (tables.scaling,),
    ),
    Section(
        "memory",
        "Memory",
        tables.MEMORY_TEXT,
        (Run("memory", "memory.py", "memory.py --quick", 75, takes_cache=True),),
        (tables.memory,),
    ),
    Section(
        "transport",
        "Transport and links",
        "psq's links beside a plain TCP socket, on loopback; then the links that the other "
        "sections are measured over, as one TCP stream sees them.",
        (
            Run(
                "transport",
                "transport.py --megabytes 256 --rounds 5",
                "transport.py --megabytes 16 --rounds 1",
                10,
            ),
            Run("links", "netns.py --seconds 1", "netns.py --rates 1gbit --seconds 0.3", 12),
        ),
        (tables.transport, tables.links),
    ),
    Section(
        "straggler",
        "One worker four times slower",
        "Rounds a second with the slow worker by those without it.",
        (
            Run(
                "straggler",
                "straggler.py --rules bsp,,ssp:8 --seconds 6 --repeats 2",
                "straggler.py --rules ssp:8 --workers 2 --seconds 2 --repeats 1 --compute 0.1",
                110,
            ),
        ),
        (tables.straggler,),
    ),
    Section(
        "advise",
        "psq advise and codec=auto",
        "`model` is the predicted time of a step by the best that was measured.",
        (
            Run(
                "advise",
                "advise.py --cases 100mbit:1M,1gbit:11.7M,10gbit:25M,25gbit:25M --rounds 3 "
                "--seconds 0.5",
                "advise.py --quick",
                220,
            ),
        ),
        (tables.advise,),
    ),
    Section(
        "timeline",
        "What a timeline costs",
        "Steps with a timeline by steps without, in turns.",
        (
            Run(
                "timeline",
                "timeline.py --rounds 9 --steps 40",
                "timeline.py --size 1M --rounds 1 --steps 8",
                40,
            ),
        ),
        (tables.timeline,),
    ),
    Section(
        "package",
        "The package",
        "Its size, building it, importing it, and the bits of every level.",
        (Run("package", "package.py", "package.py --repeats 2 --quick", 50),),
        (tables.package,),
    ),
)
