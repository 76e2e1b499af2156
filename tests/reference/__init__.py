"""Every recipe once more, as a paper would write it: plain NumPy, no shards, no payloads, no wire.

    train(job) -> the weights after each round

A file is one recipe. It knows nothing of psq: what a codec makes of a vector is a function that it
is given, `job.up(c)` and `job.down(c)`, and so is noise. All vectors are f32[d], every operation is
rounded to float32, and sums over workers are in the order of their ranks: so a file also says in
which order psq computes, and `tests/battery` holds psq to it bit for bit.

    on the workers   what they say is Adam's step
        qadam             and the server answers with its weights
        efficient_adam    and the server answers with their change
        qadam_1bit        with v corrected to that of the whole batch
        local_adam        after steps of their own
        diloco            after steps of their own; the server has momentum
    on the server    what workers say is their gradient
        fp32, fp32_sgd    and nothing is lost
        server_adam       and the server has Adam
        server_amsgrad    and the server has Adam with the largest v
        coded             and two workers say the same
        average           and the server only takes the mean
        kardam            and the server does not believe everyone
        dq_sgd            in as many bits as it is worth
    everywhere       what goes round is everybody's
        shared_direction  a direction, in units of sqrt(v)
        onebit_adam       a momentum, over a v that stays as it is
    without Adam
        ef_sgd            a gradient and what was left out before
        dist_ef_sgdm      a gradient with momentum, likewise
        ef21              how a gradient differs from what was said of it
        dqgan             a step from a point ahead
    signs
        sto_sign          of a gradient with noise; the majority's come back
        sto_sign_ef       of a gradient with noise; their mean comes back
        dp_sign           of a clipped gradient with secret noise
        sign_majority     of a momentum
        dist_lion         of Lion's

e is always the residual: what a codec has left out so far, to be said later.
"""
