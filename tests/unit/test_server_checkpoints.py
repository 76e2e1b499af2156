"""A server's checkpoints are of one moment, however late the disk's answers to older ones come."""

import io
import select
import threading

import pytest
from durable_server import END_S, Server, begun

import psq_server.store
from psq.config import ServerConfig
from psq.durable import Journal
from psq.durable.checkpoint import list_checkpoints, open_checkpoint
from psq.errors import ConfigError
from psq.plan import Plan
from psq.presets import preset
from psq_server.line_log import LineLog
from psq_server.opening import open_state
from psq_server.state import Settings
from psq_server.store import Store

PLAN = Plan.of([("x", (40, 30)), ("b", (7,))], preset("server-adam"), 2)


class Writer:
    """The thread of checkpoints, which goes on at two places when it is let."""

    def __init__(self, monkeypatch):
        self.may_tidy, self.may_write = threading.Event(), threading.Event()
        self.tidied, self.written = [], []
        tidy, write = Store._tidy, psq_server.store.write_checkpoint

        def slow_tidy(store):
            self.tidied.append(store.version)
            assert self.may_tidy.wait(END_S)
            return tidy(store)

        def slow_write(folder, version, *given):
            assert not version or self.may_write.wait(END_S)
            self.written.append(version)
            return write(folder, version, *given)

        monkeypatch.setattr(Store, "_tidy", slow_tidy)
        monkeypatch.setattr(psq_server.store, "write_checkpoint", slow_write)


def wait_for(server, condition):
    while not condition():
        assert select.select([server.store.fd], [], [], END_S)[0], "the disk did not answer"
        server._hear()


def make_round(server, speakers, version):
    for speaker in speakers:
        speaker.push(version)
    wait_for(server, lambda: not server.commits._gate.waiting)
    assert server.version == version + 1


def kept(server):
    return server.log.getvalue().count("event=checkpointed")


@pytest.mark.parametrize("level", ["journal", "checkpoint"])
def test_an_answer_to_an_older_checkpoint_does_not_let_a_newer_one_move(
    tmp_path, monkeypatch, level
):
    """The first one is there, and its copy elsewhere takes long: meanwhile the next is begun."""
    writer = Writer(monkeypatch)
    server, speakers = begun(tmp_path / "state", PLAN, checkpoint_every=1, durability=level)
    make_round(server, speakers, 0)
    before = {name: array.copy() for name, array in server.weights.still().items()}
    assert (writer.tidied, writer.written, kept(server)) == ([0], [0], 0)
    writer.may_tidy.set()
    wait_for(server, lambda: kept(server) == 1)  # the answer to the first, at last
    make_round(server, speakers, 1)
    assert server.weights.still()["x.0"].tobytes() != before["x.0"].tobytes()
    writer.may_write.set()
    wait_for(server, lambda: kept(server) == 2)
    server.crash()
    [path] = [
        one.path for one in list_checkpoints(server.directory.checkpoints) if one.version == 1
    ]
    found = open_checkpoint(path).read_all()
    assert found.keys() == before.keys()
    assert [name for name in before if found[name].tobytes() != before[name].tobytes()] == []
    came_back = Server(tmp_path / "state", PLAN)
    assert came_back.version == (2 if level == "journal" else came_back.found.checkpoint)
    came_back.crash()


def test_rounds_from_before_the_newest_checkpoint_stay_for_the_one_before(tmp_path, monkeypatch):
    """Killed between a checkpoint and the journal's segment for it; then that checkpoint rots."""
    monkeypatch.setattr(Journal, "start_segment", lambda _self, _version: None)
    server, speakers = begun(tmp_path / "state", PLAN, checkpoint_every=3)
    for version in range(3):
        make_round(server, speakers, version)
    wait_for(server, lambda: not server.state._world.is_writing)
    before = server.everything()
    server.crash()
    second = Server(tmp_path / "state", PLAN)
    assert (second.found.checkpoint, second.found.recovered.rounds) == (3, 0)
    second.crash()
    newest = list_checkpoints(second.directory.checkpoints)[0]
    assert newest.version == 3
    (newest.path / "arrays-00000.bin").write_bytes(b"rotten")
    third = Server(tmp_path / "state", PLAN)
    assert [event for event, _ in third.notes] == ["rotten-checkpoint"]
    assert (third.found.checkpoint, third.found.recovered.rounds) == (0, 3)
    assert third.everything()[0] == before[0]
    third.crash()


def test_a_url_that_nothing_can_reach_is_refused_before_there_is_a_job(tmp_path):
    config = ServerConfig(state_dir=str(tmp_path / "state"), checkpoint_url="unheard-of://bucket")
    with pytest.raises(ConfigError, match=r"unheard-of://bucket cannot be reached"):
        open_state(config, Settings(bytes(16)), LineLog(io.StringIO()))
    assert not (tmp_path / "state").exists()
