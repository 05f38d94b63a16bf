"""The errors of the data room.

EvermeshError               (Exception)
├── CorpusInvalid           (ValueError)         a corpus on disk is missing, truncated, damaged or of another version
├── CorpusEmpty             (ValueError)         the inputs of a preparation hold no document
├── CorpusExists            (FileExistsError)    a preparation would overwrite a corpus
├── CorpusBusy              (TimeoutError)       another process prepares the same corpus
├── InputNotFound           (FileNotFoundError)  an input of a preparation is not there
├── DocumentInvalid         (ValueError)         an input file or one of its records cannot be understood
├── ExtraMissing            (ImportError)        an optional dependency is not installed
├── DiskFull                (OSError)            no space left while a corpus was written
├── TokenizerInvalid        (ValueError)         a tokenizer cannot be read, or has no end token
├── TokenizerMismatch       (ValueError)         sources of one mixture were made with different tokenizers
├── HeldOutTooLarge         (ValueError)         holding documents out would leave none of a corpus to train on
├── SamplerMismatch         (ValueError)         a sampler's state belongs to other data, seed or context
└── OutOfRange              (IndexError)         a token range outside its document
"""

from evermesh.parallelism.errors import EvermeshError


class CorpusInvalid(EvermeshError, ValueError):
    """A directory is not a complete corpus of the version that this program reads."""


class CorpusEmpty(EvermeshError, ValueError):
    """The inputs hold no document; the message counts what was skipped."""


class CorpusExists(EvermeshError, FileExistsError):
    """The output of a preparation is there already; nothing was changed."""


class CorpusBusy(EvermeshError, TimeoutError):
    """Another process holds the lock of the corpus."""


class InputNotFound(EvermeshError, FileNotFoundError):
    """An input path does not exist."""


class DocumentInvalid(EvermeshError, ValueError):
    """An input file or a record in it has the wrong form; the message names file and record."""


class ExtraMissing(EvermeshError, ImportError):
    """An input needs an optional dependency; the message names the command that installs it."""


class DiskFull(EvermeshError, OSError):
    """The disk is full; finished parts stay, and no directory looks like a complete corpus."""


class TokenizerInvalid(EvermeshError, ValueError):
    """A tokenizer cannot be read, cannot be trained as asked, or its end token is unknown."""


class HeldOutTooLarge(EvermeshError, ValueError):
    """A corpus has too few tokens for what is to be held out of it."""


class TokenizerMismatch(EvermeshError, ValueError):
    """Two sources that are to be mixed have different tokenizers."""


class SamplerMismatch(EvermeshError, ValueError):
    """The state of a sampler belongs to another seed, context, mixture or corpus; the sampler is unchanged."""


class OutOfRange(EvermeshError, IndexError):
    """Tokens outside a document were asked for."""

    def __init__(self, corpus: str, document: int, start: int, stop: int, length: int) -> None:
        self.corpus, self.document, self.start, self.stop, self.length = corpus, document, start, stop, length
        super().__init__(
            f"tokens [{start}:{stop}) of document {document} in corpus {corpus}, which has {length:,} tokens. "
            f"Ask for 0 <= start <= stop <= {length}."
        )
