"""Native kernels called with anything: they do it or raise, and touch nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psq import kernels
from psq.kernels.formats import BLOCKS, Family, Format

NATIVE = [name for name in kernels.available() if name != "reference"]
if not NATIVE:
    pytest.skip("installed without native code", allow_module_level=True)

INTS = st.integers(-2, 20) | st.sampled_from([1 << 31, -(1 << 31), 1 << 40, 1 << 63, 1 << 64])
FORMS = st.builds(
    Format,
    st.sampled_from(list(Family)) | INTS,
    st.integers(0, 33) | INTS,
    st.integers(0, 8) | INTS,
    st.sampled_from(BLOCKS) | INTS,
)
SIZES = st.integers(0, 1300)
GUARD = 64


class Guarded:
    """A buffer between two guards."""

    def __init__(self, nbytes, fill=0):
        self.memory = np.full(nbytes + 2 * GUARD, 0xA5, np.uint8)
        self.view = self.memory[GUARD : GUARD + nbytes]
        self.view[:] = fill

    def holds(self):
        ends = np.concatenate([self.memory[:GUARD], self.memory[len(self.memory) - GUARD :]])
        return bool((ends == 0xA5).all())


def expected_bytes(form, numel):
    """None if there is no such format."""
    known = form.family in set(Family) and 0 < form.bits <= 32 and form.is_known
    return form.payload_bytes(numel) if known else None


@pytest.mark.parametrize("level", NATIVE)
@given(form=FORMS, numel=SIZES, off=st.sampled_from([0, 0, 0, 1, -1, 64]), fill=st.integers(0, 255))
def test_a_payload_is_decoded_only_at_its_exact_size(level, form, numel, off, fill):
    kernel = kernels.get(level)
    right = expected_bytes(form, numel)
    payload = Guarded(max(0, (right or 0) + off), fill)
    out = Guarded(4 * numel)
    values = out.view.view(np.float32)
    fits = right is not None and payload.view.size == right
    for add in (False, True):
        try:
            kernel.decode(*form, payload.view, values, add)
            assert fits
        except (ValueError, TypeError, OverflowError):
            assert not fits
    assert out.holds()
    assert payload.holds()


@pytest.mark.parametrize("level", NATIVE)
@given(
    form=FORMS,
    numel=SIZES | INTS,
    nbytes=st.integers(0, 6000),
    kind=st.sampled_from(["payload_finite", "topk_ascends"]),
)
def test_a_check_reads_only_a_payload_of_the_exact_size(level, form, numel, nbytes, kind):
    payload = Guarded(nbytes, 3)
    try:
        said = getattr(kernels.get(level), kind)(*form, payload.view, numel)
    except (ValueError, TypeError, OverflowError):
        return
    assert isinstance(said, bool)
    assert expected_bytes(form, numel) == nbytes


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize(
    "wrong",
    [
        None,
        3,
        "text",
        b"bytes",
        np.zeros(4, np.float64),
        np.zeros((2, 2), np.float32),
        np.zeros(8, np.float32)[::2],
        memoryview(bytes(16)).cast("f"),
    ],
    ids=["none", "number", "text", "bytes", "f64", "square", "strided", "read-only"],
)
def test_what_is_no_writable_vector_of_floats_is_refused(level, wrong):
    payload = np.zeros(16, np.uint8)
    with pytest.raises((TypeError, ValueError, BufferError)):
        kernels.get(level).decode(7, 32, 0, 0, payload, wrong, False)  # noqa: FBT003 - positional
