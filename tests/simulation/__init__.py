"""A seeded simulator of whole jobs: the real state machines, everything around them pretended.

Real are the server's state, its outbox, the workers' machines and channels, and every frame between
them. Pretended are time, the network, the disk, processes that die, and the arithmetic: a shard is
an integer, so that what was said, what counts and what waits can be compared exactly after every
event. All that happens follows from a seed: `python -m tests.simulation --seed N` shows it again.

    case        what a seed means: how many workers, which rule, which faults
    clock       virtual time, and what is to happen when
    network     connections that are cut, held up, half open, and give frames twice
    disk        a journal of which a power cut takes back what was not synced
    arithmetic  integers in place of weights
    server, worker   the two shells
    faults      who does something bad, and when
    oracle      what must hold, whatever happens
    run         one seed, many seeds
    bugs        mistakes made on purpose, to see that the oracle finds them
"""
