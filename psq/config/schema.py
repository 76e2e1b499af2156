"""Every setting of psq, its unit, range and default: the one place where they are written.

A field's last word is its unit (`_s` seconds); the flag, the variable and the TOML key leave it
out. Whatever a process may be told is here; `psq.config.sources` says who wins when it is told
twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from psq.config.setting import COMMA, check_fields, setting, switch
from psq.config.simulation import SimulateConfig
from psq.errors import ConfigError
from psq.recipe import MAX_EVERY, MAX_LOCAL_STEPS
from psq.schedules import parse_schedule

__all__ = [
    "AUTO_RECIPE",
    "DEFAULT_ENDPOINT",
    "DEFAULT_LR",
    "DEFAULT_PORT",
    "DEFAULT_RECIPE",
    "DEFAULT_ROUND_TRIP_MS",
    "MAX_PORT",
    "TABLES",
    "AdviseConfig",
    "DemoConfig",
    "LaunchConfig",
    "ServerConfig",
    "SimulateConfig",
    "WorkerConfig",
    "is_loopback",
]

DEFAULT_PORT: Final = 5555
DEFAULT_RECIPE: Final = "shared-adam"
AUTO_RECIPE: Final = "server-adam"
"""Whose codecs `codec=auto` chooses."""
DEFAULT_LR: Final = 1e-3  # where neither a person nor a task says one
DEFAULT_ENDPOINT: Final = f"tcp://127.0.0.1:{DEFAULT_PORT}"
RATE_SCHEDULES: Final = ("constant", "linear", "cosine")  # beside factors, see psq.schedules
DEFAULT_GRACE_S: Final = 10.0
MAX_PORT: Final = 65_535
MAX_WORLD_SIZE: Final = 4096
MAX_LOCAL_WORKERS: Final = 256
MAX_LOCAL_SERVERS: Final = 64
MAX_NUMEL: Final = 10**11
DEFAULT_ROUND_TRIP_MS: Final = 0.2  # machines of one Ethernet
MAX_STEPS: Final = 1_000_000_000
MAX_SEED: Final = 2**32 - 1
MAX_WAIT_S: Final = 30 * 86_400.0
_HOST: Final = re.compile(r"\*|[\w.-]+|\[[\w:.%]+\]")  # any, a name or IPv4, IPv6
_TIMELINE_WORDS: Final = (
    "record where the time goes and write it as a Chrome trace; of t.json each process writes its "
    "part, as t.rank0.json or t.server0.json; psq launch makes t.json of them"
)
LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What one `psq-server` process is told."""

    bind: str = setting(
        DEFAULT_ENDPOINT, "address workers connect to; port 0 takes a free one", metavar="URL"
    )
    world_size: int | None = setting(
        None,
        "accept only jobs of so many workers (default: the first worker says)",
        low=1,
        high=MAX_WORLD_SIZE,
    )
    recipe: str | None = setting(
        None, "accept only jobs of this recipe (default: the first worker says)", metavar="NAME"
    )
    parent: str | None = setting(
        None,
        "be an aggregator: add up what the --children push, and push one message to the server "
        "there",
        metavar="URL",
    )
    children: str | None = setting(
        None,
        "ranks of the workers that connect here, as in 0,1,2; in 0-3,4-7 two aggregators do, each "
        "for so many workers (default: all ranks, each for itself)",
        metavar="RANK[-LAST],...",
        many=True,
    )
    save: str | None = setting(None, "write the final weights here, as safetensors", metavar="FILE")
    state_dir: str | None = setting(
        None,
        "keep the job here, and go on with the one that is there: a killed server loses nothing",
        metavar="FOLDER",
    )
    durability: Literal["auto", "journal", "replay", "checkpoint", "off"] = setting(
        "auto",
        "what of the job is in --state-dir: each round before anybody hears of it (journal); that "
        "without payloads, which workers keep since the last checkpoint and say again (replay); or "
        "checkpoints, and what came after the last one is lost; auto: journal for rounds of up to "
        "16 MB, else checkpoint",
    )
    checkpoint_every: int | None = setting(
        None,
        "rounds from one checkpoint to the next at most (default: only time says)",
        low=1,
        high=MAX_STEPS,
    )
    checkpoint_s: float = setting(
        60.0,
        "time from one checkpoint to the next at most, s",
        key="checkpoint_seconds",
        above=0,
        high=MAX_WAIT_S,
    )
    keep_checkpoints: int = setting(2, "how many checkpoints stay", low=2, high=1000)
    checkpoint_url: str | None = setting(
        None,
        "copy each checkpoint there as well, as in s3://bucket/job; needs psq-train[remote]",
        metavar="URL",
    )
    lease_s: float = setting(
        10.0, "silence after which a worker counts as lost, s", key="lease", above=0, high=3600
    )
    min_workers: int | None = setting(
        None,
        "go on without workers that are lost, as long as so many are there (default: wait for "
        "every rank, by name)",
        low=1,
        high=MAX_WORLD_SIZE,
    )
    grace_s: float = setting(
        DEFAULT_GRACE_S,
        "with --min-workers: how long those that have not come are waited for, from the first "
        "worker's join after the server's start, s",
        key="grace",
        low=0,
        high=3600,
    )
    give_up_after_s: float = setting(
        900.0,
        "end with code 75 when a wait lasts longer, s",
        key="give_up_after",
        above=0,
        high=MAX_WAIT_S,
    )
    keys: str | None = setting(
        None,
        "encrypt, and let in only workers whose keys are there: a folder that psq keygen made, or "
        "the folder server in it",
        metavar="FOLDER",
    )
    metrics_host: str = setting("127.0.0.1", "address of /metrics and /healthz", metavar="HOST")
    metrics_port: int = setting(
        0, "port of /metrics and /healthz; 0 takes a free one", low=0, high=MAX_PORT
    )
    insecure_plaintext: bool = switch(
        "allow an address other than loopback although nothing is encrypted and anybody may join"
    )
    timeline_filename: str | None = setting(None, _TIMELINE_WORDS, metavar="FILE")
    json: bool = switch("end with a summary as one JSON line on stdout")
    debug: bool = switch("show a traceback with an error")

    def __post_init__(self) -> None:
        """Types, ranges, and the form of the address."""
        check_fields(self)
        _check_endpoint("bind", self.bind, allow_any_port=True)
        if self.parent is not None:
            _check_endpoint("parent", self.parent, allow_any_port=False)
        _check_elastic(self)
        if self.insecure_plaintext and self.keys is not None:
            msg = "insecure_plaintext: with keys nothing is plaintext: leave one of both out"
            raise ConfigError(msg)
        if not (self.insecure_plaintext or self.keys or is_loopback(self.bind)):
            msg = (
                f"bind: {self.bind} can be reached from other machines and nothing is encrypted: "
                "make keys with psq keygen and name their folder with --keys, bind a loopback "
                "address, or allow it with --insecure-plaintext on a network you trust"
            )
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What one worker is told: by `psq-worker`, or by a script that makes a `psq.torch.Worker`."""

    connect: str = setting(
        DEFAULT_ENDPOINT,
        "the server's address; of several servers all, in the same order for every worker",
        metavar="URL[,URL...]",
        many=True,
        cluster=("MASTER_ADDR",),
    )
    rank: int = setting(
        0,
        "this worker's number, from 0",
        low=0,
        high=MAX_WORLD_SIZE - 1,
        cluster=("RANK", "SLURM_PROCID"),
    )
    world_size: int = setting(
        1,
        "how many workers the job has",
        low=1,
        high=MAX_WORLD_SIZE,
        cluster=("WORLD_SIZE", "SLURM_NTASKS"),
    )
    keys: str | None = setting(
        None,
        "encrypt, and talk to the server with this key only: a folder that psq keygen made, or the "
        "folder rank0, rank1 ... in it",
        metavar="FOLDER",
    )
    task: str = setting(
        "fashion-mnist",
        "fashion-mnist, fashion-resnet, char-lm, or MODULE:ATTRIBUTE of your own",
        metavar="TASK",
    )
    recipe: str = setting(
        DEFAULT_RECIPE,
        "the algorithm, such as server-adam, qadam-1bit or fp32; psq recipes lists them all",
        metavar="NAME",
    )
    options: str | None = setting(
        None,
        "an option or another kind of a part of the recipe, as in aggregate.f=2 or aggregate=krum; "
        "may be given several times; psq recipes NAME lists what there is",
        key="with",
        metavar="SLOT.OPTION=VALUE",
        repeat=True,
    )
    uplink: str | None = setting(
        None,
        "codec of the pushes: sign, log:k=6, uniform:bits=4, lloyd-max:bits=3, topk:k=8, bf16, "
        "fp32 ... (default: the recipe's)",
        metavar="CODEC",
    )
    downlink: str | None = setting(
        None,
        "codec of the answers, as in delta:sign or weights:uniform:bits=8 (default: the recipe's)",
        metavar="CODEC",
    )
    local_steps: int | None = setting(
        None,
        "steps that a worker takes on its own weights for each one that it pushes, that one "
        "included; for Adam on the workers (default: the recipe's)",
        low=1,
        high=MAX_LOCAL_STEPS,
    )
    every: int | None = setting(
        None,
        "push each shard in every Nth step only, in rotation (default: the recipe's)",
        low=1,
        high=MAX_EVERY,
    )
    adam: str | None = setting(
        None,
        "Adam's settings, as in \"beta=0.95,weight_decay=0.01\" (default: the recipe's)",
        metavar="NAME=VALUE,...",
    )
    consistency: str = setting(
        "bsp",
        "how many rounds workers may be apart: bsp (none), ssp:K (K) or asp (any number); bsp and "
        "ssp take ,quorum=Q (Q pushes close a round) and ,mads=X (once the others are late by X "
        "median deviations)",
        metavar="RULE",
    )
    overlap: bool = switch("push gradients while backward still runs")
    residual: Literal["f32", "bf16"] = setting(
        "f32", "how error feedback keeps what was not sent: 4 bytes per parameter, or 2"
    )
    codec: Literal["recipe", "auto"] = setting(
        "recipe",
        "the recipe's codecs, or those that suit the link and the machine best: rank 0 measures "
        "and chooses for all, see psq advise",
    )
    lr: float | None = setting(
        None, f"learning rate (default: the task's, or {DEFAULT_LR:g})", above=0, high=1e6
    )
    steps: int | None = setting(None, "steps to train (default: the task's)", low=1, high=MAX_STEPS)
    batch_size: int | None = setting(
        None, "samples per worker and step (default: the task's)", low=1, high=1_000_000
    )
    eval_every: int | None = setting(
        None, "steps between two evaluations by rank 0 (default: the task's)", low=1, high=MAX_STEPS
    )
    schedule: str | None = setting(
        None,
        "how the learning rate goes on: constant, linear or cosine (down to 0), or a factor for "
        "each step: power:1:0.5 for 1 / t^0.5, NAME:NUMBER for a schedule of your own (default: "
        "the task's)",
        metavar="constant|linear|cosine|FACTOR",
    )
    seed: int = setting(0, "seed of initial weights, data order and codecs", low=0, high=MAX_SEED)
    data: str | None = setting(None, "folder with the task's full data set", metavar="FOLDER")
    give_up_after_s: float = setting(
        900.0,
        "end with code 75 when a wait lasts longer, s",
        key="give_up_after",
        above=0,
        high=MAX_WAIT_S,
    )
    state_dir: str | None = setting(
        None,
        "keep here, and in shared memory, what another process needs to go on when this one is "
        "killed: residuals, moments, random numbers, what was being sent",
        metavar="FOLDER",
    )
    progress: Literal["text", "json", "none"] = setting(
        "text", "how to report while training: words on stderr, JSON lines on stdout, or not"
    )
    progress_every_s: float | None = setting(
        None,
        "least time between two reports, s (default: 5 for text, 0.2 for json)",
        key="progress_every",
        low=0,
        high=3600,
    )
    timeline_filename: str | None = setting(None, _TIMELINE_WORDS, metavar="FILE")
    json: bool = switch("end with a summary as one JSON line on stdout")
    debug: bool = switch("show a traceback with an error")

    def __post_init__(self) -> None:
        """Types, ranges, and what only makes sense together."""
        check_fields(self)
        _check_connect(self.endpoints)
        if self.rank >= self.world_size:
            msg = (
                f"rank: expected 0 to {self.world_size - 1} in a job of world_size "
                f"{self.world_size}, got {self.rank}"
            )
            raise ConfigError(msg)
        _check_codec(self)
        if self.schedule is not None:
            _check_schedule(self.schedule)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The servers' addresses; a server's number in the job is its place here."""
        return _endpoints(self.connect)

    @property
    def changes(self) -> tuple[str, ...]:
        """What `options` says, one by one."""
        return tuple((self.options or "").split())


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """What `psq launch` and `psq demo` are told beside what they hand on to their processes."""

    workers: int = setting(
        2, "worker processes to start", short="-n", low=1, high=MAX_LOCAL_WORKERS
    )
    servers: int | Literal["auto"] = setting(
        1,
        "server processes to start, each with a share of the model; auto: one per worker, up to "
        "half the cores",
        short="-s",
        low=1,
        high=MAX_LOCAL_SERVERS,
    )
    tree: int | None = setting(
        None,
        "put aggregators between workers and servers, so that each hears so many at most",
        metavar="FANOUT",
        low=2,
        high=MAX_LOCAL_WORKERS,
    )
    max_restarts: int = setting(
        0,
        "with --state-dir: how often each server and worker that dies is started again",
        low=0,
        high=1_000_000,
    )
    json: bool = switch("print the summary as JSON on stdout")
    debug: bool = switch("show a traceback with an error")

    def __post_init__(self) -> None:
        """Types and ranges."""
        check_fields(self)


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """What `psq demo` is told beside all that."""

    output: str = setting("runs", "folder for the picture and the numbers", metavar="FOLDER")

    def __post_init__(self) -> None:
        """Types."""
        check_fields(self)


