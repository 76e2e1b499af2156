"""A checkpoint or journal that is whole on disk and was not written by this kind of server."""

from __future__ import annotations

import copy
import io
import shutil

import numpy as np
import pytest
from durable_server import begun
from hypothesis import given, settings
from hypothesis import strategies as st

from psq.config import ServerConfig
from psq.durable import StateDirectory
from psq.durable.checkpoint import list_checkpoints, load_checkpoint, write_checkpoint
from psq.errors import StateError
from psq.plan import Plan
from psq.presets import preset
from psq_server.line_log import LineLog
from psq_server.opening import open_state
from psq_server.recovery import known, replay
from psq_server.state import Settings

PLAN = Plan.of([("x", (4, 3)), ("b", (7,))], preset("server-adam"), 2)
OTHERS = (None, "text", -7, 1.5, b"", [], {}, [["m", []]], {"a": 1})


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A state directory after two rounds, with one checkpoint of each; (path, arrays, meta)."""
    path = tmp_path_factory.mktemp("kept") / "state"
    server, speakers = begun(path, PLAN, checkpoint_every=1)
    for version in range(2):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
    server.crash()
    arrays, meta = load_checkpoint(list_checkpoints(path / "checkpoints")[0].path)
    return path, arrays, meta


def places(value, path=()):
    """Where in a meta something stands."""
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(meta, path, value):
    """The meta with another value there; without it, if that is Ellipsis."""
    meta = copy.deepcopy(meta)
    inner = meta
    for key in path[:-1]:
        inner = inner[key]
    if value is Ellipsis:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return meta


def open_with(folder, kept, meta):
    """Open a copy of the directory in which every checkpoint has this meta."""
    path, arrays, _ = kept
    state = folder / "state"
    shutil.rmtree(state, ignore_errors=True)
    shutil.copytree(path, state)
    shutil.rmtree(state / "checkpoints")
    (state / "checkpoints").mkdir()
    write_checkpoint(state / "checkpoints", 2, arrays, meta)
    log = io.StringIO()
    config = ServerConfig(state_dir=str(state))
    opened = open_state(config, Settings(bytes(16)), LineLog(log))
    opened.store.close()
    return opened


def test_what_was_kept_is_taken_up(tmp_path, kept):
    assert open_with(tmp_path, kept, kept[2]).weights is not None


@pytest.mark.parametrize(
    "path",
    [("server",), ("facts",), ("server", "world"), ("server", "plan"), ("server", "members"),
     ("server", "world", "version"), ("facts", "shards"), ("facts", "counts")],
    ids="/".join,
)  # fmt: skip
@pytest.mark.parametrize("value", [..., None, "text", 7], ids=repr)
def test_a_meta_that_lacks_something_or_has_another_kind_is_refused(tmp_path, kept, path, value):
    with pytest.raises(StateError, match=r"none can be read|not what a server of this version"):
        open_with(tmp_path, kept, put(kept[2], path, value))


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_stands_in_a_meta_is_taken_up_or_refused(tmp_path_factory, kept, data):
    where = data.draw(st.sampled_from(sorted(places(kept[2]), key=repr)))
    value = data.draw(st.sampled_from([..., *OTHERS]))
    folder = tmp_path_factory.mktemp("any")
    refused: list[StateError] = []
    try:
        open_with(folder, kept, put(kept[2], where, value))
    except StateError as error:
        refused.append(error)
    shutil.rmtree(folder)
    assert all(str(folder) in str(error) for error in refused)


def test_the_directory_of_something_else_is_refused_by_what_to_do(tmp_path):
    with StateDirectory.open(tmp_path / "state", create=True) as directory:
        write_checkpoint(directory.checkpoints, 5, {"x": np.zeros(3, np.float32)}, {"slots": 3})
    config = ServerConfig(state_dir=str(tmp_path / "state"))
    with pytest.raises(StateError, match=r"none can be read.*name the state directory of a server"):
        open_state(config, Settings(bytes(16)), LineLog(io.StringIO()))


class Record:
    """One of a journal."""

    number, kind, buffers = 1, 3, ()

    def __init__(self, meta):
        self.meta = meta


@pytest.mark.parametrize("meta", [{}, {"version": "1"}, {"version": 3, "crcs": {}}])
def test_a_journal_of_something_else_is_refused_too(meta):
    captured = {"world": {"version": 2}, "members": {}}
    refused = pytest.raises(StateError, match="the journal in j is whole, and not what")
    with refused, known("the journal in j"):
        replay(captured, [Record(meta)], None)
