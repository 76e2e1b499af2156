"""psq: a parameter server whose messages are quantized to a few bits in both directions."""

__version__ = "0.1.0"
