"""``evermesh export``: a checkpoint as a Hugging Face directory."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from evermesh.launcher.commands.jobs import Runs

if TYPE_CHECKING:
    from evermesh.launcher.run_directory import Run
    from evermesh.runtime.data import Corpus

EXAMPLES = """[bold]Examples[/]

  evermesh export quickstart models/quickstart

  evermesh export runs/quickstart/checkpoints/step-00000030 models/step-30 --dtype bfloat16"""


class Dtype(StrEnum):
    """Types that weights can be written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    place: Annotated[
        str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run (its newest checkpoint), or a checkpoint.")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="The new Hugging Face directory.")],
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Type of the weights; default: that of the run.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Longest context to announce; default: the model's, or the run's."),
    ] = None,
    shard_size: Annotated[float, typer.Option("--shard-size", min=0.001, help="Largest file, in GB.")] = 5.0,
    runs: Runs = Path("runs"),
) -> None:
    """Write a checkpoint as a Hugging Face directory: config.json, safetensors, tokenizer.json."""
    from evermesh.checkpoint.directory import read_manifest
    from evermesh.launcher.commands.checkpoint.places import newest_checkpoint
    from evermesh.runtime.weights import ExportOptions, export_checkpoint

    path = newest_checkpoint(place, runs)
    run = _run_of(path)
    corpus = _corpus(run, read_manifest(path).description.get("tokenizer"))
    options = ExportOptions(
        dtype=dtype.value if dtype else None,
        max_positions=context,
        trained_context=run.config().train.data.context if run else None,
        tokenizer=corpus.path / "tokenizer.json" if corpus else None,
        end_token=corpus.end_token if corpus else None,
        most_file_bytes=int(shard_size * 1e9),
    )
    written = export_checkpoint(path, directory, options)
    console = Console()
    files = len(written.weights.files)
    text = (
        f"{directory}: {written.model_type}, {written.weights.num_bytes / 1e6:,.1f} MB of {written.dtype} in {files} "
        f"file{'' if files == 1 else 's'}, from {path}"
    )
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if corpus is None:
        console.print("without a tokenizer: the corpus of the run is not here; copy its tokenizer.json", soft_wrap=True)


def _run_of(path: Path) -> "Run | None":
    """The run that a checkpoint belongs to, if it lies in one."""
    from evermesh.launcher.run_directory import Run

    directory = path.absolute().parent.parent
    return Run(directory) if (directory / "state.json").is_file() else None


def _corpus(run: "Run | None", tokenizer: object) -> "Corpus | None":
    """A corpus of the run that is still here and has the tokenizer that the checkpoint names by its digest."""
    from evermesh.runtime.data import Corpus, CorpusSource

    if run is None:
        return None
    for source in run.config().train.data.sources:
        folders = [source.path] if isinstance(source, CorpusSource) else sorted(source.cache.glob("stdlib-*"))
        for folder in folders:
            if (folder / "tokenizer.json").is_file() and Corpus.open(folder).tokenizer_digest == tokenizer:
                return Corpus.open(folder)
    return None
