"""Level replay: a killed server asks its workers for what they said, and is what it was."""

from dataclasses import replace

import pytest
from durable_server import Server, Speaker, again, begun

from psq.groups import DEFAULT_GROUP, Group
from psq.plan import Plan
from psq.presets import PRESETS, preset
from psq_proto.messages import NO_VERSION, Flags, Heartbeat, MessageType, Status, Verdict
from psq_server.gate import RecordKind
from psq_server.state import StopRequested, Tick

SPECS = [("table", (70, 60)), ("bias", (40,)), ("head", (10, 30))]
LARGE = [("table", (300, 300)), ("bias", (40,)), ("head", (10, 30))]
GROUPS = (DEFAULT_GROUP, Group("slow", lr=0.5))
SOON = {
    "shared-adam": ("first=2", "period=4"),
    "shared-direction": ("first=2", "period=4"),
    "onebit-adam": ("steps=3",),
}
ROUNDS = 7
KEPT_AT = 3
LEVEL = {"durability": "replay", "checkpoint_every": KEPT_AT}
PLAIN = [name for name in PRESETS if preset(name).aggregate.kind != "coded"]


def recipe_of(name):
    """A recipe whose kinds of rounds all come soon."""
    changes = [
        f"{way}.choice.{one}" for one in SOON.get(name, ()) for way in ("uplink", "downlink")
    ]
    return preset(name).with_options(*changes)


def plan_of(recipe, world_size=4, specs=SPECS, **job):
    return Plan.of(specs, recipe, world_size, groups=GROUPS, members=[0, 1, 1], **job)


def play(path, plan, rounds=ROUNDS, **settings):
    """Some rounds, two of them checkpoints; the server as it is in the end."""
    server, speakers = begun(path, plan, **{**LEVEL, **settings})
    for version in range(rounds):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
        assert server.version == version + 1, server.state.story()
    return server, speakers


def killed(path, plan, **settings):
    """A server that was killed, what it was, and what its workers have kept."""
    server, speakers = play(path, plan, **settings)
    before = server.everything()
    server.crash()
    return before, [speaker.said for speaker in speakers]


def same(one, other):
    """What is not of a connection, or of who has joined since."""
    assert one[0] == other[0]
    assert one[1] == other[1]
    for captured in (one[2], other[2]):
        captured["world"].pop("counts")
        captured["world"].pop("durations_s")
    assert one[2]["world"] == other[2]["world"]


def bare(everything):
    """Without frames, whose headers name the epoch."""
    arrays, facts, captured = everything
    arrays = {k: v[100:] if k.startswith("frame.") else v for k, v in arrays.items()}
    return arrays, facts, captured


@pytest.mark.parametrize("name", PLAIN)
def test_what_the_workers_say_again_gives_the_bytes_that_it_gave(tmp_path, name):
    plan = plan_of(recipe_of(name))
    before, said = killed(tmp_path / "state", plan)
    server, speakers = again(tmp_path / "state", plan, ROUNDS - 1, said, **LEVEL)
    assert server.found.recovered.rounds == 0
    assert len(server.found.recovered.owed) == ROUNDS - server.found.checkpoint > 0
    server.settle()
    assert all(speaker.recalls for speaker in speakers)
    assert server.state._world.collection is None, server.state.story()
    same(bare(before), bare(server.everything()))
    for version in (ROUNDS, ROUNDS + 1):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
    assert server.version == ROUNDS + 2
    server.crash()


