"""Recipe `fedgen`: federated averaging, and a teacher of the server's own that workers learn from.

    worker      H steps of its own Adam; pushes how far it has moved, four bits a value
    server      x <- x - weighted mean; then trains the teacher, a mean feature mu_y for each class,
                on the classifier that came of it:
                    f = relu(mu_y + noise z), z ~ N(0, 1);  mu <- mu - rate grad CE(W f + b, y)
    workers     receive x and mu, and draw features of all classes from mu, also of those that their
                own data lack

After FedGen (2105.10056), whose teacher is a network. The model has a linear classifier `head` and
`means`, f32[classes, features], in a group that workers do not push. The teacher is among the
weights, so it is sent with them, and saved with them; the rule keeps nothing else.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psq.errors import ConfigError
from psq.parts import Option, Part
from psq.preset import Preset
from psq.recipe import AdamConfig, Apply, Direction, Downlink, Recipe, Uplink
from psq.rules import ApplyRule, RoundView

Arrays = Mapping[str, NDArray[np.float32]]


class Teacher(ApplyRule):
    """Adds the mean of the updates, and takes the teacher a few steps further."""

    whole = True

    def step_whole(
        self, means: Arrays, weights: Arrays, t: int, lr: float, said: RoundView
    ) -> None:
        """One round: `weights` are edited in place."""
        del lr, said  # the rate is inside the updates
        for name, mean in means.items():
            weights[name] -= mean
        head, mu = str(self.options["head"]), str(self.options["means"])
        try:
            self.teach(weights[f"{head}.weight"], weights[f"{head}.bias"], weights[mu], t)
        except KeyError as error:
            msg = (
                f"apply=teacher: no parameter {error} in the model; there are {', '.join(weights)}"
            )
            raise ConfigError(msg) from error

    def teach(self, head: Any, bias: Any, mu: Any, t: int) -> None:
        """Move each class's mean feature to where the classifier tells that class best."""
        rng, rate = np.random.default_rng(t), np.float32(self.options["rate"])
        noise, truth = np.float32(self.options["noise"]), np.eye(len(mu), dtype=np.float32)
        for _ in range(int(self.options["steps"])):
            features = mu + noise * rng.standard_normal(mu.shape, np.float32)
            scores = np.maximum(features, 0.0) @ head.T + bias
            odds = np.exp(scores - scores.max(axis=1, keepdims=True))
            slope = (odds / odds.sum(axis=1, keepdims=True) - truth) @ head
            mu -= rate * slope * (features > 0.0)


TEACHER = Part(
    "teacher",
    options=(
        Option("head", "head", "the classifier's name in the model"),
        Option("means", "means", "the name of the features that the server moves"),
        Option("steps", 8, "steps of the teacher in a round", low=0, high=1000),
        Option("rate", 0.5, "learning rate of the teacher", low=0.0, high=100.0),
        Option("noise", 0.5, "deviation of the features around their mean", low=0.0, high=100.0),
    ),
    rule=Teacher,
    summary="take the update off the weights, then train the server's own features",
    takes=("update",),
    whole=True,
)


def make(adam: AdamConfig) -> Recipe:
    """The five parts."""
    return Recipe(
        "fedgen",
        Direction("adam", adam=adam, local_steps=16),
        Uplink("lloyd-max:bits=4"),
        Apply("teacher"),
        Downlink("delta", "lloyd-max:bits=4"),
    )


FEDGEN = Preset(
    "fedgen",
    make,
    "Workers take 16 local steps of Adam; the server averages by samples and trains features of "
    "all classes, which workers classify beside their own data.",
    "after FedGen (2105.10056)",
    "features are of this round's classifier: with one that changes quickly they are always late",
    "Adam's own learning rate; --with apply.steps=0 is federated averaging alone",
)
