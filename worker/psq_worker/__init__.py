"""The commands psq and psq-worker: training loop, tasks, and what a person sees of them."""
