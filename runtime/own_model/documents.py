"""Documents of a script as what the ranks process of them."""

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch
from evermesh.parallelism.collectives import Communicator
from evermesh.runtime.errors import BatchInvalid
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch

NOT_COUNTED = -100
"""The label of a token that is not predicted, as in transformers."""


class Documents:
    """A batch: documents, and which of their tokens are predicted.

    A document of n tokens is a sequence of n - 1: every token but the last predicts the one behind it.

    Args:
        tokens: of every document, 1-D.
        labels: of every document, as long as it is; a token with the label -100 is not predicted. None: all are.

    Raises:
        BatchInvalid: a document has nothing to predict, or labels of another length.
    """

    def __init__(self, tokens: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> None:
        labels = tokens if labels is None else labels
        if not tokens or len(tokens) != len(labels):
            raise BatchInvalid(
                f"{len(tokens)} documents with {len(labels)} labels. Give at least one, and labels of each."
            )
        for number, (document, label) in enumerate(zip(tokens, labels, strict=True)):
            if (
                document.dim() != 1
                or document.is_floating_point()
                or len(document) < 2
                or label.shape != document.shape
            ):
                raise BatchInvalid(
                    f"document {number} is {document.dtype} of shape {list(document.shape)}, its labels have shape "
                    f"{list(label.shape)}. A document is a 1-D tensor of at least 2 token ids, and has as many labels."
                )
        self.inputs = [document[:-1].to("cpu", torch.int64) for document in tokens]
        self.targets = [label[1:].to("cpu", torch.int64) for label in labels]
        self.lengths = tuple(len(document) for document in self.inputs)
        self.num_counted = sum(int((target != NOT_COUNTED).sum()) for target in self.targets)

    def local(self, plan: BatchPlan, hdp_rank: int) -> LocalBatch:
        """What one HDP rank processes."""
        micro_batches = tuple(self._micro_batch(micro_batch) for micro_batch in plan.ranks[hdp_rank])
        return LocalBatch(micro_batches, self.lengths, self.num_counted)

    def check_agreed(self, plan: BatchPlan, communicator: Communicator) -> None:
        """Return if all ranks have the same documents and plan. Collective; takes tensors on the host.

        Raises:
            BatchInvalid: they have not; on every rank.
        """
        digest = xxhash.xxh3_64(plan.to_json())
        for tensor in (*self.inputs, *self.targets):
            digest.update(tensor.contiguous().numpy().data)
        number = digest.intdigest() >> 2  # so that its negative fits too
        extremes = torch.tensor([number, -number])
        communicator.all_reduce(extremes, "batch", maximum=True)
        if extremes[0] != -extremes[1]:
            raise BatchInvalid(
                f"the documents of the ranks differ (rank {communicator.rank} has {len(self.lengths)} with "
                f"{sum(self.lengths)} tokens to read). Give all ranks the same list: each processes its part of every batch."
            )

    def _micro_batch(self, micro_batch: MicroBatch) -> LocalMicroBatch:
        spans = [(piece.sequence, start, stop) for piece in micro_batch.pieces for start, stop in piece.ranges]
        empty = torch.empty(0, dtype=torch.int64)
        tokens_T = torch.cat([empty, *(self.inputs[sequence][start:stop] for sequence, start, stop in spans)])
        targets_T = torch.cat([empty, *(self.targets[sequence][start:stop] for sequence, start, stop in spans)])
        is_counted_T = targets_T != NOT_COUNTED
        return LocalMicroBatch(
            plan=micro_batch,
            tokens_T=tokens_T,
            targets_T=targets_T.masked_fill(~is_counted_T, 0),
            positions_T=torch.cat([empty, *(torch.arange(start, stop) for _, start, stop in spans)]),
            counts_T=is_counted_T.float(),
        )
