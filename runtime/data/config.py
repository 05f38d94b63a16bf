"""Configuration of the data: which corpora, how they are mixed, how long sequences get; imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


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


class DataConfig(_Frozen):
    """The data of a training run."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Corpora to draw from; they share one tokenizer."""
    context: PositiveInt = 8192
    """Longest sequence, in tokens; longer documents are split at this limit and counted."""
    batch_tokens: PositiveInt = 32_768
    """Tokens of a global batch: sequences are added until the next one would exceed it (at least one is taken)."""
