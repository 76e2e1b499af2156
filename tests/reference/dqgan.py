"""dqgan: optimistic mirror descent on a game, three bits each way with feedback (2010.13359).

F is the field of all players. It is taken where the last step would lead once more, and where what
is still unsaid would: z - (f + e).
"""

from reference.common import Job, Weights, mean


def train(job: Job) -> Weights:
    """Yield everybody's z."""
    z, server_e = job.x, job.zeros
    e = [job.zeros for _ in job.ranks]
    f = [job.zeros for _ in job.ranks]
    for t, lr in job.rounds():
        said = []
        for i in job.ranks:
            f[i] = lr * job.gradient(i, t, z - (f[i] + e[i]))
            p = f[i] + e[i]
            q = job.up(p)
            e[i] = p - q
            said.append(q)
        delta = -mean(said) + server_e
        d = job.down(delta)
        server_e = delta - d
        z = z + d
        yield z
