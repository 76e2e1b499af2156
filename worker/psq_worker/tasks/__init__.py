"""The jobs psq can train out of the box, and the protocol for a user's own."""

from psq_worker.tasks.base import Batch, JobDefaults, Schedule, Task, job_defaults
from psq_worker.tasks.registry import TASK_NAMES, check_model, find_task, get_task

__all__ = [
    "TASK_NAMES",
    "Batch",
    "JobDefaults",
    "Schedule",
    "Task",
    "check_model",
    "find_task",
    "get_task",
    "job_defaults",
]
