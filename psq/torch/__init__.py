"""psq for PyTorch: a `Worker` takes the place of the optimizer in an ordinary training loop.

>>> ps = psq.torch.Worker(model, lr=1e-3)  # doctest: +SKIP
>>> for x, y in loader:  # doctest: +SKIP
...     loss_fn(model(x), y).backward()
...     ps.step()

`observers` is a list of functions called after each step of every worker in this process, as
observer(worker, report, loss, samples).
"""

from psq.torch.drain import Drained, drain_on_sigterm
from psq.torch.groups import Group
from psq.torch.optimizer import Optimizer
from psq.torch.report import LOCAL, SAT_OUT, StepReport
from psq.torch.sampler import ElasticSampler
from psq.torch.worker import Worker, close_workers, observers

__all__ = [
    "LOCAL",
    "SAT_OUT",
    "Drained",
    "ElasticSampler",
    "Group",
    "Optimizer",
    "StepReport",
    "Worker",
    "close_workers",
    "drain_on_sigterm",
    "observers",
]
