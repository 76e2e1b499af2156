"""Which codecs to use on this machine and this link: a model of a step, measurements, and words.

`model` predicts (pure), `candidates` lists what there is to choose from, `measure` times this
machine, `links` reads what is said of the network, `choose` puts them together and says in a
sentence what to do.
"""

from psq.advice.candidates import CAUTION, DEFAULT_MIN_BITS, DENSE, Candidate, Specs, candidates
from psq.advice.choose import Advice, Option, Step, advise
from psq.advice.links import LOOPBACK_NAME, cores, link_of_mbit, parse_link
from psq.advice.measure import copy_s, measure_rates
from psq.advice.model import (
    BOTTLENECKS,
    LOOPBACK,
    Cluster,
    Link,
    Prediction,
    Rates,
    Work,
    link_s,
    predict,
)

__all__ = [
    "BOTTLENECKS",
    "CAUTION",
    "DEFAULT_MIN_BITS",
    "DENSE",
    "LOOPBACK",
    "LOOPBACK_NAME",
    "Advice",
    "Candidate",
    "Cluster",
    "Link",
    "Option",
    "Prediction",
    "Rates",
    "Specs",
    "Step",
    "Work",
    "advise",
    "candidates",
    "copy_s",
    "cores",
    "link_of_mbit",
    "link_s",
    "measure_rates",
    "parse_link",
    "predict",
]
