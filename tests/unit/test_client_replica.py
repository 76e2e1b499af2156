"""Which WEIGHTS frames are applied."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq.client.replica import ReplicaVersions
from psq.codec import ShardCodec, get_codec
from psq.errors import RemotePayloadError
from psq.layout import PART_NUMEL
from psq.plan import Plan
from psq.presets import preset
from psq_proto.frames import Header
from psq_proto.messages import Flags, MessageType

NUMEL = PART_NUMEL + 10  # one shard in few bits, two parts in f32
DENSE = get_codec("fp32").wire_id


def replica(recipe: str = "server-adam", numel: int = NUMEL) -> tuple[ReplicaVersions, Plan]:
    plan = Plan.of([("w", (numel,)), ("b", (3,))], preset(recipe), 1)
    return ReplicaVersions(plan), plan


def weights(version: int, shard: int = 0, part: int = 0, **fields) -> Header:
    defaults = {"flags": Flags.FULL, "codec": DENSE}
    return Header(
        MessageType.WEIGHTS, version=version, shard=shard, part=part, **{**defaults, **fields}
    )


def delta(version: int, shard: int = 0) -> Header:
    codec = get_codec(preset("server-adam").downlink.codec)
    return weights(version, shard, flags=Flags.DELTA, codec=codec.wire_id)


def payload_bytes(plan: Plan, shard: int = 0) -> int:
    codec = get_codec(plan.recipe.downlink.codec)
    return ShardCodec(codec, plan.layout.shards[shard]).nbytes


def take_full(versions: ReplicaVersions, version: int) -> None:
    for part, numel in enumerate((PART_NUMEL, 13)):
        header = weights(version, part=part)
        assert versions.wants(header, 4 * numel)
        versions.took(header)


def test_a_new_replica_has_nothing():
    versions, _ = replica()
    assert versions.version == -1


def test_dense_weights_count_when_every_part_is_there():
    versions, _ = replica()
    first, second = weights(4, part=0), weights(4, part=1)
    versions.took(second)
    assert versions.version == -1
    assert not versions.wants(second, 4 * 13)
    assert versions.wants(first, 4 * PART_NUMEL)
    versions.took(first)
    assert versions.version == 4


def test_parts_of_another_version_do_not_mix():
    versions, _ = replica()
    versions.took(weights(4, part=0))
    versions.took(weights(5, part=1))
    assert versions.version == -1
    assert not versions.wants(weights(4, part=1), 4 * 13)
    assert versions.wants(weights(5, part=0), 4 * PART_NUMEL)


def test_a_replica_that_is_half_overwritten_has_no_version_to_add_to():
    versions, plan = replica()
    take_full(versions, 2)
    versions.took(weights(3, part=0))
    assert versions.version == -1
    assert not versions.wants(delta(3), payload_bytes(plan))


def test_a_delta_is_applied_to_the_version_before_it_and_once():
    versions, plan = replica()
    nbytes = payload_bytes(plan)
    assert not versions.wants(delta(1), nbytes)  # nothing to add to
    take_full(versions, 0)
    assert not versions.wants(delta(2), nbytes)  # a gap
    assert versions.wants(delta(1), nbytes)
    versions.took(delta(1))
    assert not versions.wants(delta(1), nbytes)  # a copy
    assert versions.version == 1


def test_whole_weights_close_a_gap_and_old_ones_are_left():
    versions, _ = replica()
    take_full(versions, 2)
    assert not versions.wants(weights(2), 4 * PART_NUMEL)
    assert not versions.wants(weights(1), 4 * PART_NUMEL)
    take_full(versions, 7)
    assert versions.version == 7


def test_quantized_weights_replace_any_version():
    versions, plan = replica("qadam")
    codec = get_codec(plan.recipe.downlink.codec).wire_id
    for version in (0, 3):
        header = weights(version, codec=codec)
        assert versions.wants(header, payload_bytes(plan))
        versions.took(header)
    assert versions.version == 3


@pytest.mark.parametrize(
    ("header", "nbytes", "words"),
    [
        (weights(0, shard=1), 12, "shard 1 came, the plan has 1 shards"),
        (weights(0, part=2), 12, "part 2 came with 12 bytes, the plan says 0"),
        (weights(0), 12, "came with 12 bytes, the plan says 1048576"),
        (delta(0), 12, "came with 12 bytes"),
        (weights(0, codec=get_codec("sign").wire_id), 12, "came as weights in codec"),
        (weights(0, flags=Flags.DELTA), 12, "came as a delta in codec"),
    ],
)
def test_a_frame_that_does_not_fit_the_plan_is_refused(header, nbytes, words):
    versions, _ = replica()
    with pytest.raises(RemotePayloadError, match=words):
        versions.wants(header, nbytes)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 1)), max_size=40))
def test_no_delta_is_ever_applied_twice_or_to_the_wrong_version(frames):
    versions, plan = replica()
    nbytes = payload_bytes(plan)
    values = [None, None]  # the version whose changes each half of the shard holds
    for is_delta, version, part in frames:
        header = delta(version) if is_delta else weights(version, part=part)
        size = nbytes if is_delta else 4 * (PART_NUMEL, 13)[part]
        if not versions.wants(header, size):
            continue
        versions.took(header)
        if is_delta:
            assert values == [version - 1] * 2
            values = [version] * 2
        else:
            values[part] = version
        whole = values[0] is not None and values[0] == values[1]
        assert versions.version == (values[0] if whole else -1)


def test_a_shard_that_is_not_due_counts_as_having_the_versions_until_it_is():
    recipe = preset("server-adam").with_codecs(uplink="sign").with_rhythm(every=2)
    plan = Plan.of([("w", (70_000,))], recipe, 1)
    versions = ReplicaVersions(plan)
    for shard in plan.owned:
        versions.took(weights(0, shard.index))
    assert versions.version == 0  # of the shards that round 0 moves
    assert set(versions.versions.values()) == {0, 1}
    for round_ in range(4):
        for shard in plan.due_shards(round_):
            size = payload_bytes(plan, shard)
            assert versions.version == round_
            assert not versions.wants(delta(round_, shard), size)
            assert versions.wants(delta(round_ + 1, shard), size)
            assert versions.misses(delta(round_ + 3, shard))
            versions.took(delta(round_ + 1, shard))
        assert versions.version == round_ + 1


def test_full_weights_of_a_shard_that_has_not_moved_since_are_not_wanted_again():
    recipe = preset("server-adam").with_codecs(uplink="sign").with_rhythm(every=2)
    plan = Plan.of([("w", (70_000,))], recipe, 1)
    versions = ReplicaVersions(plan)
    late, size = plan.due_shards(1)[0], 4 * plan.layout.shards[plan.due_shards(1)[0]].numel
    versions.took(weights(0, late))
    assert not versions.wants(weights(1, late), size)
    assert versions.wants(weights(2, late), size)


def mean(version: int, flags: Flags = Flags.MEAN) -> Header:
    codec = get_codec(preset("sign-majority").downlink.codec).wire_id
    nothing = bool(flags & Flags.SKIP)
    return weights(version, flags=flags, codec=0 if nothing else codec)


def test_a_mean_is_applied_once_and_to_the_version_before_it():
    versions, plan = replica("sign-majority")
    nbytes = payload_bytes(plan)
    take_full(versions, 2)
    assert not versions.wants(mean(2), nbytes)
    assert not versions.wants(mean(4), nbytes)
    assert versions.misses(mean(4))
    assert versions.wants(mean(3), nbytes)
    versions.took(mean(3))
    assert versions.version == 3
    assert not versions.wants(mean(3), nbytes)


def test_a_mean_of_nothing_has_no_body_and_moves_the_version():
    versions, _ = replica("sign-majority")
    take_full(versions, 2)
    nothing = mean(3, Flags.MEAN | Flags.SKIP)
    with pytest.raises(RemotePayloadError, match="came with 4 bytes, the plan says 0"):
        versions.wants(nothing, 4)
    assert versions.wants(nothing, 0)
    versions.took(nothing)
    assert versions.version == 3


@pytest.mark.parametrize("recipe", ["server-adam", "qadam"])
def test_a_mean_is_refused_where_the_server_moves_the_weights(recipe):
    versions, plan = replica(recipe)
    header = weights(1, flags=Flags.MEAN, codec=get_codec(plan.recipe.downlink.codec).wire_id)
    with pytest.raises(RemotePayloadError, match="came as a mean in codec"):
        versions.wants(header, payload_bytes(plan))


def test_weights_with_planes_count_when_every_part_of_every_plane_is_there():
    _, plan = replica("sign-majority")
    versions = ReplicaVersions(plan, planes=3)
    parts = [(part, 4 * (PART_NUMEL, 13)[part % 2]) for part in range(6)]
    for part, nbytes in parts:
        assert versions.version == -1
        header = weights(4, part=part)
        assert versions.wants(header, nbytes)
        versions.took(header)
    assert versions.version == 4
    with pytest.raises(RemotePayloadError, match="part 6 came with 52 bytes, the plan says 0"):
        versions.wants(weights(5, part=6), 52)


def test_an_answer_may_be_in_any_codec_that_the_plan_has_for_the_shard():
    versions, plan = replica("onebit-adam", numel=1000)
    versions.took(weights(0))
    sizes = {}
    for spec in plan.downlink_codecs(0):
        codec = get_codec(spec)
        header = weights(1, flags=Flags.MEAN, codec=codec.wire_id)
        sizes[spec] = ShardCodec(codec, plan.layout.shards[0]).nbytes
        assert versions.wants(header, sizes[spec])
    assert len(set(sizes.values())) == 2
    foreign = weights(1, flags=Flags.MEAN, codec=get_codec("uniform:bits=8").wire_id)
    with pytest.raises(RemotePayloadError, match=r"the recipe says mean in .* or "):
        versions.wants(foreign, 100)


def test_later_versions_are_forgotten_and_wanted_whole():
    versions, plan = replica()
    take_full(versions, 4)
    assert versions.wants(delta(5), payload_bytes(plan))
    versions.took(delta(5))
    assert versions.forget_above(5) == []
    assert versions.forget_above(4) == [0]
    assert versions.version == -1
    assert not versions.wants(delta(5), payload_bytes(plan))
    take_full(versions, 4)
    assert versions.version == 4


def test_half_of_a_later_version_is_forgotten_as_well():
    versions, _ = replica()
    take_full(versions, 4)
    versions.took(weights(6, part=0))
    assert versions.forget_above(4) == [0]
    take_full(versions, 4)
    assert versions.version == 4
