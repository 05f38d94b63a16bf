"""``evermesh data prepare`` and ``stats``."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from evermesh.runtime.data import Corpus, CorpusStats

_BAR_WIDTH = 24

app = typer.Typer(
    name="data",
    help="Prepare corpora and look at their lengths.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="[bold]Examples[/]\n\n  evermesh data prepare texts/ --output corpus --vocabulary 8192\n\n"
    "  evermesh data stats stdlib",
)

PREPARE_EXAMPLES = """[bold]Examples[/]

  evermesh data prepare texts/ --output corpora/mine --vocabulary 8192

  evermesh data prepare chats.jsonl.gz --output chats --tokenizer bpe.json

Files named .jsonl, .jsonl.gz and .parquet hold one document per record.

Any other file is one document.

After an interruption give the same command again: it goes on."""


@app.command(epilog=PREPARE_EXAMPLES)
def prepare(
    files: Annotated[list[Path], typer.Argument(help="Files and folders.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="Directory of the new corpus.", show_default=False)],
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="A Hugging Face tokenizer.json to use.")] = None,
    vocabulary: Annotated[int | None, typer.Option("--vocabulary", help="Train a byte-level BPE of this size.")] = None,
    end_token: Annotated[str | None, typer.Option("--end-token", help="Of --tokenizer; ends every document.")] = None,
    text_field: Annotated[str, typer.Option("--text-field", help="Field of a record that holds its text.")] = "text",
    loss_spans_field: Annotated[str, typer.Option("--loss-spans-field", help="Field of what counts.")] = "loss_spans",
    messages_field: Annotated[str, typer.Option("--messages-field", help="Field of a conversation.")] = "messages",
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help="Count bad records instead of ending.")] = False,
) -> None:
    """Make a corpus from text, JSON lines and Parquet files."""
    from evermesh.launcher.corpora import shown_preparation
    from evermesh.runtime.data import RecordFields, TokenizerFile, TrainBpe
    from evermesh.runtime.data import prepare as prepare_corpus

    if tokenizer and vocabulary is None:
        source: TokenizerFile | TrainBpe = TokenizerFile(tokenizer, end_token)
    elif vocabulary is not None and not tokenizer:
        source = TrainBpe(vocabulary)
    else:
        raise typer.BadParameter("give either --tokenizer FILE (to use one) or --vocabulary N (to train one).")
    fields = RecordFields(text_field, loss_spans_field, messages_field, skip_invalid)
    console = Console()
    with shown_preparation(console) as progress:
        corpus = prepare_corpus(files, output, source, fields, progress=progress)
    print_stats(corpus, 8192, console)


@app.command(
    epilog="[bold]Examples[/]\n\n  evermesh data stats corpora/mine --context 4096\n\n  evermesh data stats stdlib"
)
def stats(
    corpus: Annotated[str, typer.Argument(help="Directory of a corpus, or [bold]stdlib[/].", show_default=False)],
    context: Annotated[int, typer.Option("--context", min=1, help="Longest sequence, in tokens.")] = 8192,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=300, help="Of the stdlib corpus.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Show how long the documents of a corpus are, and how many exceed the context."""
    from evermesh.launcher.corpora import open_corpora
    from evermesh.runtime.data import CorpusSource, DataConfig, StdlibSource, corpus_stats

    source = StdlibSource(vocabulary=vocabulary) if corpus == "stdlib" else CorpusSource(path=Path(corpus))
    [opened] = open_corpora(DataConfig(sources=(source,)), Console(stderr=True))
    if as_json:
        print(json.dumps(dataclasses.asdict(corpus_stats(opened, context)), default=str, indent=1))
    else:
        print_stats(opened, context, Console())


def print_stats(corpus: "Corpus", context: int, console: Console) -> None:
    """Print the numbers of a corpus: counts, quantiles, histogram of lengths."""
    from evermesh.runtime.data import corpus_stats

    found = corpus_stats(corpus, context)
    console.print(f"[bold]{found.name}[/] in {corpus.path}", highlight=False, soft_wrap=True)
    for line in _lines(found):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(_histogram(found))


def _lines(found: "CorpusStats") -> list[str]:
    quantiles = ", ".join(f"{100 * fraction:g}% {length:,}" for fraction, length in found.quantiles.items())
    skipped = ", ".join(
        f"{count} {kind.replace('_', ' ')}" for kind, count in found.skipped.model_dump().items() if count
    )
    return [
        f"{found.documents:,} documents, {found.tokens:,} tokens, vocabulary {found.vocabulary:,}",
        f"length: mean {found.mean_length:,.0f}, shortest {found.shortest:,}, longest {found.longest:,}",
        f"quantiles: {quantiles}",
        f"context {found.context:,}: {found.documents_over_context:,} documents are longer, with "
        f"{found.share_over_context:.1%} of the tokens; they are split into {found.split_parts:,} parts, "
        f"{found.sequences:,} sequences in all",
        f"left out: {skipped or 'nothing'}",
    ]


def _histogram(found: "CorpusStats") -> Table:
    table = Table("tokens", "documents", "share of tokens", "", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[:3]:
        column.justify = "right"
    most = max(length.tokens for length in found.histogram)
    for length in found.histogram:
        bar = "█" * round(_BAR_WIDTH * length.tokens / most)
        share = f"{length.tokens / found.tokens:.1%}"
        table.add_row(f"{length.start:,} to {length.stop - 1:,}", f"{length.documents:,}", share, bar)
    return table
