"""Whether a worker keeps anything for a process that comes after it, and where."""

from __future__ import annotations

from torch import nn

from psq.config import WorkerConfig
from psq.errors import ConfigError
from psq.plan import Plan
from psq.torch.averaging import Averaging
from psq.torch.exchange import Exchange
from psq.torch.folder import WorkerFolder
from psq.torch.keeper import Keeper
from psq.torch.parameters import ParameterTable

__all__ = ["make_keeper"]


def make_keeper(  # noqa: PLR0913, PLR0917 - all that a worker's state is in
    config: WorkerConfig,
    plan: Plan,
    table: ParameterTable,
    model: nn.Module,
    exchange: Exchange,
    averaging: Averaging | None,
) -> Keeper | None:
    """The keeper of a worker that has a state directory.

    Raises:
        ConfigError: this job's workers cannot go on from what they keep.
        StateError: the folder cannot be used, or is in use.
    """
    if config.state_dir is None:
        return None
    if plan.replicas > 1:
        msg = (
            "state_dir: with aggregate=coded ranks that compute the same stand in for each other, "
            "and a new one begins with the job's weights: leave state_dir out"
        )
        raise ConfigError(msg)
    folder = WorkerFolder(config.state_dir, config.rank)
    try:
        return Keeper(
            folder,
            plan,
            rank=config.rank,
            seed=config.seed,
            table=table,
            model=model,
            compressor=exchange.compressor,
            decoder=exchange.decoder,
            averaging=averaging,
        )
    except BaseException:
        folder.close()
        raise
