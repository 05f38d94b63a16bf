"""Corpora on disk, the sampler and the batches it yields."""

from evermesh.runtime.data.batch import Batch, SequenceRef
from evermesh.runtime.data.config import CorpusSource, DataConfig, OutlierDelay, StdlibSource
from evermesh.runtime.data.corpus import Corpus, Manifest, Skipped
from evermesh.runtime.data.documents import InputFile, RecordFields
from evermesh.runtime.data.errors import (
    CorpusBusy,
    CorpusEmpty,
    CorpusExists,
    CorpusInvalid,
    DiskFull,
    DocumentInvalid,
    ExtraMissing,
    HeldOutTooLarge,
    InputNotFound,
    OutOfRange,
    SamplerMismatch,
    TokenizerInvalid,
    TokenizerMismatch,
)
from evermesh.runtime.data.held_out import HeldOut, hold_out
from evermesh.runtime.data.prepare import Progress, prepare
from evermesh.runtime.data.sampler import Sampler, read_pieces
from evermesh.runtime.data.sources import open_sources
from evermesh.runtime.data.stats import CorpusStats, LengthBin, corpus_stats
from evermesh.runtime.data.stdlib import stdlib_corpus
from evermesh.runtime.data.tokenizer import TokenizerFile, TrainBpe

__all__ = [
    "Batch",
    "Corpus",
    "CorpusBusy",
    "CorpusEmpty",
    "CorpusExists",
    "CorpusInvalid",
    "CorpusSource",
    "CorpusStats",
    "DataConfig",
    "DiskFull",
    "DocumentInvalid",
    "ExtraMissing",
    "HeldOut",
    "HeldOutTooLarge",
    "InputFile",
    "InputNotFound",
    "LengthBin",
    "Manifest",
    "OutOfRange",
    "OutlierDelay",
    "Progress",
    "RecordFields",
    "Sampler",
    "SamplerMismatch",
    "SequenceRef",
    "Skipped",
    "StdlibSource",
    "TokenizerFile",
    "TokenizerInvalid",
    "TokenizerMismatch",
    "TrainBpe",
    "corpus_stats",
    "hold_out",
    "open_sources",
    "prepare",
    "read_pieces",
    "stdlib_corpus",
]
