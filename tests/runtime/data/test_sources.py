"""From a configuration to corpora, the corpus of the standard library, and the numbers of a corpus."""

import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from evermesh.runtime.data import (
    Corpus,
    CorpusInvalid,
    CorpusSource,
    DataConfig,
    Sampler,
    StdlibSource,
    TokenizerMismatch,
    corpus_stats,
    open_sources,
    stdlib_corpus,
)
from evermesh.runtime.data.stdlib import stdlib_files
from tests.runtime.data.written import write_corpus

STDLIB = """
import sys
from pathlib import Path
from evermesh.runtime.data import Corpus, stdlib_corpus
encoded = []
path = stdlib_corpus(300, Path(sys.argv[1]), progress=lambda done, total, name: encoded.append(name))
Corpus.open(path).verify()
print(path, len(encoded))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def stdlib(cache: Path) -> Path:
    """The corpus that two processes made, which started at once."""
    command = [sys.executable, "-c", STDLIB, str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0][0] == answers[1][0]
    assert sorted(int(answer[1]) for answer in answers) == [0, len(stdlib_files())]
    return Path(answers[0][0])


def test_two_processes_that_start_at_once_make_the_standard_library_once(stdlib: Path, cache: Path) -> None:
    assert list(cache.iterdir()) == [stdlib]


def test_the_standard_library_is_its_source(stdlib: Path) -> None:
    corpus = Corpus.open(stdlib)
    root = Path(sysconfig.get_paths()["stdlib"])
    tokenizer = Tokenizer.from_file(str(stdlib / "tokenizer.json"))
    names = [corpus.document_name(document) for document in range(len(corpus))]
    assert names == sorted(names)
    assert {"abc.py", "asyncio/events.py"} <= set(names)
    assert not any(part in {"test", "tests", "site-packages", "idlelib"} for name in names for part in name.split("/"))
    for document in random.Random(0).sample(range(len(corpus)), 20):
        inputs, _, _ = corpus.read(document, 0, corpus.length(document))
        source = (root / names[document]).read_bytes().decode("utf-8-sig", errors="replace")
        assert tokenizer.decode(inputs.tolist()) == source


def test_the_standard_library_is_made_once_per_cache(stdlib: Path, cache: Path) -> None:
    written = (stdlib / "corpus.json").stat().st_mtime_ns
    assert stdlib_corpus(300, cache) == stdlib
    assert (stdlib / "corpus.json").stat().st_mtime_ns == written


def test_sources_are_opened_in_order_and_drawn_from(stdlib: Path, cache: Path) -> None:
    config = DataConfig(sources=(CorpusSource(path=stdlib, weight=3), StdlibSource(vocabulary=300, cache=cache)))
    corpora = open_sources(config)
    assert [corpus.path for corpus in corpora] == [stdlib, stdlib]
    assert {sequence.source for sequence in Sampler(corpora, config, 0).next_batch().sequences} == {0, 1}


def test_sources_with_different_tokenizers_are_refused_naming_both(tmp_path: Path) -> None:
    for name, tokenizer in (("a", "first"), ("b", "first"), ("c", "second")):
        write_corpus(tmp_path / name, [3], tokenizer=tokenizer)
    sources = {name: CorpusSource(path=tmp_path / name) for name in "abc"}
    assert len(open_sources(DataConfig(sources=(sources["a"], sources["b"])))) == 2
    with pytest.raises(
        TokenizerMismatch, match=r"source 0 \(.*/a: tokenizer first.* source 2 \(.*/c: tokenizer second"
    ):
        open_sources(DataConfig(sources=(sources["a"], sources["b"], sources["c"])))


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusInvalid, match="evermesh data prepare"):
        open_sources(DataConfig(sources=(CorpusSource(path=tmp_path / "nowhere"),)))


def test_statistics_agree_with_counting(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 200).tolist()
    stats = corpus_stats(write_corpus(tmp_path / "corpus", lengths), context=64)
    parts = [-(-length // 64) for length in lengths]
    over = [length for length in lengths if length > 64]
    assert (stats.documents, stats.tokens) == (200, sum(lengths))
    assert (stats.shortest, stats.longest) == (min(lengths), max(lengths))
    assert stats.quantiles[0.5] == sorted(lengths)[99]
    assert stats.quantiles[0.99] == sorted(lengths)[197]
    assert stats.sequences == sum(parts)
    assert stats.split_parts == sum(count for count in parts if count > 1)
    assert stats.documents_over_context == len(over)
    assert stats.share_over_context == pytest.approx(sum(over) / sum(lengths))
    assert stats.mean_length == pytest.approx(sum(lengths) / 200)
    for bin_ in stats.histogram:
        inside = [length for length in lengths if bin_.start <= length < bin_.stop]
        assert (bin_.documents, bin_.tokens, bin_.stop) == (len(inside), sum(inside), 2 * bin_.start)
    assert sum(bin_.documents for bin_ in stats.histogram) == 200


def test_importing_the_room_loads_neither_torch_nor_tokenizers_nor_pyarrow() -> None:
    command = "import sys, evermesh.runtime.data; print({'torch', 'tokenizers', 'pyarrow'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "set()"


def test_public_names_are_sorted_and_there() -> None:
    from evermesh.runtime import data

    assert data.__all__ == sorted(data.__all__)
    assert all(hasattr(data, name) for name in data.__all__)
