"""Every recipe through real sockets: replicas and server hold the same bytes, round by round."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq import layout
from psq.codec import get_codec
from psq.errors import ConfigError, GaveUpError, RemotePayloadError
from psq.presets import preset
from psq.torch import Group
from psq.torch.decoder import Decoder
from psq.torch.parameters import ParameterTable
from psq_proto.frames import Header
from psq_proto.messages import Flags, MessageType

LR = 0.01
WORKERS = 2
STEPS = 30  # past the first refresh of shared-direction, which is the 21st

# name, options; where the downlink is "mean" every replica takes the step itself.
REPLICATED = [
    ("shared-direction", ()),
    ("onebit-adam", ("uplink.choice.steps=8", "downlink.choice.steps=8")),
    ("sign-majority", ()),
    ("dist-lion", ()),
    ("sto-sign", ()),
    ("dp-sign", ()),
]
OTHERS = ["ef-sgd", "dist-ef-sgdm", "ef21", "dqgan", "server-amsgrad", "efficient-adam"]


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 2))


def loss_of(model: nn.Module, seed) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((8, 8), np.float32))
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :2]))


def replica(worker: psq.torch.Worker) -> bytes:
    table = worker._table
    flat = [table.flat_weights(s.index) for s in worker.plan.layout.shards]
    return np.concatenate(flat).tobytes()


def server_of(served) -> bytes:
    weights = served.loop._weights.reducer.weights().values()
    return np.concatenate([each.reshape(-1) for each in weights]).tobytes()


def train(serve, recipe, steps: int = STEPS, *, late: int = 0, **options):
    """Train with every rank in a thread; returns replicas by rank and step, and the server's.

    With `late` the last rank's process is replaced by a new one before that step.
    """
    served = serve()
    barrier = Barrier(WORKERS, timeout=30)
    models = [make_model(rank) for rank in range(WORKERS)]  # torch's seed belongs to all threads
    settings = {"recipe": recipe, "lr": LR, "give_up_after_s": 20.0, "connect": served.endpoint}

    def start(rank: int, model: nn.Module) -> psq.torch.Worker:
        return psq.torch.Worker(model, rank=rank, world_size=WORKERS, **{**settings, **options})

    def work(rank: int):
        model, seen = models[rank], []
        worker = start(rank, model)
        for step in range(steps):
            if late and step == late and rank == WORKERS - 1:
                worker.close("interrupted")
                model = make_model(99)
                worker = start(rank, model)
            loss_of(model, (step, rank)).backward()
            worker.step()
            seen.append(replica(worker))
            barrier.wait()
            if rank == 0:
                seen[-1] = (seen[-1], server_of(served))
            barrier.wait()
        worker.close()
        return seen

    with ThreadPoolExecutor(WORKERS) as pool:
        runs = [each.result(60) for each in [pool.submit(work, r) for r in range(WORKERS)]]
    first = [mine for mine, _ in runs[0]]
    return [first, *runs[1:]], [server for _, server in runs[0]]


@pytest.mark.parametrize(("name", "options"), REPLICATED, ids=[name for name, _ in REPLICATED])
def test_replicas_that_step_themselves_have_the_servers_bytes_after_every_round(
    serve, name, options
):
    recipe = preset(name).with_options(*options)
    assert recipe.downlink.kind == "mean"
    workers, server = train(serve, recipe)
    assert workers[0] == workers[1]
    assert workers[0] == server
    assert len(set(server)) == STEPS  # they moved each time


@pytest.mark.parametrize("name", OTHERS)
def test_replicas_that_are_moved_have_the_servers_bytes_after_every_round(serve, name):
    workers, server = train(serve, preset(name), steps=8)
    assert workers[0] == workers[1]
    if preset(name).downlink.kind == "delta":
        assert workers[0] == server


@pytest.mark.parametrize("late", [3, 15, 25])
def test_who_comes_late_is_given_the_state_that_replicas_share(serve, late):
    """Before the refreshes end, amid momentum, after another refresh; weights alone would drift."""
    workers, server = train(serve, preset("shared-direction"), late=late)
    assert workers[0] == workers[1] == server


def test_groups_rates_are_the_same_on_every_replica(serve):
    groups = [Group("2.*", lr_factor=0.3)]
    workers, server = train(serve, preset("sign-majority"), steps=6, groups=groups)
    assert workers[0] == workers[1] == server
    [body, head] = [np.frombuffer(server[0], np.float32), np.frombuffer(server[1], np.float32)]
    moved = np.abs(head - body)
    split = sum(p.numel() for p in make_model()[0].parameters())
    assert moved[split:].max() < 0.31 * moved[:split].max()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["shared-direction", "dist-lion"])
def test_many_shards_step_one_by_one_while_others_are_still_said(serve, name, overlap, monkeypatch):
    monkeypatch.setattr(layout, "SPLIT_NUMEL", 16)
    monkeypatch.setattr(layout, "MAX_SHARD_NUMEL", 48)
    workers, server = train(serve, preset(name), steps=24, overlap=overlap)
    assert workers[0] == workers[1] == server


def test_a_direction_that_needs_all_gradients_is_not_overlapped():
    with pytest.raises(ConfigError, match=r"gaussian looks at all gradients .* use overlap=False"):
        psq.torch.Worker(make_model(), recipe="dp-sign", overlap=True)


def test_a_round_in_which_nobody_speaks_moves_no_replica_and_no_state(serve):
    served = serve()
    options = {"lr": LR, "rank": 0, "world_size": 1, "connect": served.endpoint}
    model = make_model()
    with psq.torch.Worker(model, recipe="shared-direction", **options) as worker:
        for step in range(3):
            loss_of(model, step).backward()
            worker.step()
        before = replica(worker)
        state = {k: v.copy() for k, v in worker._exchange.decoder.shared.items()}
        assert worker.sit_out().version == 4
        assert replica(worker) == before
        for name, array in worker._exchange.decoder.shared.items():
            assert array.tobytes() == state[name].tobytes(), name
        loss_of(model, 4).backward()
        assert worker.step().applied
        assert replica(worker) == server_of(served)


def test_a_shard_is_answered_in_whichever_of_its_codecs_the_header_names(join):
    """onebit-adam: full precision first, one bit later; answers shrink accordingly."""
    model = make_model()
    recipe = preset("onebit-adam").with_options("uplink.choice.steps=3", "downlink.choice.steps=3")
    worker = join(model, recipe=recipe, lr=LR)
    sizes = []
    for step in range(6):
        loss_of(model, step).backward()
        report = worker.step()
        sizes.append((report.sent_bytes, report.received_bytes))
    dense = 4 * sum(p.numel() for p in model.parameters())
    assert all(sent > dense and received > dense for sent, received in sizes[:3])
    assert all(sent < dense / 2 and received < dense / 2 for sent, received in sizes[3:])


def a_decoder(name: str, take_mean=None) -> tuple[Decoder, ParameterTable]:
    table = ParameterTable(make_model())
    plan = psq.plan.Plan.of(table.specs, preset(name), 1)
    table.bind(plan.layout)
    return Decoder(plan, table, take_mean), table


def a_mean(decoder: Decoder, value: float) -> tuple[Header, memoryview]:
    [wire_id, codec], *_ = decoder._codecs[0].items()
    payload = np.empty(codec.nbytes, np.uint8)
    codec.encode(np.full(codec.shard.numel, value, np.float32), payload)
    header = Header(
        MessageType.WEIGHTS, flags=Flags.MEAN, codec=wire_id, version=1, shard=0, rate=0.5
    )
    return header, memoryview(payload)


def test_a_mean_that_is_not_finite_is_refused_and_nothing_moves():
    decoder, table = a_decoder("sign-majority")
    before = table.flat_weights(0)
    header, body = a_mean(decoder, np.nan)
    with pytest.raises(RemotePayloadError, match="finite"):
        decoder.decode(header, body)
    assert table.flat_weights(0).tobytes() == before.tobytes()


def test_planes_are_the_rules_vectors_in_its_order():
    decoder, _ = a_decoder("shared-direction")
    names = [*decoder.shared]
    assert decoder.planes == 1 + len(names) > 1
    numel = decoder._shards[0].numel
    for plane, name in enumerate(names, start=1):
        values = np.full(numel, plane, "<f4")
        header = Header(
            MessageType.WEIGHTS,
            flags=Flags.FULL,
            codec=get_codec("fp32").wire_id,
            version=7,
            part=plane,
        )
        decoder.decode(header, memoryview(values.tobytes()))
        assert (decoder.shared[name] == plane).all()


def test_who_is_given_new_units_whole_rescales_what_waits_and_a_newcomer_does_not():
    decoder, _ = a_decoder("shared-direction")
    plane = 1 + [*decoder.shared].index("s")
    numel = decoder._shards[0].numel

    def give(units: np.ndarray) -> np.ndarray:
        header = Header(
            MessageType.WEIGHTS, flags=Flags.FULL, codec=get_codec("fp32").wire_id, part=plane
        )
        return decoder.decode(header, memoryview(units.astype("<f4").tobytes()))

    first, second = np.linspace(1.0, 2.0, numel), np.linspace(4.0, 0.5, numel)
    assert (give(first) == 1.0).all()
    np.testing.assert_allclose(give(second), first / second, rtol=1e-6)


def test_with_an_optimizer_of_the_users_own_whole_weights_come_too_late():
    means = []
    decoder, _ = a_decoder("average", lambda shard, mean: means.append((shard.index, mean)))
    header = Header(
        MessageType.WEIGHTS, flags=Flags.FULL, codec=get_codec("fp32").wire_id, version=3
    )
    with pytest.raises(GaveUpError, match="the job is 3 rounds on"):
        decoder.decode(header, memoryview(bytes(4)))
    decoder.decode(*a_mean(decoder, 1.0))
    nothing = Header(MessageType.WEIGHTS, flags=Flags.MEAN | Flags.SKIP, version=2)
    decoder.decode(nothing, memoryview(b""))
    assert [index for index, _ in means] == [0, 0]
    assert means[1][1] is None


def an_open_round_under_a_quorum(join) -> psq.torch.Worker:
    """A worker of directions in common units, which has said nothing of its fourth step yet."""
    model = make_model()
    recipe = preset("shared-direction").with_options(
        "uplink.choice.first=1", "downlink.choice.first=1"
    )
    worker = join(model, recipe=recipe, consistency="bsp,quorum=1")
    for step in range(3):
        loss_of(model, step).backward()
        worker.step()
    loss_of(model, 3).backward()
    worker._table.refresh()
    worker._exchange.begin(worker._asked())
    return worker


def change_units(worker: psq.torch.Worker, monkeypatch, by: float) -> None:
    """As weights that come in the middle of a step do."""
    factor = np.full(worker.plan.layout.numel, by, np.float32)
    monkeypatch.setattr(worker._exchange.decoder, "decode", lambda *_: factor)
    header = Header(MessageType.WEIGHTS, flags=Flags.MEAN, codec=1, version=4, shard=0)
    worker._exchange.decode(header, memoryview(b""))


def what_was_said(worker: psq.torch.Worker) -> np.ndarray:
    said = np.empty(worker.plan.layout.numel, np.float32)
    worker._compressor.codec(0, 0).decode(worker._client.said(0), said)
    return said


def test_what_comes_back_after_the_units_have_changed_is_rescaled_with_them(join, monkeypatch):
    """Under a quorum a rejected push may be of the units before: e + d becomes f (e + d)."""
    worker = an_open_round_under_a_quorum(join)
    worker._exchange.say(0)
    residual = worker._compressor.state_arrays()["residual"]
    expected = 4.0 * (residual + what_was_said(worker))
    change_units(worker, monkeypatch, 2.0)
    change_units(worker, monkeypatch, 2.0)
    worker._exchange.restore(0)
    np.testing.assert_allclose(residual, expected, rtol=1e-6)
    assert residual.any()


def test_what_was_said_after_the_units_have_changed_comes_back_as_it_is(join, monkeypatch):
    worker = an_open_round_under_a_quorum(join)
    change_units(worker, monkeypatch, 2.0)
    worker._exchange.say(0)
    residual = worker._compressor.state_arrays()["residual"]
    expected = residual + what_was_said(worker)
    worker._exchange.restore(0)
    np.testing.assert_allclose(residual, expected, rtol=1e-6)
    assert residual.any()
