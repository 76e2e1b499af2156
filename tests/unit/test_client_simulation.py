"""Workers' machines against the real server's, in virtual time, over connections that break.

Whatever is lost, the job ends with the weights of the undisturbed run: the same payloads were
applied, each once.
"""

import random
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from psq import layout
from psq.client.hooks import Hooks
from psq.client.machine import Machine
from psq.codec import ShardCodec, get_codec
from psq.errors import FencedError
from psq.feedback import Compressor
from psq.plan import Plan
from psq.presets import preset
from psq.torch.decoder import Decoder
from psq_proto.frames import Header, decode_frame, encode_frame
from psq_proto.messages import Leave, MessageType
from psq_server import state
from psq_server.reduce import Reducer
from psq_server.state.events import Action, Event
from psq_server.weights import Weights

ROUNDS = 4
OPTIONS = {  # so that the few rounds are of both kinds
    "shared-direction": [
        f"{link}.choice.{o}" for link in ("uplink", "downlink") for o in ("first=1", "period=3")
    ],
    "onebit-adam": [f"{link}.choice.steps=2" for link in ("uplink", "downlink")],
}
SPECS = (("first", (3, 7)), ("second", (2 * 8192 + 5,)), ("third", (11,)))
RUN_ID = b"r" * 16
MAX_STEPS = 20_000
MAX_FAULTS = 12
LOSABLE = {
    MessageType.PUSH,
    MessageType.PULL,
    MessageType.HEARTBEAT,
    MessageType.VERDICT,
    MessageType.WEIGHTS,
    MessageType.STATUS,
}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(layout, "MAX_SHARD_NUMEL", 8192)


def gradient(rank: int, round_: int, numel: int) -> np.ndarray:
    rng = np.random.default_rng((rank, round_))
    return rng.standard_normal(numel, np.float32)


class Wire:
    """One worker's connection: two queues that a cut empties, and a name that a cut changes."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.generation = 0
        self.cut()

    def cut(self) -> None:
        self.generation += 1
        self.peer = bytes([self.rank]) + self.generation.to_bytes(4, "big")
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()


class Server:
    """The server's state machine and arithmetic, and a shell that runs in no time."""

    def __init__(self, wires: list[Wire]) -> None:
        self.state = state.ServerState(state.Settings(run_id=RUN_ID), 0.0)
        self.wires = wires
        self.weights: Weights | None = None
        self.stopped = False

    def handle(self, event: Event, now_s: float) -> None:
        events = deque([event])
        while events:
            for action in self.state.handle(events.popleft(), now_s):
                self._do(action, events)
            if not self.stopped:
                self.state.validate()

    def _do(self, action: Action, events: deque[Event]) -> None:
        match action:
            case state.Send(peer, frame):
                self._send((peer,), [frame])
            case state.Broadcast(peers, _, frames, _):
                self._send(peers, frames)
            case state.SendFull(peers, versions):
                for shard in versions:
                    self._send(peers, self.weights.full(shard)[1])
            case state.Adopt(plan):
                self.weights = Weights(plan, RUN_ID, 1, is_busy=lambda _: True)
            case state.Initialize(shard, part, values):
                self.reducer.init(shard, part, values)
            case state.Reduce(round_, shard):
                frame = self.weights.reduce(action)
                events.append(state.ShardReduced(round_, shard, frame, 0.001))
            case state.Stop():
                self.stopped = True

    def _send(self, peers, frames) -> None:
        for wire in self.wires:
            if wire.peer in peers:
                wire.down.extend(bytes(frame) for frame in frames)

    @property
    def reducer(self) -> Reducer:
        return self.weights.reducer


