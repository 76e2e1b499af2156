"""The processes of a test, as for the cluster tests."""

from cluster.conftest import cluster, pytest_runtest_makereport, zygote

__all__ = ["cluster", "pytest_runtest_makereport", "zygote"]
