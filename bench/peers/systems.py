"""The systems that are compared: how each is started, and the bytes its step must move.

A system is one server machine and W worker machines, or W workers alone. Its processes are started
here and told apart by name; what each does stands in a file of its own beside this one.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.processes import Child, Running, Site
from peers.shapes import numel, shapes_of
from peers.venvs import Venv, python_of
from peers.wire import Transfer, power_sgd_bytes, ring, through_servers

from psq.codec import ShardCodec, get_codec
from psq.link import wire_bytes
from psq.plan import Plan
from psq.presets import preset
from psq.recipe import Recipe
from psq_proto.frames import HEADER_BYTES

HERE = Path(__file__).parent
SERVER = "server"
TORCH = Venv("torch", ("torch==2.13.0", "numpy"))
RAY = Venv("ray", ("ray==2.60.0", "torch==2.13.0", "numpy"))
ONEBIT = Venv(
    "onebit",
    ("torch==2.13.0", "numpy", "wheel", "setuptools>=77.0.3"),
    then=("deepspeed==0.19.6",),  # the last that has 1-bit Adam; its build imports torch
)
MXNET = Venv("mxnet", ("mxnet==1.9.1", "numpy<1.24"), pythons=("3.8", "3.9", "3.10"))
F32 = 4
BYTES = {"bf16": 2, "fp16": 2, "onebit": 1 / 8}
DENSE_WARM_UP = 4  # of PowerSGD and 1-bit Adam: the first two are dense, the third allocates
RAY_PORT = 6379  # of namespaces of our own, where nobody else listens
RAY_STORE_BYTES = 2 << 30


@dataclass(frozen=True)
class Setup:
    """What all systems of a comparison share."""

    size: str
    workers: int
    site: Site
    cache: Path

    @property
    def machines(self) -> list[str]:
        return [f"worker{rank}" for rank in range(self.workers)]

    @property
    def numel(self) -> int:
        return sum(map(numel, shapes_of(self.size)))


@dataclass(frozen=True)
class System:
    """One row.

    Attributes:
        text: what it is, for the table's legend.
        start: starts all of it; on an error what it has started is in `running` all the same.
        transfers: the bytes of one step.
        quiet: it does nothing between steps, so others may be measured while it waits.
        warm_up: steps before the first that counts.
    """

    name: str
    text: str
    start: Callable[[Setup, Running], None]
    transfers: Callable[[Setup], list[Transfer]]
    quiet: bool = True
    warm_up: int = 2


def machines(workers: int) -> list[str]:
    """Every machine that some system uses."""
    return [SERVER, *(f"worker{rank}" for rank in range(workers))]


# ---- psq


@dataclass(frozen=True)
class Psq:
    """A recipe, and where its servers are: one on a machine of its own, or beside the workers."""

    recipe: str
    uplink: str | None = None
    downlink: str | None = None
    beside: int = 0
    residual: str = "f32"

    def start(self, setup: Setup, running: Running) -> None:
        endpoints = self.servers(setup, running)
        env = {"PSQ_RECIPE": self.recipe, "PSQ_RESIDUAL": self.residual}
        env |= {"PSQ_UPLINK": self.uplink} if self.uplink else {}
        env |= {"PSQ_DOWNLINK": self.downlink} if self.downlink else {}
        argv = [sys.executable, str(HERE / "psq_worker.py"), "--connect", ",".join(endpoints)]
        running.ready(workers(setup, running, argv, env))

    def transfers(self, setup: Setup) -> list[Transfer]:
        names = [(f"p{i}", shape) for i, shape in enumerate(shapes_of(setup.size))]
        plan = Plan.of(names, self._recipe(), setup.workers)
        up, down = (
            _message_bytes(plan, codec)
            for codec in (plan.recipe.uplink.codec, plan.recipe.downlink.codec)
        )
        hosts = self._hosts(setup)
        share = [1 / len(hosts)] * len(hosts)
        return through_servers(
            [up * s for s in share], [down * s for s in share], hosts, setup.machines
        )

    def _recipe(self) -> Recipe:
        return preset(self.recipe).with_codecs(uplink=self.uplink, downlink=self.downlink)

    def servers(self, setup: Setup, running: Running) -> list[str]:
        """Start its servers; returns their addresses."""
        return [self._server(setup, running, machine) for machine in self._hosts(setup)]

    def _hosts(self, setup: Setup) -> list[str]:
        return setup.machines[: self.beside] or [SERVER]

    def _server(self, setup: Setup, running: Running, machine: str) -> str:
        bind = f"tcp://{setup.site.address(machine)}:0"
        argv = [sys.executable, "-P", "-m", "psq_server", "--bind", bind, "--insecure-plaintext"]
        server = running.add(Child(setup.site, machine, f"server@{machine}", argv, {}))
        line = server.line()
        server.import_kb = server.peak_kb()
        return next(w for w in line.split() if w.startswith("endpoint=")).removeprefix("endpoint=")


def _message_bytes(plan: Plan, codec: str) -> int:
    payloads = (ShardCodec(get_codec(codec), shard).nbytes for shard in plan.layout.shards)
    return sum(wire_bytes(HEADER_BYTES + nbytes) for nbytes in payloads)


# ---- torch


@dataclass(frozen=True)
class Torch:
    """`torch_ddp.py` with a hook, or `onebit_adam.py`."""

    hook: str

    def start(self, setup: Setup, running: Running) -> None:
        if self.hook == "onebit":
            argv = [str(python_of(ONEBIT, setup.cache)), str(HERE / "onebit_adam.py")]
        else:
            python = python_of(TORCH, setup.cache)
            argv = [str(python), str(HERE / "torch_ddp.py"), "--hook", self.hook]
        env = {"GLOO_SOCKET_IFNAME": setup.site.interface()}
        store = ["--store", f"{setup.site.address('worker0')}:0"]
        first = workers(setup, running, [*argv, *store], env, ranks=[0])
        store = ["--store", first[0].hear("at")["at"]]
        others = workers(setup, running, [*argv, *store], env, ranks=range(1, setup.workers))
        running.ready(first + others)

    def transfers(self, setup: Setup) -> list[Transfer]:
        kind, _, rank = self.hook.partition(":")
        if kind == "powersgd":
            nbytes = float(power_sgd_bytes(shapes_of(setup.size), int(rank)))
        else:
            nbytes = setup.numel * BYTES.get(kind, F32)
        return ring(nbytes, setup.machines)


# ---- MXNet and Ray


@dataclass(frozen=True)
class MxNet:
    """`mxnet_kvstore.py`: scheduler and server on the server's machine."""

    def start(self, setup: Setup, running: Running) -> None:
        python = str(python_of(MXNET, setup.cache))
        address = setup.site.address(SERVER)
        argv = [python, str(HERE / "mxnet_kvstore.py")]
        env = {
            "DMLC_PS_ROOT_URI": address,
            "DMLC_PS_ROOT_PORT": str(free_port()),
            "DMLC_NUM_SERVER": "1",
            "DMLC_NUM_WORKER": str(setup.workers),
            "DMLC_INTERFACE": setup.site.interface(),
        }
        for role in ("scheduler", "server"):
            here = env | {"DMLC_ROLE": role, "DMLC_NODE_HOST": address}
            running.add(Child(setup.site, SERVER, role, argv, here))
        ready = []
        for rank in range(setup.workers):
            here = {"DMLC_ROLE": "worker", "DMLC_NODE_HOST": setup.site.address(f"worker{rank}")}
            ready += workers(setup, running, argv, env | here, ranks=[rank])
        running.ready(ready)

    def transfers(self, setup: Setup) -> list[Transfer]:
        return through_servers([setup.numel / 4], [setup.numel * F32], [SERVER], setup.machines)


