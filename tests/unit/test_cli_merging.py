"""Parts of several servers become one file, and only when each of them is new."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from psq.config.options import run
from psq.errors import StateError
from psq.plan import Plan
from psq.presets import preset
from psq_server.saving import metadata_of, part_path, save_weights
from psq_worker import launch
from psq_worker.cli import psq
from psq_worker.launch import Commands
from psq_worker.merging import Parts, merge_weights

SERVERS = 2
MODEL = [("weight", (300, 100)), ("bias", (300,))]


def job():
    return Plan.of(MODEL, preset("server-adam"), 1, servers=SERVERS)


def values_of(plan):
    drawn = np.random.default_rng(0).standard_normal(plan.layout.numel, np.float32)
    offsets = np.cumsum([0, *(int(np.prod(shape)) for _, shape in MODEL)])
    return {
        name: drawn[start:stop].reshape(shape)
        for (name, shape), start, stop in zip(MODEL, offsets, offsets[1:], strict=False)
    }


def save_part(output, number):
    """What server `number` of the job would leave if it was told to save `output`."""
    plan = job().for_server(number)
    values, names = values_of(plan), [name for name, _ in MODEL]
    slices = {}
    for shard in plan.owned:
        for segment in shard.segments:
            name = names[segment.tensor]
            flat = values[name].reshape(-1)
            stop = segment.start + segment.numel
            slices[f"{name}[{segment.start}:{stop}]"] = flat[segment.start : stop]
    path = part_path(output, number, SERVERS)
    save_weights(path, slices, metadata_of(plan, bytes(16), 7))
    return path


def assert_whole(path):
    merged = load_file(path)
    for name, value in values_of(job()).items():
        assert np.array_equal(merged[name], value)


def test_the_command_puts_parts_together_in_any_order_and_leaves_them(tmp_path, capsys):
    output = tmp_path / "weights.safetensors"
    parts = [save_part(output, number) for number in (1, 0)]
    with pytest.raises(SystemExit) as ended:
        run(psq, "psq", ["merge-weights", *map(str, parts), "-o", str(output)])
    assert ended.value.code == 0
    assert "of 2 parts" in capsys.readouterr().err
    assert_whole(output)
    assert all(part.exists() for part in parts)


def test_a_part_too_few_is_a_file_that_cannot_be_used(tmp_path, capsys):
    output = tmp_path / "weights.safetensors"
    part = save_part(output, 0)
    with pytest.raises(SystemExit) as ended:
        run(psq, "psq", ["merge-weights", str(part), "-o", str(output)])
    assert ended.value.code == 65
    assert "one part of each of 2 servers" in capsys.readouterr().err
    assert not output.exists()


def test_new_parts_of_all_servers_become_the_file_and_go(tmp_path):
    output = tmp_path / "weights.safetensors"
    parts = Parts(output, SERVERS)
    for number in range(SERVERS):
        save_part(output, number)
    assert parts.merge() == output
    assert_whole(output)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_a_part_of_an_earlier_run_is_none_of_this_one(tmp_path):
    output = tmp_path / "weights.safetensors"
    old = save_part(output, 0)
    parts = Parts(output, SERVERS)
    save_part(output, 1)
    assert parts.merge() is None
    assert old.exists()
    assert not output.exists()
    save_part(output, 0)
    assert parts.merge() == output


def test_parts_that_do_not_fit_are_left_where_they_are(tmp_path):
    output = tmp_path / "weights.safetensors"
    parts = Parts(output, SERVERS)
    made = [save_part(output, number) for number in range(SERVERS)]
    made[1].write_bytes(made[0].read_bytes())
    with pytest.raises(StateError, match="one part of each of 2 servers"):
        parts.merge()
    with pytest.raises(StateError):
        merge_weights(made, output)
    assert all(part.exists() for part in made)


def test_parts_that_cannot_be_merged_do_not_hide_why_the_job_ended(tmp_path):
    said = []
    view = SimpleNamespace(say=lambda *words: said.append(words))
    output = tmp_path / "weights.safetensors"

    def fail_after_saving():
        made = [save_part(output, number) for number in range(SERVERS)]
        made[1].write_bytes(made[0].read_bytes())
        raise KeyError

    commands = Commands(workers=1, servers=SERVERS, save=str(output))
    with pytest.raises(KeyError), launch._merging(commands, view):
        fail_after_saving()
    [(_, text)] = said
    assert "weights are in parts: expected one part" in text
