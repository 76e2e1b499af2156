"""`python -m psq_worker`: the command `psq-worker`."""

from psq_worker.cli import worker_main

if __name__ == "__main__":
    worker_main()
