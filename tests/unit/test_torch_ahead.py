"""Directions that look ahead: gradients at other weights than the job's (optimistic descent)."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import psq.torch
from psq.errors import UsageError
from psq.presets import preset

ETA = 0.1


class Game(nn.ModuleDict):
    """min over x, max over y of x'Ay: its one equilibrium is 0."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for player in ("x", "y"):
            self[player] = nn.Linear(size, 1, bias=False)
            with torch.no_grad():
                self[player].weight.fill_(1.0)
        self.payoff = torch.diag(torch.linspace(1.0, 1.5, size))

    def backward(self) -> None:
        """Both players' gradients: x descends, y ascends."""
        x, y = self["x"].weight[0], self["y"].weight[0]
        (x @ self.payoff @ y.detach()).backward()
        (-(x.detach() @ self.payoff @ y)).backward()

    def distance(self) -> float:
        return float(sum(p.detach().square().sum() for p in self.parameters())) ** 0.5


def bare(name: str):
    """The recipe without compression: the algorithm alone."""
    return preset(name).with_codecs(uplink="fp32", downlink="delta:fp32")


def play(serve, recipe, *, steps: int, workers: int = 1, size: int = 1):
    """How far from the equilibrium each worker's replica ends."""
    endpoint = serve().endpoint

    def work(rank: int) -> float:
        game = Game(size)
        options = {"rank": rank, "world_size": workers, "connect": endpoint}
        with psq.torch.Worker(game, recipe=recipe, lr=ETA, **options) as worker:
            for _ in range(steps):
                game.backward()
                assert worker.step().applied
            with worker.replica():
                return game.distance()

    with ThreadPoolExecutor(workers) as pool:
        return [each.result(60) for each in [pool.submit(work, r) for r in range(workers)]]


def test_descent_of_both_players_at_once_runs_away_where_looking_ahead_converges(serve):
    [away] = play(serve, preset("fp32-sgd"), steps=300)
    [near] = play(serve, bare("dqgan"), steps=300)
    assert away > 3.0 * 2**0.5
    assert near < 0.5 * 2**0.5


def test_the_steps_without_compression_are_those_of_the_equations(serve):
    """z_half = z - eta F_prev;  F at z_half;  z <- z - eta F."""
    z, before = np.array([1.0, 1.0]), np.zeros(2)
    for _ in range(20):
        half = z - ETA * before
        before = np.array([half[1], -half[0]])
        z = z - ETA * before
    [distance] = play(serve, bare("dqgan"), steps=20)
    assert distance == pytest.approx(np.linalg.norm(z), rel=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_it_converges_through_codecs_of_few_bits_both_ways(serve, workers):
    distances = play(serve, preset("dqgan"), steps=600, workers=workers, size=64)
    assert len(set(distances)) == 1  # replicas are equal to the bit
    assert distances[0] < 0.3 * Game(64).distance()


def replica(worker: psq.torch.Worker) -> np.ndarray:
    table = worker._table
    return np.concatenate([table.flat_weights(s.index) for s in worker.plan.layout.shards])


def model_of(game: Game) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in game.parameters()])


def test_gradients_that_leave_early_are_those_at_the_weights_ahead(join, serve):
    ended = []
    for overlap in (False, True):
        game = Game(8)
        worker = join(game, recipe="dqgan", overlap=overlap, connect=serve().endpoint)
        for _ in range(6):
            game.backward()
            assert worker.step().applied
        ended.append(replica(worker).tobytes() + model_of(game).tobytes())
    assert ended[0] == ended[1]


def test_between_steps_the_model_is_ahead_and_within_replica_it_is_the_jobs(join):
    game = Game(8)
    worker = join(game, recipe="dqgan")
    assert (model_of(game) == replica(worker)).all()  # nothing to look ahead by yet
    for _ in range(3):
        game.backward()
        worker.step()
    ahead, job = model_of(game), replica(worker)
    assert (ahead != job).any()
    with worker.replica(), worker.replica():
        assert model_of(game).tobytes() == job.tobytes()
    assert model_of(game).tobytes() == ahead.tobytes()


def test_what_is_written_within_replica_is_gone_after_it_even_after_an_error(join):
    game = Game(8)
    worker = join(game, recipe="dqgan")
    game.backward()
    worker.step()
    ahead, job = model_of(game), replica(worker)
    with pytest.raises(IndexError), worker.replica(), torch.no_grad():
        game["x"].weight.zero_()[8]
    assert model_of(game).tobytes() == ahead.tobytes()
    assert replica(worker).tobytes() == job.tobytes()


def test_no_step_is_taken_within_replica(join):
    game = Game(8)
    worker = join(game, recipe="dqgan")
    game.backward()
    with worker.replica(), pytest.raises(UsageError, match=r"a step within replica\(\)"):
        worker.step()
    assert worker.step().applied


def test_a_worker_that_ends_leaves_the_jobs_weights_in_the_model(join):
    game = Game(8)
    worker = join(game, recipe="dqgan")
    for _ in range(3):
        game.backward()
        worker.step()
    job = replica(worker)
    assert (model_of(game) != job).any()
    worker.close()
    assert model_of(game).tobytes() == job.tobytes()


def test_with_any_other_recipe_replica_changes_nothing(join):
    game = Game(8)
    worker = join(game, recipe="server-adam")
    game.backward()
    with worker.replica():
        worker.step()
    assert worker.version == 1


def test_between_local_steps_replica_has_the_last_rounds_weights(join):
    game = Game(8)
    worker = join(game, recipe=preset("local-adam").with_rhythm(local_steps=3))
    for _ in range(4):
        game.backward()
        worker.step()
    own = model_of(game)
    with worker.replica():
        assert model_of(game).tobytes() == replica(worker).tobytes() != own.tobytes()
    assert model_of(game).tobytes() == own.tobytes()
    game.backward()
    worker.step()
    game.backward()
    assert worker.step().applied
