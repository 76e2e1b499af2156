"""What docs/theory.md shows, at small size and with bounds: by the code that draws its pictures."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from psq.codec import ShardCodec, get_codec
from psq.layout import cut
from psq.presets import PRESETS, preset

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
DEFAULT, ONE_BIT = "server-adam", "qadam-1bit"

WALK = {"runs": 4, "verdict": "holds", "steps": [1, 10], "drawn": True, "largest": 2.0}
WALK |= {"quartiles": [[0.5, 1.0, 2.0], [0.0, 0.1, 0.2]], "beyond_start": 0.5, "arrived": 0.25}
SMALL = {
    "counterexample": [
        WALK | {"beta": beta, "memory": f"r = {r}"} for beta in (0.0, 0.9) for r in range(5)
    ],
    "speedup": [
        {"system": system, "samples": n, "seed": seed, "steps": steps + seed}
        for system in ("adam", DEFAULT, ONE_BIT)
        for n, steps in ((1, 100), (2, 50))
        for seed in (-1, 0, 1)
    ],
    "weights": [
        {"kind": kind, "k": k, "gradient": 2.0**-k, "excess": 4.0**-k}
        for kind in ("fixed", "noisy", "block", "codec")
        for k in (4, 5)
    ]
    + [{"kind": "exact", "k": 0, "gradient": 1e-9, "excess": 1e-18}],
}


@pytest.fixture
def load(monkeypatch):
    """Imports a module as the script does, and forgets it and what it brought afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {"claims", "reporting", "theory"}:
            del sys.modules[name]


