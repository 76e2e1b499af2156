"""psq-server as a script, so that it can be forked from the zygote: a start of milliseconds.

python serve.py [--die NAME:N] OPTION ...
"""

import sys

import psq.durable.failpoints
from psq_server.cli import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["--die"]:
        place, _, nth = sys.argv[2].rpartition(":")
        assert place in psq.durable.failpoints.NAMES, place
        psq.durable.failpoints._armed[place] = int(nth)
        del sys.argv[1:3]
    sys.exit(main())
