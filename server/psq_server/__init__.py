"""A parameter server's process: pure state, the reducer, the loop that runs them. Never torch."""
