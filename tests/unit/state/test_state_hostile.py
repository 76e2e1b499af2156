"""Well-sealed frames that lie in everything else: the machine holds, and honest rounds go on."""

import msgpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psq_proto.errors import PsqError
from psq_proto.frames import Header, encode_frame
from psq_proto.messages import BODY_TYPES, NO_SHARD, NO_VERSION, U32_MAX, U64_MAX, MessageType

RUN_ID = bytes(range(16))
SPECS = [("w", (700,)), ("b", (10,))]
U32 = st.sampled_from([0, 1, 2, 3, NO_SHARD]) | st.integers(0, U32_MAX)
U64 = st.sampled_from([0, 1, 2, NO_VERSION]) | st.integers(0, U64_MAX)
SLOW = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

FIELDS = {
    name: field
    for kind in BODY_TYPES.values()
    for name, field in getattr(kind, "__dataclass_fields__", {}).items()
}
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), U64_MAX)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=40)
)
BODIES = st.dictionaries(
    st.sampled_from(sorted(FIELDS)) | st.text(max_size=8),
    VALUES | st.lists(VALUES, max_size=5),
    max_size=8,
).map(msgpack.packb)


def control_of(kind):
    """A body with the right fields of this message, each with any value."""
    if kind not in BODY_TYPES:
        return st.binary(max_size=80)
    names = list(BODY_TYPES[kind].__dataclass_fields__)
    return st.tuples(*[VALUES] * len(names)).map(
        lambda values: msgpack.packb(dict(zip(names, values, strict=True)))
    )


@st.composite
def lies(draw, plan, identity):
    """A frame that can be sealed, as far from the truth as it likes."""
    kind = draw(st.sampled_from(MessageType))
    known = draw(st.booleans())  # HELLO, and who asks for the job, name neither
    fields = {"run_id": RUN_ID, "plan": plan.digest, **identity} if known else dict(identity)
    if draw(st.booleans()):
        fields |= {name: draw(U32) for name in ("epoch", "incarnation", "rank")}
    fields |= {name: draw(U64) for name in ("seq", "round", "version")}
    fields |= {"shard": draw(U32), "part": draw(U32), "codec": draw(st.integers(0, 0xFFFF))}
    fields |= {"rate": draw(st.floats()), "flags": draw(st.integers(0, 15))}
    for name in draw(st.lists(st.sampled_from(["codec", "rate", "flags", "shard", "part"]))):
        fields.pop(name, None)
    body = draw(
        control_of(kind) | BODIES | st.binary(max_size=200) | st.sampled_from([b"", plan.body])
    )
    try:
        return bytes(encode_frame(Header(kind, **fields), body))
    except PsqError:
        return draw(st.binary(min_size=100, max_size=140))


def honest_round(kit, workers):
    before = kit.version
    for worker in workers:
        worker.push_all()
    assert kit.version == before + 1


@SLOW
@given(data=st.data())
def test_strangers_lies_change_nothing_for_those_who_joined(cluster, plan_of, data):
    plan = plan_of(specs=SPECS)
    kit = cluster(plan)
    workers = kit.started()
    for number in range(data.draw(st.integers(1, 12))):
        frame = data.draw(lies(plan, {}))
        kit.frame(b"stranger-%d" % (number % 3), frame)
    kit.tick(0.5)
    honest_round(kit, workers)


@SLOW
@given(data=st.data())
def test_a_joined_worker_that_lies_breaks_no_invariant(cluster, plan_of, data):
    """Its lies bear its own identity. `kit` validates the machine after every event."""
    plan = plan_of(specs=SPECS)
    kit = cluster(plan)
    workers = kit.started()
    liar = workers[1]
    me = {"epoch": 1, "incarnation": liar.session.incarnation, "rank": 1}
    for _ in range(data.draw(st.integers(1, 12))):
        kit.frame(liar.name, data.draw(lies(plan, me)))
    workers[0].push_all()
    kit.tick(1.0)
    assert kit.version in {0, 1}


@SLOW
@given(st.lists(st.binary(max_size=400), max_size=30))
def test_bytes_that_are_no_frames_are_answered_or_dropped(cluster, plan_of, frames):
    plan = plan_of(specs=SPECS)
    kit = cluster(plan)
    workers = kit.started()
    for number, frame in enumerate(frames):
        kit.frame(workers[number % 2].name if number % 5 == 0 else b"stranger", frame)
    honest_round(kit, workers)