class Worker:
    """A worker without torch: its gradients come from a formula."""

    def __init__(self, plan: Plan, wire: Wire, seed: int) -> None:
        self.plan, self.wire = plan, wire
        self.x = np.full(plan.layout.numel, np.nan, np.float32)
        self.compressor = Compressor(plan, wire.rank)
        self.restored: list[int] = []
        self.decoder = Decoder(plan, self)
        self.done = self.pause = False
        planes = self.decoder.planes
        hooks = Hooks(self._initial, self._weights, self._restore, self._reset, planes)
        self.machine = Machine(
            plan,
            wire.rank,
            hooks,
            heartbeat_s=1.0,
            rng=random.Random(seed),  # noqa: S311 - a simulation
            is_lent=lambda _: False,
        )

    def advance(self) -> None:
        """Whatever the training loop would do now."""
        machine = self.machine
        if self.done or machine.replica.version < 0:
            return
        if machine.round is not None and machine.settled:
            machine.end_round()
        if machine.round is not None or self.pause:
            return
        if machine.replica.version == ROUNDS:
            self.done = True
            machine.leave(Leave("done"))
            return
        number = machine.begin(0.01).number
        flat = gradient(self.wire.rank, number, self.plan.layout.numel)
        for shard in self.plan.layout.shards:
            values = flat[shard.offset : shard.offset + shard.numel]
            parts = [values[s.offset : s.offset + s.numel] for s in shard.segments]
            if not self.plan.due(shard.index, number):
                self.compressor.absorb(shard.index, parts, 0.01)
                continue
            payload = machine.frames.payload(shard.index)
            t, shared = self.plan.turns(shard.index, number + 1), self._shared(shard.index)
            codec = self.compressor.compress(shard.index, parts, 0.01, payload, t=t, shared=shared)
            machine.push(shard.index, codec)

    def flush(self, now_s: float, count: int) -> None:
        for _ in range(count):
            frame = self.machine.next_frame(now_s)
            if frame is None:
                return
            self.wire.up.append(bytes(frame))
            self.machine.sent(now_s)

    def receive(self, now_s: float) -> None:
        if self.wire.down:
            self.machine.receive(memoryview(self.wire.down.popleft()), now_s)

    def weights(self, shard: int) -> list[np.ndarray]:
        """What the decoder writes, by segments."""
        cut = self.plan.layout.shards[shard]
        flat = self.x[cut.offset : cut.offset + cut.numel]
        return [flat[each.offset : each.offset + each.numel] for each in cut.segments]

    def write_part(self, shard: int, part: int, values: np.ndarray) -> None:
        assert part == 0, "shards are smaller than a part here"
        cut = self.plan.layout.shards[shard]
        self.x[cut.offset : cut.offset + cut.numel] = values

    def _shared(self, shard: int) -> dict[str, np.ndarray]:
        rule = self.decoder.rule
        return {name: rule.of(name, shard) for name in self.decoder.shared}

    def _initial(self, shard: int) -> np.ndarray:
        return np.full(self.plan.layout.shards[shard].numel, 0.5, np.float32)

    def _weights(self, header: Header, body: memoryview) -> None:
        factor = self.decoder.decode(header, body)
        if factor is not None:
            self.compressor.rescale(header.shard, factor)

    def _restore(self, shard: int) -> None:
        self.restored.append(shard)
        self.compressor.restore(shard, self.machine.frames.said(shard))

    def _reset(self, _: Sequence[int]) -> None:
        pytest.fail("no residual may be lost")


class World:
    def __init__(self, recipe: str, world_size: int, seed: int) -> None:
        name, _, every = recipe.partition("/")
        made = preset(name).with_rhythm(every=int(every or 1)).with_options(*OPTIONS.get(name, ()))
        self.plan = Plan.of(SPECS, made, world_size)
        assert len(self.plan.layout.shards) > 2
        self.wires = [Wire(rank) for rank in range(world_size)]
        self.server = Server(self.wires)
        self.workers = [Worker(self.plan, wire, seed + wire.rank) for wire in self.wires]
        self.rng = random.Random(seed)  # noqa: S311 - a simulation
        self.now_s = 0.0
        self.cuts = self.losses = 0

    def run(self, cut_chance: float = 0.0, loss_chance: float = 0.0) -> "World":
        for _ in range(MAX_STEPS):
            if self.server.stopped:  # a BYE may be lost: the real client waits no longer than that
                assert all(worker.done for worker in self.workers)
                return self
            calm = self.cuts + self.losses >= MAX_FAULTS
            self.step(*((0.0, 0.0) if calm else (cut_chance, loss_chance)))
        pytest.fail(f"stuck:\n{self.server.state.story()}")

    def step(self, cut_chance: float = 0.0, loss_chance: float = 0.0) -> None:
        """One worker does some of what it could do now."""
        worker = self.rng.choice(self.workers)
        wire = worker.wire
        if self.rng.random() < cut_chance:
            old = wire.peer
            wire.cut()
            self.cuts += 1
            if self.rng.random() < 0.5:  # the server may or may not hear of it
                self.server.handle(state.PeerGone(old), self.now_s)
        for queue in (wire.up, wire.down):
            if queue and self.rng.random() < loss_chance:
                self._lose_first(queue)
        worker.advance()
        worker.flush(self.now_s, self.rng.randrange(4))
        for _ in range(self.rng.randrange(4)):
            if wire.up:
                event = state.FrameReceived(wire.peer, wire.up.popleft())
                self.server.handle(event, self.now_s)
        for _ in range(self.rng.randrange(4)):
            worker.receive(self.now_s)
        if self.rng.random() < 0.2:
            self.now_s += self.rng.random()

    def _lose_first(self, queue: deque[bytes]) -> None:
        """What a damaged frame comes to: the receiver drops it."""
        if decode_frame(queue[0]).header.type in LOSABLE:
            queue.popleft()
            self.losses += 1


# With /N each shard is due in every Nth round.
RECIPES = (
    *("server-adam", "qadam", "qadam-1bit", "fp32", "server-adam/2", "qadam/3", "qadam-1bit/2"),
    # Replicas that take the step themselves, with and without state; codecs that change.
    *("sign-majority", "shared-direction", "onebit-adam", "dist-lion", "dq-sgd"),
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_replica_holds_what_the_server_sent(recipe):
    world = World(recipe, 2, seed=1).run()
    first, second = (worker.x.tobytes() for worker in world.workers)
    assert first == second
    if world.plan.recipe.downlink.kind != "weights" or recipe == "fp32":
        assert first == world.server.reducer.state_arrays()["x"].tobytes()
    assert not any(worker.machine.resent_frames for worker in world.workers)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(12))
