import json

import durable_life
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from psq.durable.checkpoint import list_checkpoints, write_checkpoint
from psq.durable.directory import StateDirectory
from psq.errors import EXIT_STATE, StateError, UsageError
from psq_worker.ckpt import EXIT_DIFFERENT
from psq_worker.cli import psq

META = {"parameters": {"w": {"shape": [2], "pieces": [["x", 1, 3]]}}}


def run(*words):
    """(exit code, stdout, stderr) of psq ckpt; psq's own errors are raised."""
    done = CliRunner().invoke(psq, ["ckpt", *map(str, words)], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.return_value or 0, done.stdout, done.stderr


@pytest.fixture
def state(tmp_path):
    """A state directory after 9 rounds: checkpoints of versions 6 and 8, and a journal."""
    path = tmp_path / "state"
    durable_life.live(path, 9, lambda _: None)
    return path


def spoil(path, at=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def newest(state):
    return list_checkpoints(state / "checkpoints")[0].path


def test_ls_shows_checkpoints_newest_first_and_the_journal(state):
    code, out, err = run("ls", state)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["version", "arrays", "MB", "checkpoint"]
    assert lines[1].split()[:4] == ["8", "2", "0.0", "current"]
    assert lines[2].split()[0] == "6"
    assert lines[3].startswith("journal: 2 files, 0.0 MB, after version 6")


def test_ls_as_json_is_whole(state):
    spoil(newest(state) / "manifest.json")
    found = json.loads(run("ls", state, "--json")[1])
    assert [row["version"] for row in found["checkpoints"]] == [8, 6]
    assert "damaged" in found["checkpoints"][0]["problem"]
    assert found["checkpoints"][1]["bytes"] == 20_000 + 8 + 1
    assert [one["after_version"] for one in found["journal"]] == [6, 8]


def test_a_place_is_a_directory_its_folder_or_one_checkpoint(state):
    for place, versions in ((state / "checkpoints", [8, 6]), (newest(state), [8])):
        found = json.loads(run("ls", place, "--json")[1])
        assert [row["version"] for row in found["checkpoints"]] == versions
        assert found["journal"] == []


def test_a_place_that_is_none_is_named(tmp_path):
    with pytest.raises(StateError, match="there is no folder"):
        run("ls", tmp_path / "none")
    with pytest.raises(StateError, match="there is no checkpoint in"):
        run("verify", tmp_path)


def test_the_folder_of_a_whole_job_is_answered_with_those_of_its_servers(tmp_path):
    for name in ("server-0", "server-1", "worker-0"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(StateError, match=r"name \S+/server-0 or \S+/server-1$"):
        run("ls", tmp_path)


def test_verify_reads_everything_and_says_what_is_wrong(state):
    code, out, err = run("verify", state)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ok"] * 4
    assert "journal: 3 records" in err
    spoil(newest(state) / "arrays-00000.bin", 30)
    code, out, err = run("verify", state)
    assert code == EXIT_STATE
    assert f"bad {newest(state).name}" in out
    assert "array 'x' is not what was written" in err


def test_verify_finds_a_spoiled_journal_and_forgives_a_torn_one(state):
    segments = sorted((state / "journal").iterdir())
    size = segments[-1].stat().st_size
    with segments[-1].open("ab") as file:
        file.write(b"PSQR half a header")
    code, _, err = run("verify", state)
    assert code == 0
    assert f"torn at byte {size}, 18 bytes" in err
    spoil(segments[0], 5000)
    found = json.loads(run("verify", state, "--json")[1])
    assert found["ok"] is False
    assert "damaged at byte" in found["problems"]["journal"][0]


def test_verify_names_a_torn_pointer(state):
    (state / "checkpoints" / "CURRENT").write_bytes(b"torn")
    code, out, err = run("verify", state)
    assert code == EXIT_STATE
    assert "bad CURRENT" in out
    assert "CURRENT is damaged" in err


def test_export_writes_the_newest_weights(tmp_path):
    x = np.arange(4, dtype=np.float32)
    write_checkpoint(tmp_path, 1, {"x": x}, META)
    write_checkpoint(tmp_path, 2, {"x": x * 10}, META)
    out = tmp_path / "w.safetensors"
    _, _, err = run("export", tmp_path, "-o", out)
    assert load_file(out)["w"].tolist() == [10, 20]
    assert "of checkpoint-00000000000000000002-0000" in err
    spoil(tmp_path / "checkpoint-00000000000000000002-0000" / "manifest.json")
    run("export", tmp_path, "-o", out)
    assert load_file(out)["w"].tolist() == [1, 2], "the newest valid one"


def test_export_of_a_rotten_checkpoint_names_the_newest_whole_one_and_how_to_have_it(tmp_path):
    x = np.arange(4, dtype=np.float32)
    paths = [write_checkpoint(tmp_path, version, {"x": x * version}, META) for version in (1, 2, 3)]
    out = tmp_path / "w.safetensors"
    for path in paths[1:]:
        spoil(path / "arrays-00000.bin", 3)
    for place in (tmp_path, paths[1]):
        with pytest.raises(
            StateError, match=r"not what was written.*whole one.*version 1"
        ) as error:
            run("export", place, "-o", out)
        assert not out.exists()
    words = str(error.value).rpartition("psq ckpt ")[2].split()
    run(*words)
    assert load_file(out)["w"].tolist() == [1, 2]
    spoil(paths[0] / "arrays-00000.bin", 3)
    with pytest.raises(StateError, match=r"no checkpoint in .* is whole: take one from a copy"):
        run("export", tmp_path, "-o", out)


def test_export_to_a_place_that_cannot_be_written_blames_no_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 1, {"x": np.arange(4, dtype=np.float32)}, META)
    write_checkpoint(tmp_path, 2, {"x": np.arange(4, dtype=np.float32)}, META)
    with pytest.raises(StateError) as error:
        run("export", tmp_path, "-o", tmp_path / "none" / "w.safetensors")
    assert "whole" not in str(error.value)


def test_diff_ends_with_one_where_two_differ(tmp_path):
    a = write_checkpoint(tmp_path, 1, {"x": np.zeros(3)}, {})
    b = write_checkpoint(tmp_path, 2, {"x": np.array([0, 0.5, 0])}, {"v": 2})
    assert run("diff", a, a) == (0, "equal\n", "")
    code, out, _ = run("diff", a, b)
    assert code == EXIT_DIFFERENT
    assert out == "v  meta\nx  values: 1 of 3, by up to 0.5\n"
    code, out, _ = run("diff", a, b, "--json")
    assert [row["what"] for row in json.loads(out)] == ["meta", "values"]
    assert code == EXIT_DIFFERENT


def test_prune_keeps_what_recovery_needs(state):
    with StateDirectory.open(state, create=False) as opened:
        for version in (20, 30):
            write_checkpoint(opened.checkpoints, version, durable_life.arrays(version), {})
    code, out, err = run("prune", state, "--keep", 3)
    assert (code, err) == (0, "kept 3 checkpoints\n")
    assert out.count("removed") == 2, "a checkpoint, and the journal before the oldest one kept"
    found = json.loads(run("prune", state, "--json")[1])
    assert len(found["kept"]) == 2
    with pytest.raises(UsageError, match="at least 2"):
        run("prune", state, "--keep", 1)


def test_prune_is_refused_while_somebody_has_the_directory(state):
    with (
        StateDirectory.open(state, create=False),
        pytest.raises(StateError, match="open in another process"),
    ):
        run("prune", state)


def test_copies_come_back_from_a_url(state, tmp_path):
    url = f"file://{tmp_path}/backup"
    copied = run("copy", state, url)[1].strip()
    assert copied == f"{url}/{newest(state).name}"
    assert run("ls", url)[1].strip() == copied
    (tmp_path / "other").mkdir()
    run("copy", copied, tmp_path / "other")
    assert run("diff", state, tmp_path / "other") == (0, "equal\n", "")
    run("copy", copied, state)
    assert newest(state).name.endswith("-0001")
    with pytest.raises(UsageError, match="either SOURCE or TARGET is a URL"):
        run("copy", state, tmp_path)
