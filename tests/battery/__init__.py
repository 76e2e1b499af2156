"""What every recipe has to pass, whoever made it: one battery over `psq.presets.PRESETS`.

    test_reference      it does what its file in tests/reference does, bit for bit
    test_mass           nothing is lost that it does not say it loses
    test_replay         the same bytes again: in another run, on another kernel, after a resume
    test_not_finite     NaN and Inf enter nothing that lasts
    test_refusals       options, partners and jobs that it cannot honour, by name
    test_learns         it trains a network, and what makes it itself is needed for that

`cases` says of each recipe how it is run; a recipe without an entry there fails.
"""
