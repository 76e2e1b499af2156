"""`python -m psq_server` is `psq-server`."""

from psq_server.cli import main

if __name__ == "__main__":
    main()