@dataclass(frozen=True, slots=True)
class AdviseConfig:
    """What `psq advise` is told: a job that is not started."""

    workers: int = setting(2, "workers of the job", short="-n", low=1, high=MAX_WORLD_SIZE)
    servers: int | Literal["auto"] = setting(
        1,
        "servers of the job; auto: one beside each worker, on one machine as psq launch has it",
        short="-s",
        low=1,
        high=MAX_LOCAL_SERVERS,
    )
    connect: str | None = setting(
        None,
        "measure the link to these servers, which may be training or not",
        metavar="URL[,URL...]",
        many=True,
    )
    keys: str | None = setting(
        None, "of the worker that measures: a folder that psq keygen made", metavar="FOLDER"
    )
    link: str | None = setting(
        None,
        "the link of each machine: 100mbit, 2.5gbit, or loopback for one machine (default)",
        metavar="RATE",
    )
    round_trip_ms: float | None = setting(
        None,
        f"of the link given with --link, ms (default: {DEFAULT_ROUND_TRIP_MS:g})",
        low=0,
        high=10_000,
    )
    beside: bool = switch("servers run on the workers' machines, one beside each")
    one_machine: bool = switch("all processes share this machine's cores, whatever the link")
    task: str | None = setting(
        None, "take the model, and the time of forward and backward, from this task", metavar="TASK"
    )
    numel: int | None = setting(None, "values in the model", low=1, high=MAX_NUMEL)
    compute_ms: float | None = setting(
        None, "forward and backward of a step, ms (default: the task's, or 0)", low=0, high=1e7
    )
    overlap: bool = switch("pushes leave while backward still runs")
    min_bits: int = setting(
        3, "fewest bits per value each way: below 3 at the price of accuracy", low=1, high=32
    )
    json: bool = switch("print JSON")
    debug: bool = switch("show a traceback with an error")

    def __post_init__(self) -> None:
        """Types, ranges, and what only makes sense together."""
        check_fields(self)
        _check_connect(self.endpoints)
        for one, other in (("connect", "link"), ("connect", "round_trip_ms"), ("task", "numel")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                msg = f"{other}: {one} says that already: give one of both"
                raise ConfigError(msg)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The servers to measure the link to, if any."""
        return _endpoints(self.connect) if self.connect is not None else ()


TABLES: Final[dict[str, type[Any]]] = {
    "server": ServerConfig,
    "worker": WorkerConfig,
    "launch": LaunchConfig,
    "demo": DemoConfig,
    "advise": AdviseConfig,
    "simulate": SimulateConfig,
}


def _check_elastic(config: ServerConfig) -> None:
    """What goes with going on without workers that are lost."""
    least = config.min_workers
    if least is None:
        if config.grace_s != DEFAULT_GRACE_S:
            msg = "grace: without --min-workers every rank is waited for: set both, or neither"
            raise ConfigError(msg)
        return
    if config.parent is not None or config.children is not None:
        msg = (
            "min_workers: in a tree every child is waited for, since a message of an aggregator is "
            "that of all its workers: leave it out, or connect the workers to one server"
        )
        raise ConfigError(msg)
    if config.world_size is not None and least > config.world_size:
        msg = f"min_workers: expected 1 to {config.world_size}, the --world-size, got {least}"
        raise ConfigError(msg)


def _endpoints(connect: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in connect.split(COMMA))


def _check_schedule(text: str) -> None:
    """One of the words, or a factor that can be computed here."""
    if text in RATE_SCHEDULES:
        return
    words = ", ".join(RATE_SCHEDULES)
    try:
        factor = parse_schedule(text)
    except ConfigError as error:
        msg = f"schedule: expected {words}, or a factor; {error}"
        raise ConfigError(msg) from None
    if factor is None:
        msg = f"schedule: expected {words}, or a factor such as power:1:0.5, got {text!r:.200}"
        raise ConfigError(msg)


def _check_codec(told: WorkerConfig) -> None:
    """What auto chooses cannot be said as well."""
    if told.codec != "auto":
        return
    said: dict[str, object] = {"uplink": told.uplink, "downlink": told.downlink}
    if told.recipe not in {DEFAULT_RECIPE, AUTO_RECIPE}:
        said["recipe"] = told.recipe
    said["recipe's options"] = told.options
    for name, value in said.items():
        if value is not None:
            msg = (
                f"codec: auto chooses the {name}, which is given as {value}: leave one of both out"
            )
            raise ConfigError(msg)


def _check_endpoint(name: str, endpoint: str, *, allow_any_port: bool) -> None:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    low = 0 if allow_any_port else 1
    named = endpoint.startswith("tcp://") and _HOST.fullmatch(host)
    good = named and port.isascii() and port.isdigit()
    if not good or not low <= int(port) <= MAX_PORT:
        msg = (
            f"{name}: expected tcp://HOST:PORT with a port of {low} to {MAX_PORT}, got {endpoint!r}"
        )
        raise ConfigError(msg)


def _check_connect(endpoints: Sequence[str]) -> None:
    """Every address by itself, and each one once: a server has one number in a job."""
    for endpoint in endpoints:
        _check_endpoint("connect", endpoint, allow_any_port=False)
    twice = next((one for one in endpoints if endpoints.count(one) > 1), "")
    if twice:
        msg = f"connect: {twice} stands there twice: each server of a job has one address"
        raise ConfigError(msg)


def is_loopback(endpoint: str) -> bool:
    """Whether only this machine can reach an endpoint such as tcp://127.0.0.1:5555."""
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    numeric = host.replace(".", "").isdigit()  # 127.example.org is somebody else's machine
    return host in LOOPBACK_HOSTS or (numeric and host.startswith("127."))
