"""A model of transformers on the ranks of a layout: plans, micro-batches, gradients."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.stores.places import Place, place_of
from evermesh.parallelism.attention.kernels import kernel_for
from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.heads import check_heads
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner import HybridPlanner, Planner
from evermesh.parallelism.tensor.loss import cross_entropy
from evermesh.parallelism.verifier import verify_plan
from evermesh.runtime.cost import cost_of_shape
from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch
from evermesh.runtime.own_model.attention import AttentionSlot
from evermesh.runtime.own_model.cost import model_shape
from evermesh.runtime.own_model.documents import Documents
from evermesh.runtime.own_model.examining import check_layout, decoder_layers, examine, text_config
from evermesh.runtime.own_model.gradients import Gradients
from evermesh.runtime.own_model.saving import Destination, ModelSaves
from evermesh.runtime.own_model.sharding import ShardedModel, device_mesh
from evermesh.runtime.own_model.state import load_state, state_to_save
from evermesh.runtime.own_model.tensor import TensorParallelModel
from evermesh.runtime.process_group import Groups


class _Spread(NamedTuple):
    """A model and what was applied to it, in this order."""

    model: nn.Module
    slot: AttentionSlot
    tensor: TensorParallelModel
    sharded: ShardedModel


def parallelize(
    model: nn.Module,
    layout: Layout,
    mesh: Groups,
    *,
    compute_dtype: torch.dtype | None = None,
    cost: CostModel | None = None,
    planner: Planner | None = None,
) -> "ParallelModule":
    """Spread a causal decoder of transformers over the ranks of ``mesh``, in place; it needs no edit.

    Collective. Every rank gives the whole model, on the CPU or on its device; the weights of rank 0 are those of all.

    Args:
        model: from ``AutoModelForCausalLM.from_config`` or ``from_pretrained``.
        layout: ``hdp`` x ``tp`` ranks, the capacity of a micro-batch in tokens, and whether layers are recomputed.
        mesh: what ``evermesh.start(layout)`` returned.
        compute_dtype: type of activations and gathered parameters, such as bfloat16; parameters, their gradients and the
            optimizer keep the type of the model. None: that one.
        cost: coefficients for the planner; by default nominal ones from the model's sizes.
        planner: what plans the batches; by default ``HybridPlanner``.

    Raises:
        LayoutDoesNotFit: the layout has an axis that is not there for such a model, or a degree that does not divide it.
        UnsupportedModel: the model would give another result here than alone; names what it is and the way out.
        ExtraMissing: transformers is not installed.
    """
    check_layout(layout)
    config, device = text_config(model), _device_of(mesh)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModel(
            f"{type(model).__name__} has parameters on the meta device, without values. Make it on the CPU; "
            "a checkpoint can be loaded into it later."
        )
    slot, shape = examine(model, config, layout), model_shape(model, config)
    check_heads(layout, shape.heads, shape.kv_heads)
    _send_weights(model, mesh)
    axes = device_mesh(mesh, device.type)
    # tensor parallelism first: what is sharded is this rank's part of a matrix
    tensor = TensorParallelModel(model, config, mesh.tp, axes["tp"] if mesh.tp.size > 1 else None)
    dtype = compute_dtype or next(model.parameters()).dtype
    sharded = ShardedModel(model, decoder_layers(model), axes["hdp"], mesh.hdp, compute_dtype)
    threads = None if device.type == "cuda" else torch.get_num_threads()
    planner = planner or HybridPlanner(layout, cost or cost_of_shape(shape, layout, threads, dtype.itemsize))
    return ParallelModule(_Spread(model.train(), slot, tensor, sharded), layout, mesh, planner, dtype)


class ParallelModule:
    """A model whose documents, gradients and parameters are spread over all ranks; ``parallelize`` makes it.

    All methods but ``parameters`` and ``named_parameters`` are collective over all ranks.
    """

    def __init__(self, spread: _Spread, layout: Layout, mesh: Groups, planner: Planner, dtype: torch.dtype) -> None:
        self.model, self.layout, self.mesh, self.planner = spread.model, layout, mesh, planner
        self.plan: BatchPlan | None = None
        """Of the last batch."""
        self.device = _device_of(mesh)
        self._slot, self._tensor, self._sharded = spread.slot, spread.tensor, spread.sharded
        self._parameters = dict(spread.model.named_parameters())
        self._gradients = Gradients(self._parameters, spread.tensor, mesh)
        self._kernel = kernel_for(self.device, dtype)
        self._saves = ModelSaves(mesh)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's shards, as DTensors: what an optimizer takes."""
        return iter(self._parameters.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The shards with their names in transformers."""
        return iter(self._parameters.items())

    def train_batch(self, documents: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> float:
        """Add the gradients of the mean loss of ``documents`` to the parameters; returns that loss, the same on every rank.

        Every predicted token of the batch weighs the same, whatever the plan. All ranks give the same documents.

        Args:
            documents: token ids of each, 1-D, at least 2; every token but the last predicts the one behind it.
            labels: of each, as long as it is; a token with the label -100 is not predicted. None: all are.

        Raises:
            BatchInvalid: a document has nothing to predict, or ranks were given different ones.
            SequenceTooLong: a document exceeds what all HDP ranks hold together.
        """
        self.mesh.moment.begin_step(self.mesh.moment.step + 1)
        batch = self._planned(Documents(documents, labels))
        self._gradients.begin_step()
        self._sharded.gather()
        total = self._zero()
        for micro_batch in batch.micro_batches:
            loss = self._loss(micro_batch, batch)
            loss.backward()
            total += loss.detach()
            self._end_micro_batch()
        self._sharded.reduce()
        self._gradients.end_step()
        return self._summed(total)

    @torch.no_grad()
    def evaluate(self, documents: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> float:
        """The mean loss of ``documents``, as ``train_batch`` returns it; leaves nothing behind."""
        moment = self.mesh.moment
        before, moment.phase = moment.phase, "evaluate"
        batch = self._planned(Documents(documents, labels))
        self._sharded.gather()
        total = self._zero()
        for micro_batch in batch.micro_batches:
            total += self._loss(micro_batch, batch)
            self._end_micro_batch()
        self._sharded.release()
        loss = self._summed(total)
        moment.phase = before
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most ``max_norm``; returns the norm before, the same on every rank."""
        return self._gradients.clip_(max_norm)

    def save(
        self,
        directory: Place | str,
        step: int,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        keep: int | Retention | None = 2,
        wait: bool = True,
    ) -> Place:
        """Write a checkpoint of ``step`` below ``directory`` and return its path; every rank writes its own part.

        ``keep`` newest checkpoints stay, or those that a policy keeps; None keeps all. Without ``wait`` it returns when
        the state is copied to host memory, and a process beside every rank writes it while training goes on; the next
        call, or ``finish_saving``, waits for its end. Call that behind the last one.

        Raises:
            CheckpointNotSaved: on every rank, if any of them failed with this checkpoint or with the one before; earlier
                ones are untouched.
            HostMemoryShort: on every rank, if without ``wait`` any has no room for its copy.
        """
        state = state_to_save(self._parameters, self._tensor, self.model, optimizer, self.mesh)
        place = Destination(place_of(directory), keep)
        return self._saves.save(place, step, state) if wait else self._saves.begin(place, step, state)

    def finish_saving(self) -> None:
        """Return when the last checkpoint is durable.

        Raises:
            CheckpointNotSaved: on every rank, if any of them failed; earlier checkpoints are untouched.
        """
        self._saves.finish()

    def load(self, directory: Place | str, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Take over the newest checkpoint below ``directory``, of any number of ranks and any tp; returns its step.

        Raises:
            CheckpointNotFound, CheckpointMismatch, CheckpointCorrupt: see ``evermesh.checkpoint.load``.
        """
        return load_state(place_of(directory), self._parameters, self._tensor, self.model, optimizer, self.mesh)

    def _planned(self, documents: Documents) -> LocalBatch:
        self.plan = self.planner.plan(documents.lengths)
        verify_plan(self.plan, documents.lengths, self.layout)
        documents.check_agreed(self.plan, self.mesh.host)
        return documents.local(self.plan, self.mesh.place.hdp)

    def _loss(self, micro_batch: LocalMicroBatch, batch: LocalBatch) -> Tensor:
        """This micro-batch's part of the mean loss of the batch, a scalar."""
        # set for the backward pass too, in which layers may be recomputed
        self._slot.attend = MicroBatchAttention(micro_batch.plan, batch.lengths, self._kernel, self.mesh.hdp)
        tokens_T, targets_T, positions_T, counts_T = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (micro_batch.tokens_T, micro_batch.targets_T, micro_batch.positions_T, micro_batch.counts_T)
        )
        output = self.model(input_ids=tokens_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False)
        logits_TV = output.logits.squeeze(0)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        vocabulary = self._tensor.vocabulary or logits_TV.shape[-1]
        sharers = self.mesh.tp if self._tensor.vocabulary else Communicator()
        losses_T = cross_entropy(logits_TV, targets_T, vocabulary, sharers)
        return (losses_T * counts_T).sum() / max(1, batch.num_counted)

    def _end_micro_batch(self) -> None:
        self._slot.attend = None
        self._slot.calls.clear()
        self._tensor.end_micro_batch()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def _summed(self, total: Tensor) -> float:
        # ranks that share a model have the same loss: one of them counts
        total = total if self.mesh.tp.rank == 0 else torch.zeros_like(total)
        self.mesh.world.all_reduce(total, "scalars")
        return total.item()


def _device_of(mesh: Groups) -> torch.device:
    """Of this rank: the GPU that it was bound to where its groups use NCCL."""
    group: Any = mesh.world.group or torch.distributed.group.WORLD
    backend = torch.distributed.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


@torch.no_grad()
def _send_weights(model: nn.Module, mesh: Groups) -> None:
    """Copy parameters and buffers of rank 0 to all ranks: made from a configuration they are random on each."""
    for tensor in (*model.parameters(), *model.buffers()):
        values = tensor.detach().contiguous()
        (mesh.host if values.device.type == "cpu" else mesh.world).broadcast(values, 0, "weights")
        tensor.copy_(values)
