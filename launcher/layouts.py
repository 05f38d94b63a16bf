"""What the search for a layout is given: a model, a cluster, lengths of sequences."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from evermesh.launcher import job_yaml
from evermesh.launcher.config import JobConfig
from evermesh.launcher.corpora import open_corpora
from evermesh.launcher.drawn_batches import drawn_batches
from evermesh.launcher.errors import LayoutRequestInvalid
from evermesh.launcher.job_file import load_job
from evermesh.launcher.planning import read_lengths
from evermesh.parallelism.layout.device import DEVICES, Device
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.runtime.cost import ELEMENT_BYTES
from evermesh.runtime.data import Sampler
from evermesh.runtime.layout import is_supported
from evermesh.runtime.model.config import ModelConfig

VOCABULARY = 32_768
"""Assumed for a model whose file does not say, and that has no data."""
_BATCH_TOKENS = 4_000_000


@dataclass(frozen=True, slots=True)
class LengthsAsked:
    """Which lengths of sequences to search for."""

    path: Path | None = None
    """File with one length per line; None: those of the job's data, or ``context`` for all."""
    context: int | None = None
    """Longest sequence, tokens; longer ones are split."""
    batch_tokens: int | None = None
    """Tokens of a step."""
    batches: int = 2
    """How many steps."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model, and the job that it is from."""

    path: Path
    model: ModelConfig
    job: JobConfig | None

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Of a job, or of a file with the sizes of a model as under ``train.model``.

        Raises:
            JobFileInvalid: the file is no valid job.
            LayoutRequestInvalid: it is no valid model either.
        """
        values, _ = job_yaml.read(path)
        if "train" in values:
            job = load_job(path)
            return cls(path, job.train.model, job)
        try:
            return cls(path, ModelConfig.model_validate(values.get("model", values)), None)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise LayoutRequestInvalid(
                f"{path}: {key or 'the model'}: {first['msg']}. Give a job, or the keys of train.model (hidden, layers, "
                "heads, kv_heads, ffn, vocabulary, ...)."
            ) from error

    def lengths(self, asked: LengthsAsked, console: Console) -> tuple[list[tuple[int, ...]], int]:
        """The lengths of some batches, and the vocabulary.

        Raises:
            EvermeshError: of the data, LengthsInvalid, or LayoutRequestInvalid where nobody says how long sequences are.
        """
        data = self.job.train.data if self.job else None
        context = asked.context or (data.context if data else None)
        batch_tokens = asked.batch_tokens or (data.batch_tokens if data else _BATCH_TOKENS)
        if self.job is not None and asked.path is None:
            corpora = open_corpora(self.job.train.data, console)
            overrides = {"context": context, "batch_tokens": batch_tokens}
            sampler = Sampler(corpora, self.job.train.data.model_copy(update=overrides), self.job.train.seed)
            return [sampler.next_batch().lengths for _ in range(asked.batches)], corpora[0].vocabulary
        if asked.path is not None:
            return drawn_batches(read_lengths(asked.path), context, batch_tokens, asked.batches), VOCABULARY
        if context is None:
            raise LayoutRequestInvalid(
                f"{self.path} describes a model without data. Say how long its sequences are: --lengths FILE, or --context "
                "TOKENS where all are equally long."
            )
        return [(context,) * max(1, batch_tokens // context)], VOCABULARY

    def options(self, device: Device | None) -> SearchOptions:
        """What the search may choose from; without a ``device``, that of the job, or an H100."""
        train = self.job.train if self.job else None
        on_cpu = train is not None and train.device.kind == "cpu"
        compiles = train.compile if train else None
        return SearchOptions(
            device=device or DEVICES["cpu" if on_cpu else "h100"],
            element_bytes=ELEMENT_BYTES[train.dtype] if train else 2,
            supports=lambda layout: is_supported(layout, self.model, compiles),
        )
