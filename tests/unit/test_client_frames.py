"""The buffers of pushes, where a shard may be said in several codecs."""

from types import SimpleNamespace

from psq.client.frames import PushFrames
from psq.codec import get_codec
from psq.layout import cut
from psq_proto.frames import HEADER_BYTES

NUMEL = 1000
SPECS = ("sign", "uniform:bits=8", "uniform:bits=4")


def frames(lent=()) -> PushFrames:
    shards = cut([("w", (NUMEL,))], [lambda numel: 4 * numel]).shards
    plan = SimpleNamespace(owned=shards, uplink_codecs=lambda _: SPECS)
    return PushFrames(plan, lambda frame: any(frame is each for each in lent))


def test_there_is_room_for_the_longest_codec_and_each_travels_in_its_own_length():
    made = frames()
    payload = made.payload(0)
    assert payload.nbytes == get_codec(SPECS[1]).nbytes(NUMEL)
    for index, spec in enumerate(SPECS):
        codec = get_codec(spec)
        made.use(0, index)
        assert made.wire_id(0) == codec.wire_id
        assert made.said(0).nbytes == codec.nbytes(NUMEL)
        assert len(made.to_seal(0)) == HEADER_BYTES + codec.nbytes(NUMEL)


def test_a_shorter_frame_is_the_same_object_every_time_so_that_a_link_knows_it():
    made = frames()
    made.use(0, 2)
    assert made.to_seal(0) is made.to_seal(0)
    first = made.to_seal(0)
    made.use(0, 0)
    assert made.to_seal(0) is not first


def test_while_a_shorter_frame_is_read_its_whole_buffer_is_left_alone():
    lent: list = []
    made = frames(lent)
    made.use(0, 2)
    sent = made.to_seal(0)
    sent[HEADER_BYTES:] = bytes([5]) * (len(sent) - HEADER_BYTES)
    lent.append(sent)
    made.payload(0)[:] = 9
    assert bytes(sent[HEADER_BYTES:]) == bytes([5]) * (len(sent) - HEADER_BYTES)


def test_what_is_sent_again_while_it_is_read_is_a_copy_of_the_same_bytes():
    lent: list = []
    made = frames(lent)
    made.use(0, 2)
    made.payload(0)[:] = 3
    sent = made.to_seal(0)
    lent.append(sent)
    again = made.to_seal(0)
    assert again is not sent
    assert bytes(again[HEADER_BYTES:]) == bytes(sent[HEADER_BYTES:])
