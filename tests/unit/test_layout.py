"""psq.layout: the cut covers every value once, keeps payloads small, is the same everywhere."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psq import layout as layout_module
from psq.errors import ConfigError
from psq.kernels import BLOCKS
from psq.layout import (
    MAX_SHARD_NUMEL,
    MAX_SHARDS,
    MAX_SPREAD,
    PART_NUMEL,
    SPLIT_NUMEL,
    cut,
    part_count,
)
from psq_proto.messages import MAX_PAYLOAD_BYTES


def dense(numel):
    return 4 * numel


def one_bit(numel):
    return 64 * math.ceil(numel / 512) + 4 * math.ceil(numel / 1024)


SHAPES = st.lists(st.lists(st.integers(1, 300), min_size=0, max_size=3), min_size=1, max_size=40)


@given(SHAPES)
def test_every_value_lies_in_exactly_one_segment_of_its_tensor(shapes):
    layout = cut([(f"p{i}", shape) for i, shape in enumerate(shapes)], (dense, one_bit))
    position = dict.fromkeys(range(len(shapes)), 0)
    for shard in layout.shards:
        filled = 0
        for segment in shard.segments:
            assert segment.offset == filled
            assert segment.start == position[segment.tensor]
            position[segment.tensor] += segment.numel
            filled += segment.numel
        assert shard.numel == filled
    assert position == {i: math.prod(shape) for i, shape in enumerate(shapes)}
    assert layout.numel == sum(position.values())


@given(SHAPES)
def test_no_payload_exceeds_the_limit_in_either_direction(shapes):
    layout = cut([(f"p{i}", shape) for i, shape in enumerate(shapes)], (dense, one_bit))
    for shard in layout.shards:
        assert 0 < shard.numel <= MAX_SHARD_NUMEL
        for size in (dense, one_bit):
            assert sum(size(segment.numel) for segment in shard.segments) <= MAX_PAYLOAD_BYTES


@pytest.mark.parametrize("sizes", [(dense, one_bit), (one_bit, dense)])
@pytest.mark.parametrize("shapes", [[(2 * PART_NUMEL + 1,)], [(1,)] * 20_000])
def test_the_direction_with_the_larger_payload_sets_the_limit(shapes, sizes):
    """Of many values that is the dense one, of many tensors the one that pads them."""
    layout = cut([(f"p{i}", shape) for i, shape in enumerate(shapes)], sizes)
    totals = [
        sum(size(s.numel) for s in shard.segments) for shard in layout.shards for size in sizes
    ]
    assert 0.9 * MAX_PAYLOAD_BYTES <= max(totals) <= MAX_PAYLOAD_BYTES


def test_a_one_bit_shard_holds_a_whole_mebi_of_values():
    layout = cut([("w", (3 * MAX_SHARD_NUMEL + 5,))], (one_bit,))
    assert [shard.numel for shard in layout.shards] == [MAX_SHARD_NUMEL] * 3 + [5]


def test_a_dense_shard_holds_what_one_message_may_carry():
    layout = cut([("w", (2 * PART_NUMEL + 1,))], (dense,))
    assert [shard.numel for shard in layout.shards] == [PART_NUMEL, PART_NUMEL, 1]


def test_a_split_is_a_whole_number_of_every_codecs_blocks():
    assert all(SPLIT_NUMEL % block == 0 for block in BLOCKS if block)


def test_a_tensor_is_split_only_where_every_block_stays_whole():
    layout = cut([("a", (MAX_SHARD_NUMEL - 100,)), ("b", (50_000,))], (one_bit,))
    starts = [s.start for shard in layout.shards for s in shard.segments]
    assert all(start % SPLIT_NUMEL == 0 for start in starts)


def test_many_small_tensors_share_a_shard_until_their_padding_fills_the_payload():
    layout = cut([(f"b{i}", (1,)) for i in range(20_000)], (one_bit,))
    assert len(layout.shards) == math.ceil(20_000 / (MAX_PAYLOAD_BYTES // one_bit(1)))


def test_a_scalar_parameter_is_one_value():
    layout = cut([("temperature", ())], (dense,))
    assert layout.numel == 1


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no trainable parameters"),
        ([("w", (2,)), ("w", (3,))], "two parameters are called 'w'"),
        ([("w", (3, 0))], "holds no values"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_by_name(specs, message):
    with pytest.raises(ConfigError, match=message):
        cut(specs, (dense,))


def test_parts_cover_a_shard_of_any_size():
    assert [part_count(n) for n in (1, PART_NUMEL, PART_NUMEL + 1)] == [1, 1, 2]


# ---- several servers


def payload_bytes(shard, sizes):
    return sum(size(segment.numel) for segment in shard.segments for size in sizes)


def loads(layout, sizes, servers):
    given = dict.fromkeys(range(servers), 0)
    for shard, owner in zip(layout.shards, layout.owners, strict=True):
        given[owner] += payload_bytes(shard, sizes)
    return list(given.values())


def resnet18():
    """The shapes of a ResNet-18 with 1,000 classes: 11.7 M values, from 64 to 2.4 M a tensor."""
    specs, channels = [(64, 3, 7, 7), (64,), (64,)], 64
    for wide in (64, 128, 256, 512):
        for block in range(2):
            specs += [
                (wide, channels, 3, 3),
                (wide,),
                (wide,),
                (wide, wide, 3, 3),
                (wide,),
                (wide,),
            ]
            if not block and wide != channels:
                specs += [(wide, channels, 1, 1), (wide,), (wide,)]
            channels = wide
    return [(f"p{i}", shape) for i, shape in enumerate([*specs, (1000, 512), (1000,)])]


MODELS = {
    "ResNet-18": (resnet18(), (2, 4, 8)),
    "one tensor of 4 M": ([("w", (4_000_000,))], (2, 4, 8)),
    "two unequal tensors": ([("a", (4_100_000,)), ("b", (99,))], (2, 4, 8)),
    "MLP of 4.2 M": ([(f"w{i}", (683, 683)) for i in range(9)], (2, 4, 8)),
    "an embedding and small layers": (
        [("e", (30_000, 512)), *((f"l{i}", (512,)) for i in range(300))],
        (2, 4, 8),
    ),
    "100 M": ([(f"w{i}", (1414, 1414)) for i in range(50)], (2, 4, 8)),
    "1 M": ([("w", (1_000_003,))], (2, 4)),
    "MLP of 1 M": ([(f"w{i}", (500, 500)) for i in range(4)], (2, 4)),
}
SIZES = {"one bit": (one_bit, one_bit), "f32": (dense, dense), "both": (one_bit, dense)}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("specs", "counts"), MODELS.values(), ids=MODELS)
def test_servers_own_nearly_the_same_number_of_payload_bytes(specs, counts, sizes):
    for servers in counts:
        layout = cut(specs, sizes, servers)
        given = loads(layout, sizes, servers)
        assert max(given) <= MAX_SPREAD * min(given)
        assert len(layout.shards) >= 8 * servers
        assert max(shard.numel for shard in layout.shards) <= MAX_SHARD_NUMEL


@given(SHAPES, st.integers(1, 5), st.integers(1, 3))
def test_a_cut_for_servers_still_covers_every_value_once(shapes, servers, every):
    specs = [(f"p{i}", shape) for i, shape in enumerate(shapes)]
    try:
        layout = cut(specs, (dense, one_bit), servers, every)
    except ConfigError:
        return
    assert layout.owners == cut(specs, (dense, one_bit), servers, every).owners
    assert set(layout.owners) == set(range(servers))
    assert len(layout.owners) == len(layout.shards)
    covered = [(s.tensor, s.start, s.numel) for shard in layout.shards for s in shard.segments]
    assert sum(numel for _, _, numel in covered) == layout.numel
    assert layout.numel == sum(math.prod(shape) for shape in shapes)
    for before, after in pairwise(covered):
        starts_anew = after[:2] == (before[0] + 1, 0)
        assert starts_anew or after[:2] == (before[0], before[1] + before[2])
    for shard in layout.shards:
        assert all(segment.start % SPLIT_NUMEL == 0 for segment in shard.segments)
        for size in (dense, one_bit):
            assert sum(size(segment.numel) for segment in shard.segments) <= MAX_PAYLOAD_BYTES


def test_one_server_owns_the_coarsest_cut_there_is():
    layout = cut([("w", (3 * MAX_SHARD_NUMEL + 5,))], (one_bit,))
    assert layout.owners == (0, 0, 0, 0)


def test_a_model_too_small_for_its_servers_says_how_many_it_is_good_for():
    specs = [("w", (5 * SPLIT_NUMEL,))]
    with pytest.raises(ConfigError, match="too few for 6 servers: start 5 or fewer"):
        cut(specs, (dense,), 6)
    assert sorted(cut(specs, (dense,), 5).owners) == [0, 1, 2, 3, 4]


def test_shards_that_take_turns_are_many_enough_for_every_turn():
    for servers, every in ((1, 4), (2, 4), (1, 16)):
        layout = cut([("w", (8_000_000,))], (one_bit,), servers, every)
        owned = [layout.owners.count(server) for server in range(servers)]
        assert min(owned) >= 4 * every


def test_a_model_of_too_many_shards_is_refused_before_they_are_made():
    calls = []

    def counted(numel):
        calls.append(numel)
        return one_bit(numel)

    with pytest.raises(ConfigError, match="over 65536 shards"):
        cut([("w", (MAX_SHARDS * MAX_SHARD_NUMEL + 1,))], (counted,))
    assert len(calls) < 10


def test_a_model_whose_payloads_need_too_many_shards_is_refused_too(monkeypatch):
    monkeypatch.setattr(layout_module, "MAX_SHARDS", 4)
    assert len(cut([("w", (4 * PART_NUMEL,))], (dense,)).shards) == 4
    with pytest.raises(ConfigError, match="over 4 shards"):
        cut([("w", (4 * PART_NUMEL + 1,))], (dense,))


# The cut made anew from the words of proto/README.md, as a client in another language would do it.


def specified_cut(shapes, sizes, aim):
    """Each shard as a list of (tensor, start, numel)."""
    total, offset, shards = sum(shapes), 0, [[]]
    fits = dict.fromkeys(sizes, 0)

    def end_of(start):
        part = (start + 8192) * aim // total + 1
        return min(total, part * total // aim, start + 1_048_576)

    end = end_of(0)
    for tensor, numel in enumerate(shapes):
        start = 0
        while start < numel:
            rest = [numel - start, *range((numel - start) // 8192 * 8192, 0, -8192)]
            for take in rest:
                if offset + take <= end and all(
                    used + size(take) <= 1 << 20 for size, used in fits.items()
                ):
                    shards[-1].append((tensor, start, take))
                    start, offset = start + take, offset + take
                    fits = {size: used + size(take) for size, used in fits.items()}
                    break
            else:
                shards.append([])
                fits, end = dict.fromkeys(sizes, 0), end_of(offset)
    return shards


def specified_owners(shards, sizes, servers):
    weights = [sum(size(numel) for *_, numel in shard for size in sizes) for shard in shards]
    given, owners = [0] * servers, {}
    for index in sorted(range(len(shards)), key=lambda index: (-weights[index], index)):
        owners[index] = given.index(min(given))
        given[owners[index]] += weights[index]
    ratio = max(given) / min(given) if min(given) else math.inf
    return ratio, tuple(owners[index] for index in range(len(shards)))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.sampled_from([1, 64, 1000, 9000, 70_001, 300_000, 1_500_000]), min_size=1, max_size=7
    ),
    st.integers(2, 4),
)
def test_a_stranger_with_the_specification_cuts_the_same(shapes, servers):
    sizes = (dense, one_bit)
    single = max(n for n in range(8192, (1 << 20) + 1, 8192) if dense(n) <= 1 << 20)
    least = max(8, -(-sum(shapes) // (single * servers)))
    tried = []
    for count in range(least, least + 16):
        shards = specified_cut(shapes, sizes, count * servers)
        tried.append((*specified_owners(shards, sizes, servers), shards))
    even = [entry for entry in tried if entry[0] <= 1.05]
    ratio, owners, shards = even[0] if even else min(tried, key=lambda entry: entry[0])
    specs = [(f"p{i}", (numel,)) for i, numel in enumerate(shapes)]
    if ratio == math.inf:
        with pytest.raises(ConfigError, match="too few for"):
            cut(specs, sizes, servers)
        return
    layout = cut(specs, sizes, servers)
    made = [[(s.tensor, s.start, s.numel) for s in shard.segments] for shard in layout.shards]
    assert made == shards
    assert layout.owners == owners


# ---- groups


@given(
    st.lists(
        st.tuples(st.integers(1, 3 * SPLIT_NUMEL), st.integers(0, 2)), min_size=1, max_size=12
    ),
    st.integers(1, 2),
)
def test_no_shard_holds_two_groups_and_every_value_is_in_one_shard(tensors, every):
    specs = [(f"p{i}", (numel,)) for i, (numel, _) in enumerate(tensors)]
    members = [group for _, group in tensors]
    others = [(dense, dense), (one_bit,)]
    layout = cut(specs, (dense, one_bit), 1, every, members=members, others=others)
    assert [tensor.name for tensor in layout.tensors] == [name for name, _ in specs]
    offset = 0
    for shard in layout.shards:
        assert shard.offset == offset
        offset += shard.numel
        for segment in shard.segments:
            assert members[segment.tensor] == shard.group
            at = layout.tensors[segment.tensor].offset + segment.start
            assert at == shard.offset + segment.offset
    assert offset == sum(numel for numel, _ in tensors)
    groups = [shard.group for shard in layout.shards]
    assert groups == sorted(groups)


def test_a_group_is_cut_by_its_own_payloads():
    specs = [("a", (2 * PART_NUMEL,)), ("b", (2 * PART_NUMEL,))]
    layout = cut(specs, (one_bit,), members=(0, 1), others=[(dense,)])
    assert [(shard.group, shard.numel) for shard in layout.shards] == [
        (0, 2 * PART_NUMEL),
        (1, PART_NUMEL),
        (1, PART_NUMEL),
    ]


def test_groups_that_alternate_make_no_more_shards_than_there_are_groups():
    specs = [(f"p{i}", (10,)) for i in range(100)]
    members = [i % 2 for i in range(100)]
    layout = cut(specs, (dense,), members=members, others=[(dense,)])
    assert [shard.numel for shard in layout.shards] == [500, 500]
