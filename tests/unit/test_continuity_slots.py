"""The file of slots, the worker's folder, and values as bytes: what is torn, stale or another's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import psq.torch.folder
from psq.durable.slots import HEAD_BYTES, Record, Slots, Spec, Stage
from psq.errors import ConfigError, StateError, UsageError
from psq.groups import Group
from psq.plan import Plan
from psq.presets import preset
from psq.torch.chance import random_state, set_random_state
from psq.torch.folder import WorkerFolder
from psq.torch.values import pack, unpack

PLAN = Plan.of(  # of two groups, so of two shards
    [("a", (700,)), ("b", (500, 2))],
    preset("server-adam"),
    1,
    groups=(Group(), Group("slow", lr=0.5)),
    members=(0, 1),
)


def spec_of(job="job", *, twice=False):
    numel = PLAN.layout.numel
    arrays = {
        "residual": np.zeros(numel, np.float32),
        "low": np.zeros(numel, np.uint16),
        "choice.ledger": np.zeros(4),
    }
    return Spec(job, PLAN.layout, arrays, [64] * len(PLAN.layout.shards), twice=twice)


@pytest.fixture
def slots(tmp_path):
    return Slots(tmp_path / "slots", spec_of())


def again(slots):
    """Another process opens the file."""
    return Slots(slots.path, spec_of())


def test_what_was_saved_is_there_for_the_next_process(slots):
    slots.spec.arrays["residual"][:] = np.arange(PLAN.layout.numel)
    slots.spec.arrays["low"][:] = 7
    payload = np.arange(5, dtype=np.uint8)
    for shard in PLAN.layout.shards:
        record = Record(number=3, rate=0.5, payload_bytes=5, stage=Stage.SAID, told=True)
        slots.save(shard.index, record, payload)
    other = again(slots)
    assert not other.replaced
    records = {shard.index: other.record(shard.index) for shard in PLAN.layout.shards}
    other.restore(records)
    for name, array in slots.spec.arrays.items():
        assert other.spec.arrays[name].tobytes() == array.tobytes()
    assert other.payload(0, records[0]).tolist() == [0, 1, 2, 3, 4]
    assert (records[0].number, records[0].rate, records[0].told) == (3, 0.5, True)


def test_a_save_that_is_not_complete_is_as_if_it_had_not_been(slots, monkeypatch):
    slots.spec.arrays["residual"][:] = 1.0
    slots.save(0, Record(number=1))

    def die(place):
        if place == "keeper.copy":
            raise KeyboardInterrupt

    monkeypatch.setattr("psq.durable.slots.reach", die)
    slots.spec.arrays["residual"][:] = 2.0
    with pytest.raises(KeyboardInterrupt):
        slots.save(0, Record(number=2))
    other = again(slots)
    record = other.record(0)
    other.restore({0: record})
    cut = PLAN.layout.shards[0]
    assert record.number == 1
    assert (other.spec.arrays["residual"][cut.offset : cut.offset + cut.numel] == 1.0).all()


def test_the_state_before_is_there_until_the_next_save(slots):
    for number in (1, 2):
        slots.spec.arrays["residual"][:] = number
        slots.save(0, Record(number=number))
    before = slots.record_before(0)
    slots.restore({0: before})
    assert before.number == 1
    assert slots.spec.arrays["residual"][PLAN.layout.shards[0].offset] == 1.0


def test_vectors_of_no_shard_are_those_of_the_shard_that_was_saved_last(slots):
    for order, shard in enumerate((1, 0)):
        slots.spec.arrays["choice.ledger"][:] = order
        slots.save(shard, Record(number=0))
    slots.spec.arrays["choice.ledger"][:] = -1.0
    slots.restore({shard: slots.record(shard) for shard in (0, 1)})
    assert (slots.spec.arrays["choice.ledger"] == 1.0).all()


def test_a_torn_record_is_refused(slots):
    slots.save(0, Record(number=1))
    at = slots._places[0][1][0]
    slots._bytes[at + 9] ^= 1
    with pytest.raises(StateError, match="torn: expected number 1 with its checksum"):
        slots.record(0)


def test_a_torn_shard_of_the_replica_has_no_version(slots, monkeypatch):
    numel = PLAN.layout.shards[0].numel
    slots.save_weights(0, 4, [[np.ones(numel, np.float32)]])
    assert slots.weights(0)[0] == 4

    def die(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("psq.durable.slots.reach", die)
    halves = [np.zeros(numel // 2, np.float32), np.zeros(numel - numel // 2, np.float32)]
    with pytest.raises(KeyboardInterrupt):
        slots.save_weights(0, 5, [halves])
    assert again(slots).weights(0)[0] == -1


def test_what_another_job_kept_is_not_written_over(slots):
    slots.save(0, Record(number=1))
    with pytest.raises(ConfigError, match=r"job is kept, another asked.*another --state-dir"):
        Slots(slots.path, spec_of("another"))
    assert again(slots).record(0).number == 1


@pytest.mark.parametrize("spoil", ["head", "length"])
def test_a_damaged_file_is_made_anew(slots, spoil):
    slots.save(0, Record(number=1))
    with slots.path.open("r+b") as file:
        if spoil == "head":
            file.seek(HEAD_BYTES // 128)
            file.write(b"!")
        elif spoil == "length":
            file.truncate(slots.nbytes - 1)
    other = again(slots)
    assert other.replaced
    assert other.record(0) is None
    assert other.worker == (0, 0)


def test_a_disk_without_room_is_an_error_in_words(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StateError, match=r"cannot be had \(No space left.*without --state-dir"):
        Slots(tmp_path / "slots", spec_of())


def test_the_memory_is_what_the_formula_says(tmp_path):
    """Twice the vectors and a payload, once the replica, and less than 2 KiB a shard besides."""
    for twice in (False, True):
        spec = spec_of(twice=twice)
        made = 2 * (6 * PLAN.layout.numel + 64 * len(PLAN.layout.shards))
        made += 4 * PLAN.layout.numel * (1 + twice)
        nbytes = Slots(tmp_path / f"slots{twice}", spec).nbytes
        assert made < nbytes < made + HEAD_BYTES + 2048 * len(PLAN.layout.shards)


# ---- the folder


@pytest.fixture
def fast(tmp_path, monkeypatch):
    """A stand-in for /dev/shm, and for the machine's start."""
    (tmp_path / "shm").mkdir()
    (tmp_path / "boot").write_text("first\n")
    monkeypatch.setattr(psq.torch.folder, "FAST", tmp_path / "shm")
    monkeypatch.setattr(psq.torch.folder, "BOOT_ID", tmp_path / "boot")
    return tmp_path


