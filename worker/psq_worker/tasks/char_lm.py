"""Task `char-lm`: a small causal transformer that predicts Shakespeare's next character.

The usual pre-norm decoder: learned positions, causal attention, GELU, no dropout and no tied
weights. The score is the validation loss in nats per character over the last tenth of the text,
which is never trained on.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from psq.errors import ConfigError
from psq_worker.tasks.base import JobDefaults, seeded, slice_of

__all__ = ["CharLm", "TextBatch", "Transformer"]

TextBatch = tuple[torch.Tensor, torch.Tensor]
"""Characters i64[n, CONTEXT] and the characters that follow them, i64[n, CONTEXT]."""

TEXT: Final = Path(__file__).parent / "data" / "shakespeare" / "shakespeare.txt.gz"
MAX_TEXT_BYTES: Final = 16 * 1024 * 1024
CONTEXT: Final = 64
WIDTH: Final = 128
HEADS: Final = 4
BLOCKS: Final = 3
VALIDATION_SHARE: Final = 0.1
VALIDATION_WINDOWS: Final = 256
EVALUATION_BATCH: Final = 64
INIT_DEVIATION: Final = 0.02


class CharLm:
    """Seven plays, 833 thousand characters.

    Args:
        text: a gzip-compressed text; None takes the one that psq ships.

    Raises:
        ConfigError: the text is missing, damaged or too short to train on.
    """

    name: Final = "char-lm"
    metric: Final = "val_loss"
    defaults: Final = JobDefaults(steps=600, batch_size=8, lr=1e-3, eval_every=100)

    def __init__(self, text: Path | None = None) -> None:
        self._path: Final = text or TEXT
        raw = _read(self._path)
        self._vocabulary: Final = np.unique(raw)
        codes = np.searchsorted(self._vocabulary, raw).astype(np.int64)
        cut = len(codes) - int(len(codes) * VALIDATION_SHARE)
        if len(codes) - cut <= CONTEXT:
            msg = f"{self._path} has {len(codes)} characters: expected at least {10 * CONTEXT + 10}"
            raise ConfigError(msg)
        self._train: Final = codes[:cut]
        self._validation: Final = codes[cut:]

    @property
    def description(self) -> str:
        """Which text this is."""
        count = len(self._train) + len(self._validation)
        origin = "Shakespeare, shipped with psq" if self._path == TEXT else str(self._path)
        return (
            f"{count:,} characters of text ({origin}), the last {len(self._validation):,} held out"
        )

    def model(self, seed: int) -> nn.Module:
        """A new transformer of about 0.62 million parameters."""
        with seeded(seed):
            return Transformer(len(self._vocabulary))

    def loss(self, model: nn.Module, batch: TextBatch) -> torch.Tensor:
        """Mean cross-entropy in nats per character."""
        here, following = batch
        return functional.cross_entropy(model(here).flatten(0, 1), following.flatten())

    def batches(
        self, *, rank: int, world_size: int, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[TextBatch]:
        """This rank's slices of the global batches from `start_step` on: windows of the text."""
        part = slice_of(rank=rank, world_size=world_size, batch_size=batch_size)
        places = len(self._train) - CONTEXT
        step = start_step
        while True:
            starts = np.random.default_rng([seed, step]).integers(
                0, places, world_size * batch_size
            )
            yield _windows(self._train, starts[part])
            step += 1

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean loss in nats per character over fixed windows, spread over the held-out text."""
        last = len(self._validation) - CONTEXT - 1
        starts = np.linspace(0, last, VALIDATION_WINDOWS).astype(np.int64)
        total = 0.0
        model.eval()
        with torch.no_grad():
            for part in np.split(
                starts, range(EVALUATION_BATCH, VALIDATION_WINDOWS, EVALUATION_BATCH)
            ):
                total += float(self.loss(model, _windows(self._validation, part))) * len(part)
        model.train()
        return {"val_loss": total / VALIDATION_WINDOWS}


class Transformer(nn.Module):
    """Decoder: characters i64[n, t] to scores f32[n, t, vocabulary], t at most CONTEXT."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(_Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)
        nn.init.normal_(self.position, std=INIT_DEVIATION)
        nn.init.normal_(self.embedding.weight, std=INIT_DEVIATION)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Scores of every next character."""
        hidden = self.embedding(characters) + self.position[: characters.shape[1]]
        scores: torch.Tensor = self.head(self.norm(self.blocks(hidden)))
        return scores


class _Block(nn.Module):
    """Attention, then a two-layer network, each on normalized input and added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.project_in = nn.Linear(WIDTH, 3 * WIDTH)
        self.project_out = nn.Linear(WIDTH, WIDTH)
        self.norm_dense = nn.LayerNorm(WIDTH)
        self.dense_in = nn.Linear(WIDTH, 4 * WIDTH)
        self.dense_out = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        count, length, _ = hidden.shape
        heads = self.project_in(self.norm_attention(hidden)).view(
            count, length, 3, HEADS, WIDTH // HEADS
        )
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project_out(mixed.transpose(1, 2).reshape(count, length, WIDTH))
        dense: torch.Tensor = self.dense_out(
            functional.gelu(self.dense_in(self.norm_dense(hidden)))
        )
        return hidden + dense


def _windows(codes: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> TextBatch:
    rows = torch.from_numpy(codes[starts[:, None] + np.arange(CONTEXT + 1)])
    return rows[:, :-1], rows[:, 1:]


def _read(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with gzip.open(path, "rb") as stream:
            raw = stream.read(MAX_TEXT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        msg = f"text {path} cannot be read ({error}): reinstall psq, or name another file"
        raise ConfigError(msg) from error
    if len(raw) > MAX_TEXT_BYTES:
        msg = f"text {path} unpacks to more than {MAX_TEXT_BYTES} bytes: name a shorter one"
        raise ConfigError(msg)
    return np.frombuffer(raw, np.uint8)