def ends(claims, theta, beta, seed):
    """|x| after a tenth of the steps and after all, sorted."""
    at = [claims.STEPS // 10, claims.STEPS]
    return np.sort(claims.walk(theta, beta, runs=48, seed=seed, at=at).distances)


def test_the_ten_functions_are_those_of_the_counterexample(load):
    claims = load("claims.counterexample")
    x = np.array([-3.0, -1.0, -0.25, 0.0, 0.5, 1.0, 7.0], np.float32)
    steep = claims.gradient(x, np.full(7, claims.STEEP, np.float32))
    shallow = claims.gradient(x, np.full(7, claims.SHALLOW, np.float32))
    assert steep.tolist() == [-11, -11, -2.75, 0, 5.5, 11, 11]
    assert shallow.tolist() == [1, 1, 0.25, 0, -0.5, -1, -1]
    mean = claims.SHARE * steep + (1 - claims.SHARE) * shallow
    assert mean == pytest.approx(0.2 * np.clip(x, -1, 1), abs=1e-6)  # so F falls towards 0 alone


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("seed", [1, 2])
def test_adam_that_forgets_the_steep_function_diverges(load, beta, seed):
    claims = load("claims.counterexample")
    early, late = ends(claims, claims.FORGETFUL, beta, seed)
    assert late[0] > 10 * claims.START  # every run
    assert np.median(late) > 2 * np.median(early)
    assert claims.verdict_of(claims.FORGETFUL, beta).verdict == "stalls"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_adam_with_a_memory_that_does_not_grow_is_far_away_after_30_000_steps(load, seed):
    claims = load("claims.counterexample")
    _, late = ends(claims, claims.theta_of(0.0), 0.0, seed)
    assert np.median(late) > 3 * claims.START
    assert claims.verdict_of(claims.theta_of(0.0), 0.0).verdict == "stalls"


@pytest.mark.parametrize(("r", "beta"), [(0.75, 0.0), (1.0, 0.0), (0.75, 0.9)])
@pytest.mark.parametrize("seed", [1, 2])
def test_adam_with_a_memory_that_grows_converges(load, r, beta, seed):
    claims = load("claims.counterexample")
    _, late = ends(claims, claims.theta_of(r), beta, seed)
    assert np.mean(late < 2e-3) > 0.85
    assert late[-1] < claims.START  # who is not there yet is nearer than it was
    assert claims.verdict_of(claims.theta_of(r), beta).verdict == "holds"


def test_a_sixteenfold_batch_takes_a_sixteenth_of_the_steps(load):
    claims = load("claims.speedup")
    few, many = (claims.steps_of_batches(batch, seed=1) for batch in (2, 32))
    assert 16 / 1.25 < few / many < 16 * 1.15


def test_the_speed_up_is_lost_without_the_step_size_that_goes_with_it(load):
    claims = load("claims.speedup")
    few, many = (claims.steps_of_batches(batch, 1, claims.alpha_of(4)) for batch in (4, 64))
    assert few / many < 16 / 2


@pytest.mark.parametrize("name", [DEFAULT, ONE_BIT])
def test_four_times_the_workers_take_a_fourth_of_the_rounds(load, name):
    claims = load("claims.speedup")
    few, many = (claims.steps_of_workers(name, workers, seed=1) for workers in (4, 16))
    assert 4 / 1.2 < few / many < 4 * 1.15
    plain = claims.steps_of_batches(16, seed=1)
    assert plain / 1.1 < many < plain * 1.15


@pytest.mark.parametrize(("name", "most"), [(DEFAULT, (4.2, 3.1)), (ONE_BIT, (1.1, 1.1))])
def test_the_workers_of_the_speed_up_really_speak_in_few_bits(load, name, most):
    claims = load("claims.speedup")
    up, down = claims.Job(preset(name), 2, claims.Problem(0)).bits()
    assert (up, down) <= most
    assert name in PRESETS


def test_a_goal_that_is_out_of_reach_is_no_result(load, monkeypatch):
    claims = load("claims.speedup")
    monkeypatch.setattr(claims, "MAX_STEPS", 3)
    with pytest.raises(RuntimeError, match="not reached in 3 steps"):
        claims.steps_of_batches(1, seed=0)


def test_the_floor_falls_with_the_number_of_levels_and_not_without(load):
    claims = load("claims.floor")
    for grid in (claims.fixed_range, lambda k: claims.per_block(2**k)):
        found = [claims.floor_of(grid(k), steps=1500) for k in (4, 7)]
        power = claims.slope([2.0**4, 2.0**7], [each.gradient for each in found])
        assert -1.15 < power < -0.85
        power = claims.slope([2.0**4, 2.0**7], [each.excess for each in found])
        assert -2.3 < power < -1.7
    free = claims.floor_of(claims.exact, steps=1500)
    assert free.gradient < found[1].gradient / 20


def test_where_noise_is_louder_than_the_grid_more_levels_do_not_help(load):
    claims = load("claims.floor")
    loud = [claims.floor_of(claims.fixed_range(k), steps=1500, noise=1.0) for k in (8, 14)]
    assert loud[1].gradient > 0.8 * loud[0].gradient


@pytest.mark.parametrize("bits", [5, 8])
def test_the_grid_of_numpy_is_that_of_the_codec(load, bits):
    claims = load("claims.floor")
    (shard,) = cut([("x", (claims.NUMEL,))], [lambda _: 1]).shards
    codec = ShardCodec(get_codec(f"uniform:bits={bits},block={claims.BLOCK}"), shard)
    x = np.random.default_rng(3).normal(0, 0.2, claims.NUMEL).astype(np.float32)
    payload, out = np.empty(codec.nbytes, np.uint8), np.empty_like(x)
    codec.encode(x, payload, seed=0)
    codec.decode(payload, out)
    near = np.abs(out - claims.per_block(claims.codec_steps(bits))(x)) < 1e-4 * np.abs(x).max()
    assert (
        np.mean(near) > 0.998
    )  # psq rounds scales a little: a value on a threshold may go over it
    ours, numpys = (
        claims.floor_of_codec(bits, steps=1000),
        claims.floor_of(claims.per_block(claims.codec_steps(bits)), steps=1000),
    )
    assert ours.gradient == pytest.approx(numpys.gradient, rel=0.02)


@pytest.mark.parametrize("name", ["counterexample", "speedup", "weights"])
def test_numbers_are_written_between_the_pages_marks_and_nothing_else_changes(load, tmp_path, name):
    script = load("theory")
    page, shown = tmp_path / "page.md", (ROOT / "docs" / "theory.md").read_text()
    page.write_text(shown)
    script.write_tables({name: SMALL[name]}, page)
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    lines = page.read_text().partition(begin)[2].partition(end)[0].splitlines()
    assert lines == script.table(name, SMALL[name])
    assert len({line.count("|") for line in lines if "\\|" not in line}) == 1
    before, _, rest = shown.partition(begin)
    assert (
        page.read_text() == before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    )
    assert f"theory-{name}.png" in shown
    page.write_text("no marks")
    with pytest.raises(ValueError, match=name):
        script.write_tables({name: SMALL[name]}, page)


@pytest.mark.parametrize("name", ["counterexample", "speedup", "weights"])
def test_every_section_has_its_picture(load, tmp_path, name):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    load("theory").DRAWN[name](SMALL[name], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs" / f"theory-{name}.png").exists()


def test_the_speed_up_is_by_the_mean_of_the_seeds(load):
    lines = load("theory").table("speedup", SMALL["speedup"])
    assert lines[2] == "| `adam`, steps | 100 | 50 |"
    assert lines[3] == "| `adam`, times faster than one | 1.0 | 2.0 |"