def test_parked_files_are_taken_when_the_machine_was_started_anew(fast):
    folder = WorkerFolder(str(fast / "state"), 2)
    for path in (folder.slots, folder.say(0), folder.say(1)):
        path.write_bytes(path.name.encode() * 1000)
    folder.park()
    folder.slots.write_bytes(b"later")  # as if training had gone on; the power is cut
    folder.close()
    (fast / "boot").write_text("second\n")
    other = WorkerFolder(str(fast / "state"), 2)
    assert other.slots.read_bytes() == b"slots" * 1000
    assert other.say(1).read_bytes() == b"worker.1" * 1000
    other.close()


def test_parked_files_that_are_damaged_are_left_out(fast):
    folder = WorkerFolder(str(fast / "state"), 0)
    folder.slots.write_bytes(bytes(5000))
    folder.park()
    folder.close()
    with (folder.path / "parked" / "slots").open("r+b") as file:
        file.seek(4000)
        file.write(b"!")
    (fast / "boot").write_text("second\n")
    other = WorkerFolder(str(fast / "state"), 0)
    assert not other.slots.exists()
    other.close()


def test_files_of_this_start_are_taken_and_not_the_parked_ones(fast):
    folder = WorkerFolder(str(fast / "state"), 0)
    folder.slots.write_bytes(b"parked")
    folder.park()
    folder.slots.write_bytes(b"newer")
    folder.close()
    other = WorkerFolder(str(fast / "state"), 0)
    assert other.slots.read_bytes() == b"newer"
    other.close()


def test_several_workers_of_a_process_have_folders_of_their_own(fast):
    folders = [WorkerFolder(str(fast / "state"), 0) for _ in range(2)]
    assert len({each.path for each in folders} | {each.fast for each in folders}) == 4
    for each in folders:
        each.close()
    again = WorkerFolder(str(fast / "state"), 0)
    assert again.path == folders[0].path
    again.close()


def test_a_folder_in_use_by_another_process_is_refused_and_its_children_do_not_count(fast):
    """A data loader's process lives on for a while when its worker is killed."""
    code = (
        "import os, signal, sys, psq.torch.folder as f; from pathlib import Path\n"
        f"f.FAST = Path({str(fast / 'shm')!r}); f.BOOT_ID = Path({str(fast / 'boot')!r})\n"
        f"f.WorkerFolder({str(fast / 'state')!r}, 0)\n"
        "child = os.fork()\n"
        "if not child: os.write(1, b'child\\n'); sys.stdin.read(); os._exit(0)\n"
        "os.write(1, b'parent\\n'); signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert {process.stdout.readline(), process.stdout.readline()} == {"child\n", "parent\n"}
        with pytest.raises(StateError, match=f"in use by process {process.pid}: it is rank 0"):
            WorkerFolder(str(fast / "state"), 0)
        process.kill()
        process.wait()
        WorkerFolder(str(fast / "state"), 0).close()
        process.stdin.close()


def test_a_folder_of_somebody_else_is_refused(fast):
    folder = WorkerFolder(str(fast / "state"), 0)
    folder.close()
    folder.fast.chmod(0o777)
    with pytest.raises(StateError, match="not a folder of this user alone"):
        WorkerFolder(str(fast / "state"), 0)


# ---- values


def test_values_come_back_as_they_were():
    value = {
        "numbers": [1, -(2**70), 2.5, float("inf"), True, None, "text"],
        3: (b"bytes", ("nested", [])),
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "scalar": torch.tensor(5, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "array": np.arange(4, dtype=np.uint32).reshape(2, 2),
    }
    back = unpack(pack(value))
    assert back["numbers"] == value["numbers"]
    assert back[3] == value[3]
    for name in ("half", "scalar", "empty"):
        assert back[name].dtype == value[name].dtype
        assert torch.equal(back[name], value[name])
    assert (back["array"] == value["array"]).all()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [object()]}, r"value\['a'\]\[0\] is of type object, which cannot be kept"),
        ({(1, 2): 3}, "has the key"),
        (np.array([object()]), "is of type ndarray"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_name(value, words):
    with pytest.raises(UsageError, match=words):
        pack(value)


@pytest.mark.parametrize("at", [0, 8, 16, 30, -1])
def test_a_flipped_byte_anywhere_is_noticed(at):
    data = bytearray(pack({"a": np.arange(8), "b": "text"}))
    data[at] ^= 0x10
    with pytest.raises(StateError):
        unpack(bytes(data))


def test_random_numbers_go_on():
    import random  # noqa: PLC0415 - the generator under test

    state = unpack(pack(random_state()))
    drawn = (random.random(), np.random.rand(), torch.rand(3).tolist())  # noqa: NPY002, S311
    set_random_state(state)
    assert drawn == (random.random(), np.random.rand(), torch.rand(3).tolist())  # noqa: NPY002, S311