COMPOSED = {
    "krum": ("fp32-sgd", ["aggregate=krum", "aggregate.f=1"], {"world_size": 5}),
    "kardam of hostile workers": ("kardam", ["aggregate.f=1"], {"world_size": 4}),
    "turns": ("server-adam", [], {"every": 2, "specs": LARGE}),
    "two servers": ("qadam-1bit", [], {"servers": 2, "server": 1, "specs": LARGE}),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_so_do_composed_recipes(tmp_path, name):
    base, changes, job = COMPOSED[name]
    recipe, job = recipe_of(base).with_options(*changes), dict(job)
    every = job.pop("every", 1)
    if every > 1:
        recipe = replace(recipe, uplink=replace(recipe.uplink, every=every))
    plan = plan_of(recipe, **job)
    before, said = killed(tmp_path / "state", plan)
    server, _ = again(tmp_path / "state", plan, ROUNDS - 1, said, **LEVEL)
    server.settle()
    same(bare(before), bare(server.everything()))
    server.crash()


@pytest.mark.parametrize("consistency", ["asp", "ssp:3"])
def test_so_do_rounds_of_single_contributions(tmp_path, consistency):
    plan = plan_of(recipe_of("server-adam"), consistency=consistency)
    server, speakers = begun(tmp_path / "state", plan, **{**LEVEL, "checkpoint_every": 100})
    bases = dict.fromkeys(range(4), 0)
    for turn in (0, 1, 2, 3, 0, 1, 2, 3, 2, 1, 0, 3):
        if bases[turn] in speakers[turn].verdicts:
            continue  # it waits for a verdict
        speakers[turn].push(bases[turn])
        server.settle()
        for rank, speaker in enumerate(speakers):
            told = [m.header.version for m in speaker.heard if isinstance(m.body, Verdict)]
            bases[rank] = max([bases[rank], *told])
    assert server.version >= 2
    before = server.everything()
    server.crash()
    said = [speaker.said for speaker in speakers]
    came_back = Server(tmp_path / "state", plan, **LEVEL)
    assert came_back.found.recovered.owed
    for rank, kept in enumerate(said):
        speaker = Speaker(came_back, rank)
        speaker.said = kept
        speaker.join(max(speakers[rank].verdicts, default=-1))
    came_back.settle()
    same(bare(before), bare(came_back.everything()))
    came_back.crash()


# ---- amid it


def small(**job):
    return plan_of(recipe_of("server-adam"), world_size=2, **job)


def came_back(path, plan=None, **settings):
    """A server that lacks its last round, none of whose workers has joined yet; what they kept."""
    plan = plan or small()
    before, said = killed(path, plan)
    server = Server(path, plan, **{**LEVEL, **settings})
    assert [past.number for past in server.found.recovered.owed] == [ROUNDS - 1]
    return server, said, before


def joined(server, rank, said, resolved=ROUNDS - 1, **attributes):
    speaker = Speaker(server, rank)
    speaker.said = said[rank]
    for name, value in attributes.items():
        setattr(speaker, name, value)
    return speaker.join(resolved)


def test_a_record_of_a_round_has_no_payloads_and_is_small(tmp_path):
    server, _ = begun(tmp_path / "state", small(specs=LARGE), **LEVEL)
    said = []
    append = server.store.append
    server.store.append = lambda record: (said.append(record), append(record))
    for speaker in server.peers.values():
        speaker.push(0)
    server.settle()
    kinds = [record.kind for record in said]
    assert kinds == [RecordKind.SAID, RecordKind.ROUND]
    assert not any(record.buffers for record in said)
    assert server.store.journal_bytes == 0
    server.crash()


def test_until_all_is_said_again_no_weights_leave_and_no_round_closes_by_name(tmp_path):
    server, said, _ = came_back(tmp_path / "state")
    first = joined(server, 0, said)
    first.send(MessageType.PULL, version=NO_VERSION)
    first.push(ROUNDS)
    first.send(MessageType.HEARTBEAT, Heartbeat())
    server.settle()
    kinds = [message.header.type for message in first.heard]
    assert MessageType.WEIGHTS not in kinds
    assert MessageType.VERDICT not in kinds
    status = next(m.body for m in reversed(first.heard) if isinstance(m.body, Status))
    wait = "waiting for rank 1 of 2 for 0 s, last seen 0.0 s ago (to say again what it said in"
    assert status.text == f"{wait} round {ROUNDS - 1} and after)"
    snapshot = server.state.snapshot(server.now_s)
    assert (snapshot.status, snapshot.version) == ("recovering", ROUNDS)
    second = joined(server, 1, said)
    server.settle()
    assert server.state.snapshot(server.now_s).status == "running"
    kinds = [message.header.type for message in first.heard]
    assert kinds.count(MessageType.WEIGHTS) >= len(server.plan.owned)
    second.push(ROUNDS)
    server.settle()
    assert server.version == ROUNDS + 1
    server.crash()


def test_one_that_joins_late_and_has_nothing_gets_the_weights_that_were(tmp_path):
    plan = small()
    server, speakers = play(tmp_path / "state", plan)
    before = server.everything()
    server.crash()
    said = [speaker.said for speaker in speakers]
    server = Server(tmp_path / "state", plan, **LEVEL, min_workers=1)
    joined(server, 0, said)
    second = joined(server, 1, said)
    server.settle()
    same(bare(before), bare(server.everything()))
    del server.peers[second.name]
    newcomer = Speaker(server, 1, lineage=777).join()
    newcomer.send(MessageType.PULL, version=NO_VERSION)
    server.settle()
    came = [m.body for m in newcomer.heard if m.header.type is MessageType.WEIGHTS]
    assert sum(len(body) for body in came) == 4 * sum(shard.numel for shard in plan.owned)
    server.crash()


def test_a_second_crash_amid_it_changes_nothing(tmp_path):
    server, said, before = came_back(tmp_path / "state")
    joined(server, 0, said)
    server.settle()
    server.crash()
    server, _ = again(tmp_path / "state", server.plan, ROUNDS - 1, said, **LEVEL)
    server.settle()
    same(bare(before), bare(server.everything()))
    server.crash()


def test_what_is_said_again_twice_or_unasked_does_no_harm(tmp_path):
    server, said, before = came_back(tmp_path / "state")
    first = joined(server, 0, said)
    server.replies.extend(first.again(*first.recalls[0]))
    server.replies.extend(first.again(0, [0]))
    server.settle()
    joined(server, 1, said)
    server.settle()
    server.replies.extend(first.again(*first.recalls[0]))
    server.settle()
    same(bare(before), bare(server.everything()))
    assert server.went_back is None
    server.crash()


def test_one_that_was_not_heard_is_asked_again_ever_more_rarely(tmp_path):
    server, said, _ = came_back(tmp_path / "state")
    first = Speaker(server, 0)
    first.said = said[0]
    first.again = lambda *_: []  # what it says is lost on the way
    first.join(ROUNDS - 1)
    for _ in range(40):
        first.send(MessageType.HEARTBEAT, Heartbeat())
    server.settle()
    assert len(first.recalls) == 1 + len((2, 4, 8, 16, 32))
    server.crash()


@pytest.mark.parametrize("fault", ["forgets", "other bytes", "another codec"])
def test_what_cannot_be_said_again_is_lost_loudly_and_the_server_goes_back(tmp_path, fault):
    server, said, _ = came_back(tmp_path / "state")
    if fault != "forgets":
        for key, (codec, payload) in said[1].items():
            changed = bytes(payload[:-1]) + bytes([payload[-1] ^ 1])
            said[1][key] = (codec, changed) if fault == "other bytes" else (codec + 1, payload)
    joined(server, 0, said)
    joined(server, 1, said, forgets=fault == "forgets")
    server.settle()
    assert server.went_back is not None
    assert server.went_back.version == ROUNDS - 1
    assert f"rank 1 cannot say again what it said in rounds {ROUNDS - 1} to" in (
        server.went_back.text
    )
    assert "event=lost" in server.log.getvalue()
    server.crash()
    server = Server(tmp_path / "state", server.plan, goes_back=True, **LEVEL)
    assert server.version == ROUNDS - 1
    assert server.state._world.collection is None
    speakers = [Speaker(server, rank, lineage=50 + rank).join() for rank in range(2)]
    for speaker in speakers:
        speaker.send(MessageType.PULL, version=NO_VERSION)
        speaker.push(ROUNDS - 1)
    server.settle()
    assert server.version == ROUNDS
    server.crash()
    server = Server(tmp_path / "state", server.plan, **LEVEL)
    assert server.version == ROUNDS
    assert len(server.found.recovered.owed) <= 1, "what was lost does not come back"
    server.crash()


def test_a_rank_that_has_left_and_stays_silent_is_lost_after_a_lease(tmp_path):
    server, said, _ = came_back(tmp_path / "state")
    joined(server, 0, said)
    second = Speaker(server, 1)
    second.again = lambda *_: []
    second.said = said[1]
    second.join(ROUNDS - 1).leave()
    server.settle()
    server.now_s += 9
    server.happen(Tick())
    assert server.went_back is None
    server.now_s += 2
    server.happen(Tick())
    assert server.went_back is not None
    assert "rank 1 cannot say again" in server.went_back.text
    assert "it has left" in server.went_back.text
    server.crash()


def test_one_that_has_said_goodbye_is_asked_too_and_the_job_ends_well(tmp_path):
    plan = small()
    server, speakers = play(tmp_path / "state", plan)
    speakers[0].leave()
    server.settle()
    speakers[0].heard.clear()
    speakers[0].send(MessageType.HEARTBEAT, Heartbeat())
    server.settle()
    assert not [m for m in speakers[0].heard if isinstance(m.body, Status)], "it has to stay"
    server.crash()
    server = Server(tmp_path / "state", plan, **LEVEL)
    said = [speaker.said for speaker in speakers]
    for rank in range(2):
        joined(server, rank, said, again=lambda *_: []).leave()
    assert server.stopped is None
    server.settle()
    assert server.stopped is None
    for speaker in list(server.peers.values()):
        del speaker.again
        server.replies.extend(speaker.again(*speaker.recalls[0]))
    server.settle()
    server.happen(Tick())
    server.settle()
    assert (server.stopped.reason, server.saved) == ("done", ROUNDS)
    server.crash()


def test_a_server_that_is_told_to_stop_amid_it_waits_a_little_and_saves_nothing(tmp_path):
    server, said, _ = came_back(tmp_path / "state")
    joined(server, 0, said)
    server.happen(StopRequested("SIGTERM"))
    assert server.stopped is None
    server.now_s += 3
    server.happen(Tick())
    server.settle()
    assert server.stopped.reason == "stopped"
    assert server.saved is None
    assert "event=not-saved" in server.log.getvalue()
    assert server.store.version == ROUNDS - 1
    server.crash()


def test_one_that_is_told_to_stop_and_hears_all_in_time_keeps_all(tmp_path):
    server, said, _ = came_back(tmp_path / "state")
    joined(server, 0, said)
    server.happen(StopRequested("SIGTERM"))
    joined(server, 1, said)
    server.settle()
    assert (server.stopped.reason, server.saved) == ("stopped", ROUNDS)
    server.crash()
    assert not Server(tmp_path / "state", server.plan, **LEVEL).found.recovered.owed


def test_an_elastic_job_goes_back_when_a_rank_is_given_up_amid_it(tmp_path):
    server, said, _ = came_back(tmp_path / "state", min_workers=1, grace_s=1.0)
    first = joined(server, 0, said)
    for _ in range(120):
        server.now_s += 0.1
        first.send(MessageType.HEARTBEAT, Heartbeat())
        server.happen(Tick())
        if server.went_back is not None:
            break
    assert "rank 1" in server.went_back.text
    assert "it was given up" in server.went_back.text
    server.crash()


def test_frames_of_the_epoch_before_are_stale_and_take_nothing(tmp_path):
    plan = small()
    server, speakers = play(tmp_path / "state", plan)
    server.crash()
    old = speakers[0]
    server = Server(tmp_path / "state", plan, **LEVEL)
    server.peers[old.name], old.server = old, server
    old.send(MessageType.AGAIN, flags=Flags.SKIP, seq=ROUNDS - 1)
    server.settle()
    assert server.went_back is None
    assert old.session.state.value == "idle", "it was told to join again"
    server.crash()


# ---- what workers keep is bounded


def test_workers_are_told_of_a_checkpoint_when_it_is_on_disk_and_not_before(tmp_path):
    server, speakers = begun(tmp_path / "state", small(), **LEVEL)
    assert speakers[0].heard[1].header.seq == 1, "the initial weights' checkpoint comes first"
    keep = server.store.keep
    late = []
    server.store.keep = lambda *given: late.append(given)
    for version in range(KEPT_AT + 1):
        for speaker in speakers:
            speaker.push(version)
        while server.version == version:
            server._hear()
    while server.commits._gate.waiting:
        server._hear()
    speakers[0].send(MessageType.HEARTBEAT, Heartbeat())
    assert speakers[0].heard[-1].header.seq == 1, "version 3 was announced, and is not on disk"
    keep(*late.pop())
    server.settle()
    speakers[0].send(MessageType.HEARTBEAT, Heartbeat())
    assert speakers[0].heard[-1].header.seq == 1 + KEPT_AT
    server.crash()


def test_rounds_wait_by_name_rather_than_let_workers_keep_too_much(tmp_path):
    server, speakers = begun(
        tmp_path / "state", small(), durability="replay", kept_bytes=1, checkpoint_s=1e9
    )
    keep, late = server.store.keep, []
    server.store.keep = lambda *given: late.append(given)

    def say(version):
        for speaker in speakers:
            speaker.push(version)
        while server.commits._gate.waiting:
            server._hear()

    say(0)
    say(1)
    assert (server.version, len(late)) == (2, 1), "two rounds whatever they take"
    say(2)
    assert server.version == 2
    text = server.state.snapshot(server.now_s).text
    assert text.startswith("waiting for a checkpoint on disk: workers keep what they said in 2 rou")
    keep(*late.pop())
    while server.version == 2:
        server._hear()
    assert server.version == 3
    server.crash()


def test_a_checkpoint_that_rounds_wait_for_is_tried_again(tmp_path):
    server, speakers = begun(
        tmp_path / "state", small(), durability="replay", kept_bytes=1, checkpoint_s=1e9
    )
    keep, tries = server.store.keep, []

    def fails(version, arrays, meta, ticket):
        tries.append(version)
        if len(tries) < 3:
            arrays = {"x": "no array"}
        keep(version, arrays, meta, ticket)

    server.store.keep = fails
    for version in range(2):
        for speaker in speakers:
            speaker.push(version)
        server.settle()
    for _ in range(3):
        server.now_s += 1.5
        server.happen(Tick())
        server.settle()
    assert len(tries) == 3
    assert server.store.version == tries[-1]
    server.crash()


def test_ranks_that_compute_the_same_are_refused_by_name(tmp_path):
    plan = plan_of(recipe_of("coded"))
    server = Server(tmp_path / "state", plan, **LEVEL)
    speaker = Speaker(server, 0)
    with pytest.raises(Exception, match="durability replay: with aggregate=coded"):
        speaker.join()
    server.crash()
