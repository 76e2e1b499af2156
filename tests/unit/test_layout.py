"""psq.layout: the cut covers every value once, keeps payloads small, is the same everywhere."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq.errors import ConfigError
from psq.kernels import BLOCKS
from psq.layout import MAX_SHARD_NUMEL, PART_NUMEL, SPLIT_NUMEL, cut, part_count
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
