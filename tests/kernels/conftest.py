"""Every codec battery runs on every level this machine has."""

from __future__ import annotations

import numpy as np
import pytest

from psq import kernels
from psq.codec import codec_specs, get_codec


@pytest.fixture(params=kernels.available())
def level(request):
    """The kernels of one level, made the process's own."""
    with kernels.use(request.param) as active:
        yield active


@pytest.fixture(params=codec_specs())
def codec(request):
    return get_codec(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(20_240_607)


@pytest.fixture
def gradient(rng):
    """Values as gradients have them: sizes differ by orders of magnitude along the vector."""

    def make(numel):
        sizes = np.exp(2 * rng.standard_normal(numel // 64 + 1)).repeat(64)[:numel]
        return (rng.standard_normal(numel) * sizes).astype(np.float32)

    return make