@dataclass(frozen=True)
class Ray:
    """`ray_server.py`: on a star each machine is a node of Ray's."""

    def start(self, setup: Setup, running: Running) -> None:
        python = python_of(RAY, setup.cache)
        env = {"PYTHONPATH": str(HERE), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        address = ""
        if setup.site.net is not None:
            address = f"{setup.site.address(SERVER)}:{RAY_PORT}"
            for machine in (SERVER, *setup.machines):
                self._node(setup, running, python.with_name("ray"), machine, env)
        argv = [str(python), str(HERE / "ray_server.py"), "--address", address]
        argv += ["--size", setup.size, "--world-size", str(setup.workers)]
        running.ready([running.add(Child(setup.site, SERVER, "driver", argv, env))])

    def transfers(self, setup: Setup) -> list[Transfer]:
        nbytes = setup.numel * F32
        return through_servers([nbytes], [nbytes], [SERVER], setup.machines)

    @staticmethod
    def _node(
        setup: Setup, running: Running, ray: Path, machine: str, env: Mapping[str, str]
    ) -> None:
        address = setup.site.address(machine)
        head = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
        join = [f"--address={setup.site.address(SERVER)}:{RAY_PORT}"]
        argv = [str(ray), "start", "--block", "--num-cpus=1", f"--node-ip-address={address}"]
        argv += [f'--resources={{"{machine}": 1}}', f"--object-store-memory={RAY_STORE_BYTES}"]
        argv += head if machine == SERVER else join
        node = running.add(Child(setup.site, machine, f"node@{machine}", argv, env))
        while "Ray runtime started" not in node.line():
            pass


def free_port() -> int:
    """A port nobody listens on now, for those who cannot say which one they took."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def workers(
    setup: Setup,
    running: Running,
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    ranks: Sequence[int] | None = None,
) -> list[Child]:
    """Start these ranks (all by default), each on its machine."""
    job = ["--size", setup.size, "--world-size", str(setup.workers)]
    return [
        running.add(
            Child(
                setup.site,
                f"worker{rank}",
                f"worker{rank}",
                [*argv, *job, "--rank", str(rank)],
                env,
            )
        )
        for rank in (range(setup.workers) if ranks is None else ranks)
    ]


def _system(name: str, text: str, how: Psq | Torch | MxNet | Ray, *, quiet: bool = True) -> System:
    dense_first = name.startswith(("powersgd", "onebit"))
    warm_up = DENSE_WARM_UP if dense_first else System.warm_up
    return System(name, text, how.start, how.transfers, quiet, warm_up)


PSQ_1BIT = ("server-adam", "sign", "delta:sign")
SYSTEMS = {
    system.name: system
    for system in (
        _system("psq", "psq, 1 bit up and down, Adam on the server", Psq(*PSQ_1BIT)),
        _system("psq-bf16", "psq, workers' residuals in bf16", Psq(*PSQ_1BIT, residual="bf16")),
        _system("psq-default", "psq, server-adam", Psq("server-adam")),
        _system("psq-qadam", "psq, recipe qadam-1bit", Psq("qadam-1bit")),
        _system("psq-s1", "psq, the server beside worker 0", Psq(*PSQ_1BIT, beside=1)),
        _system("psq-s2", "psq, 2 servers beside workers", Psq(*PSQ_1BIT, beside=2)),
        _system("psq-s4", "psq, 4 servers beside workers", Psq(*PSQ_1BIT, beside=4)),
        _system("ddp-fp32", "torch DDP over gloo", Torch("none")),
        _system("gloo-fp32", "bare gloo all-reduce of buckets in place", Torch("plain")),
        _system("ddp-bf16", "torch DDP, bf16 hook", Torch("bf16")),
        _system("ddp-fp16", "torch DDP, fp16 hook", Torch("fp16")),
        _system("powersgd-1", "torch DDP, PowerSGD rank 1", Torch("powersgd:1")),
        _system("powersgd-2", "torch DDP, PowerSGD rank 2", Torch("powersgd:2")),
        _system("powersgd-4", "torch DDP, PowerSGD rank 4", Torch("powersgd:4")),
        _system("onebit-adam", "DeepSpeed's 1-bit Adam over gloo, NumPy packing", Torch("onebit")),
        _system("mxnet-2bit", "MXNet kvstore dist_sync, 2 bits up, f32 down", MxNet()),
        _system("ray", "Ray actors, fused Adam in the server's", Ray(), quiet=False),
    )
}
