"""Configuration: every setting of psq in one place, and where its value came from.

`schema` lists the settings, `setting` says what a setting is, `sources` decides who wins, `options`
makes commands of them. `options` imports click and is not imported here: `import psq.config` is
light.
"""

from psq.config.schema import (
    AUTO_RECIPE,
    DEFAULT_ENDPOINT,
    DEFAULT_LR,
    DEFAULT_PORT,
    DEFAULT_ROUND_TRIP_MS,
    MAX_PORT,
    TABLES,
    AdviseConfig,
    DemoConfig,
    LaunchConfig,
    ServerConfig,
    SimulateConfig,
    WorkerConfig,
    is_loopback,
)
from psq.config.setting import Setting, settings_of
from psq.config.sources import (
    CONFIG_ENV,
    Given,
    Resolved,
    known_variables,
    resolve,
    stray_variables,
    use_given,
    worker_config,
)

__all__ = [
    "AUTO_RECIPE",
    "CONFIG_ENV",
    "DEFAULT_ENDPOINT",
    "DEFAULT_LR",
    "DEFAULT_PORT",
    "DEFAULT_ROUND_TRIP_MS",
    "MAX_PORT",
    "TABLES",
    "AdviseConfig",
    "DemoConfig",
    "Given",
    "LaunchConfig",
    "Resolved",
    "ServerConfig",
    "Setting",
    "SimulateConfig",
    "WorkerConfig",
    "is_loopback",
    "known_variables",
    "resolve",
    "settings_of",
    "stray_variables",
    "use_given",
    "worker_config",
]
