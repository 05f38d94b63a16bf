"""Configuration of the data: which corpora, how they are mixed, how long sequences get; imports no torch."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CorpusSource(_Frozen):
    """A corpus made by ``evermesh data prepare``."""

    kind: Literal["corpus"] = "corpus"
    path: Path
    """Directory of the corpus."""
    weight: PositiveFloat = 1.0
    """Share of the tokens drawn from this source, relative to the other sources."""


class StdlibSource(_Frozen):
    """The source of the Python standard library that runs this program; prepared on first use and cached."""

    kind: Literal["stdlib"] = "stdlib"
    vocabulary: Annotated[int, Field(ge=300, le=65_536)] = 4096
    """Entries of the byte-level BPE that is trained on it."""
    cache: Path = Path("build/corpora")
    """Folder in which the corpus is kept."""
    weight: PositiveFloat = 1.0
    """Share of the tokens drawn from this source, relative to the other sources."""


Source = Annotated[CorpusSource | StdlibSource, Field(discriminator="kind")]


class OutlierDelay(_Frozen):
    """Very long sequences wait, and are trained later, several in one batch; see ``evermesh.runtime.data.delay``."""

    thresholds: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Lengths at which levels begin, tokens, ascending: sequences of the first and more wait, each for those of its level."""
    together: Annotated[int, Field(ge=2)] = 4
    """Sequences of a level that are trained in one batch: as soon as so many wait."""
    most_steps: PositiveInt = 8
    """Steps that a sequence is late at most; then all of its level are trained, few as they are."""
    most_waiting: PositiveInt = 64
    """Sequences that wait at most; those that find no room are trained at once. No more wait than fit into a batch."""

    @model_validator(mode="after")
    def _levels_can_fill(self) -> Self:
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(f"thresholds {list(self.thresholds)} do not ascend")
        if self.together > self.most_waiting:
            raise ValueError(
                f"{self.together} sequences of a level are to be trained together, but only {self.most_waiting} may wait. "
                f"Set most_waiting to {self.together} or more."
            )
        return self


class DataConfig(_Frozen):
    """The data of a training run."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Corpora to draw from; they share one tokenizer."""
    context: PositiveInt = 8192
    """Longest sequence, in tokens; longer documents are split at this limit and counted."""
    batch_tokens: PositiveInt = 32_768
    """Tokens of a global batch: sequences are added until the next one would exceed it (at least one is taken)."""
    outlier_delay: OutlierDelay | None = None
    """Let very long sequences wait for each other, so that batches are balanced; null: every sequence is trained in the batch
    it is drawn for. Data is then trained in another order, late by no more than this says."""

    @model_validator(mode="after")
    def _outliers_fit(self) -> Self:
        delay = self.outlier_delay
        if delay is None:
            return self
        if delay.thresholds[-1] > self.context:
            raise ValueError(
                f"outlier_delay.thresholds: {delay.thresholds[-1]} tokens, but no sequence is longer than the context, "
                f"{self.context}. Leave thresholds above it out."
            )
        if delay.together * delay.thresholds[-1] > self.batch_tokens:
            raise ValueError(
                f"outlier_delay: {delay.together} sequences of {delay.thresholds[-1]} tokens are to be trained together, "
                f"which are more than the {self.batch_tokens} tokens of a batch. Set outlier_delay.together to "
                f"{self.batch_tokens // delay.thresholds[-1]} or less, a lower last threshold, or a larger batch_tokens."
            )
        return self