def test_connections_that_break_change_nothing(recipe, seed, calm):
    world = World(recipe, 2, seed=seed).run(cut_chance=0.05)
    assert world.cuts
    assert_same_end(calm(recipe), world)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(12))
def test_frames_that_are_damaged_change_nothing(recipe, seed, calm):
    world = World(recipe, 2, seed=seed).run(loss_chance=0.2)
    assert world.losses
    assert_same_end(calm(recipe), world)


@pytest.fixture(scope="module")
def calm():
    """The undisturbed run of a recipe, made once."""
    made: dict[str, World] = {}

    def run(recipe: str) -> World:
        if recipe not in made:
            made[recipe] = World(recipe, 2, seed=0).run()
        return made[recipe]

    return run


def assert_same_end(before: World, after: World) -> None:
    assert after.server.state.counts.rounds == ROUNDS
    assert after.server.state.counts.resets == 0
    for calm, disturbed in zip(before.workers, after.workers, strict=True):
        assert disturbed.x.tobytes() == calm.x.tobytes()
        for part in ("compressor", "decoder"):
            state_after = arrays_of(disturbed, part)
            for name, array in arrays_of(calm, part).items():
                assert state_after[name].tobytes() == array.tobytes(), name


def arrays_of(worker: Worker, part: str) -> Mapping[str, np.ndarray]:
    """Residual and moments, or what all replicas have alike."""
    return worker.compressor.state_arrays() if part == "compressor" else worker.decoder.shared


def test_lost_shards_are_sent_again_and_only_those():
    world = World("server-adam", 1, seed=3)
    worker, wire = world.workers[0], world.wires[0]
    while worker.machine.round is None:
        world.step()
    while wire.up:
        world.server.handle(state.FrameReceived(wire.peer, wire.up.popleft()), world.now_s)
    worker.flush(world.now_s, 100)
    dropped = [f for f in wire.up if decode_frame(f).header.type is MessageType.PUSH][1:]
    assert dropped
    wire.up = deque(f for f in wire.up if f not in dropped)
    world.run()
    assert worker.machine.resent_frames == len(dropped)


def test_a_process_that_takes_the_rank_over_fences_the_old_one_and_finishes():
    world = World("server-adam", 2, seed=5)
    while world.server.state.snapshot(world.now_s).version < 2:
        world.step()
    old = world.workers[1]
    world.wires.append(Wire(1))
    world.wires[-1].peer = b"newer"
    world.workers[1] = Worker(world.plan, world.wires[-1], seed=77)
    world.run()
    assert world.workers[0].x.tobytes() == world.workers[1].x.tobytes()
    *early, fenced = old.wire.down
    for frame in early:
        old.machine.receive(memoryview(frame), world.now_s)
    with pytest.raises(FencedError, match="rank 1"):
        old.machine.receive(memoryview(fenced), world.now_s)


def test_a_rejected_shard_goes_back_into_the_residual_and_the_others_count():
    world = World("server-adam", 1, seed=6)
    worker, wire = world.workers[0], world.wires[0]
    while worker.machine.round is None or worker.machine.round.number < 1:
        world.step()
    residual = worker.compressor.state_arrays()["residual"]
    said = sum_of_said(worker)
    expected = residual.astype(np.float64)
    broken = break_a_scale(wire.up, worker)
    cut = world.plan.layout.shards[broken]
    expected[cut.offset : cut.offset + cut.numel] += said[cut.offset : cut.offset + cut.numel]
    worker.pause = True  # before the next step is compressed on top
    while not worker.restored:
        before = residual.copy()
        world.step()
    assert worker.restored == [broken]
    np.testing.assert_allclose(residual, expected, atol=1e-6)
    assert (before != residual).any()
    worker.pause = False
    world.run()
    assert worker.restored == [broken]
    assert world.server.state.counts.rounds == ROUNDS


def sum_of_said(worker: Worker) -> np.ndarray:
    """What the worker's push buffers say, decoded."""
    up = get_codec(worker.plan.recipe.uplink.codec)
    out = np.zeros(worker.plan.layout.numel, np.float32)
    for shard in worker.plan.layout.shards:
        part = out[shard.offset : shard.offset + shard.numel]
        ShardCodec(up, shard).decode(worker.machine.frames.said(shard.index), part)
    return out.astype(np.float64)


def break_a_scale(up: deque[bytes], worker: Worker) -> int:
    """Damage the next push as a broken worker would: with a good checksum."""
    worker.flush(0.0, 100)
    for index, frame in enumerate(up):
        header, body = decode_frame(frame)
        if header.type is MessageType.PUSH:
            up[index] = bytes(encode_frame(header, np.float32(np.nan).tobytes() + body[4:]))
            return header.shard
    pytest.fail("no push was under way")
