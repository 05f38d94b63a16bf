"""From the configuration to open corpora."""

from collections.abc import Sequence

from evermesh.runtime.data.config import CorpusSource, DataConfig
from evermesh.runtime.data.corpus import Corpus
from evermesh.runtime.data.errors import TokenizerMismatch
from evermesh.runtime.data.prepare import Progress
from evermesh.runtime.data.stdlib import stdlib_corpus


def open_sources(config: DataConfig, *, progress: Progress | None = None) -> list[Corpus]:
    """The corpora of ``config.sources``, in order; a standard library corpus is made when it is not there yet.

    Raises:
        CorpusInvalid: a corpus is missing or damaged.
        TokenizerMismatch: two sources have different tokenizers or end tokens.
    """
    corpora = []
    for source in config.sources:
        path = (
            source.path
            if isinstance(source, CorpusSource)
            else stdlib_corpus(source.vocabulary, source.cache, progress=progress)
        )
        corpora.append(Corpus.open(path))
    _check_tokenizers(corpora)
    return corpora


def _check_tokenizers(corpora: Sequence[Corpus]) -> None:
    first = corpora[0]
    for number, corpus in enumerate(corpora):
        if (corpus.tokenizer_digest, corpus.end_token) != (first.tokenizer_digest, first.end_token):
            raise TokenizerMismatch(
                f"source 0 ({_described(first)}) and source {number} ({_described(corpus)}) have different tokenizers. "
                f"Prepare one of them again with the tokenizer.json in the directory of the other."
            )


def _described(corpus: Corpus) -> str:
    return (
        f"{corpus.path}: tokenizer {corpus.tokenizer_digest[:12]}, {corpus.vocabulary:,} entries, "
        f"end token {corpus.end_token}"
    )
