"""The model of a DeepSpeed checkpoint, put together from pipeline stages and tensor-parallel ranks. Imports no torch."""

from collections.abc import Collection, Iterator, Mapping

from pydantic import JsonValue

from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.foreign.deepspeed_files import Files, degrees
from evermesh.checkpoint.foreign.deepspeed_model import AGAIN, BUFFER, ModelStates, read
from evermesh.checkpoint.foreign.deepspeed_patterns import INFO, Rules
from evermesh.checkpoint.foreign.fragments import Fragment, Whole, assemble, placed, whole
from evermesh.checkpoint.foreign.patterns import Shape
from evermesh.checkpoint.foreign.torch_files import TorchTensor
from evermesh.checkpoint.foreign.values import Values
from evermesh.checkpoint.format import StoredTensor
from evermesh.checkpoint.stores.places import Place

ByRank = list[tuple[Shape, list[Fragment]]]
"""By tensor-parallel rank: the shape of its part of a tensor, and what makes that up."""
_TIED = "tied_modules."
_MODULE = dict[str, TorchTensor]


class Grid:
    """All files of the model in one folder, by pipeline stage and tensor-parallel rank."""

    def __init__(self, path: Place, files: Files, values: Values) -> None:
        self.path, self.values = path, values
        models = [ModelStates(of_rank) for of_rank in files.models]
        self.first = models[0].first
        stages, self.ranks = degrees(path, self.first, files)
        self.stages = [models[stage * self.ranks : (stage + 1) * self.ranks] for stage in range(stages)]
        self.rules = Rules(path, self.first.get(INFO), self.ranks)
        self._check_together(models)
        self._check_experts(files)
        self.aliases = {alias: name for model in models for alias, name in model.aliases.items()}
        self.buffer_names = {name for model in models for name in model.buffer_names}
        self.is_partitioned = models[0].is_partitioned
        self.modules = [self._module(rank, files) for rank in range(self.ranks)]

    def _check_together(self, models: list[ModelStates]) -> None:
        steps = [model.first.get("global_steps") for model in models]
        if len(set(map(str, steps))) != 1:
            raise ForeignUnusable(
                self.path, f"its files of the model are of steps {sorted(set(map(str, steps)))}", AGAIN
            )

    def _check_experts(self, files: Files) -> None:
        numbers = self.first.get("num_experts") or ()
        wanted = {(layer, expert) for layer, number in enumerate(numbers) for expert in range(min(number, 1 << 20))}
        if files.experts and wanted != files.experts.keys():
            fact = f"it has the files of {len(files.experts)} of {sum(numbers)} experts"
            raise ForeignUnusable(self.path, fact, AGAIN)

    def trained(self) -> dict[str, list[Shape]]:
        """Shapes of the parts of trained parameters by tensor-parallel rank, as the first stage names them that has them."""
        found: dict[str, list[Shape]] = {}
        for stage in self.stages:
            of_ranks = [{n: s for group in model.shapes for n, s in group.items()} for model in stage]
            found |= {name: [of[name] for of in of_ranks] for name in of_ranks[0] if name not in found}
        return found

    def assembled(self, kind: str, name: str, parts: ByRank) -> StoredTensor:
        """The index of the parameter ``name``, or of one of its states, from the parts of all tensor-parallel ranks."""
        combined = self.rules.combined(name, [shape for shape, _ in parts])
        fragments: list[Fragment] = []
        for (_, of_rank), box in zip(parts, combined.boxes, strict=True):
            fragments += () if box is None else (placed(fragment, box) for fragment in of_rank)
        return assemble(self.path, kind + name, combined.form, fragments)

    def frozen(self, trained: Collection[str]) -> dict[str, StoredTensor]:
        """Weights that no optimizer has, by name."""
        found = self._frozen_pieces() if self.is_partitioned else self._frozen_wholes(trained)
        return {name: self.assembled("", name, parts) for name, parts in found.items()}

    def _frozen_pieces(self) -> dict[str, ByRank]:
        found: dict[str, ByRank] = {}
        for stage in self.stages:
            of_ranks = [{name: (shape, pieces) for name, shape, pieces in m.frozen_pieces()} for m in stage]
            found |= {name: [of[name] for of in of_ranks] for name in of_ranks[0] if name not in found}
        return found

    def _frozen_wholes(self, trained: Collection[str]) -> dict[str, ByRank]:
        known = {*trained, *self.buffer_names, *self.aliases}
        return {
            name: [(module[name].shape, [Whole(module[name])]) for module in self.modules]
            for name in self.modules[0]
            if name not in known
        }

    def buffers(self) -> dict[str, StoredTensor]:
        """Buffers, by name with ``BUFFER`` before it. Nothing says that ranks divide them, unless a pattern does."""
        found: dict[str, StoredTensor] = {}
        for name in sorted(self.buffer_names & self.modules[0].keys()):
            if self.rules.names(name):
                parts: ByRank = [(module[name].shape, [Whole(module[name])]) for module in self.modules]
                found[BUFFER + name] = self.assembled(BUFFER, name, parts)
                continue
            found[BUFFER + name] = whole(self.path, BUFFER + name, self.modules[0][name])
            if self.ranks > 1:
                self.values.left_out.append(f"{BUFFER}{name} of tensor-parallel ranks but the first")
        return found

    def with_aliases(self, tensors: Mapping[str, StoredTensor], kinds: Collection[str]) -> dict[str, StoredTensor]:
        """``tensors``, tied parameters under all their names."""
        pairs = [(kind + alias, kind + name) for alias, name in self.aliases.items() for kind in sorted(kinds)]
        return dict(tensors) | {alias: tensors[name] for alias, name in pairs if name in tensors}

    @property
    def step(self) -> int | None:
        """Updates made."""
        return self.stages[0][0].step

    def objects(self) -> dict[str, JsonValue]:
        """What the first file of the model holds besides tensors."""
        aliases = self.values.json(self.aliases, "shared_params")
        return self.stages[0][0].objects(self.values) | {"aliases": aliases}

    def description(self) -> dict[str, JsonValue]:
        """What wrote it, and on how many ranks a model was."""
        parallel: dict[str, JsonValue] = {"pipeline": len(self.stages), "tensor": self.ranks}
        return self.stages[0][0].description(self.values) | (
            {"ranks": parallel} if len(self.stages) * self.ranks > 1 else {}
        )

    def _module(self, rank: int, files: Files) -> _MODULE:
        """Weights and buffers that the files of a tensor-parallel rank hold as they are."""
        found = dict[str, TorchTensor]()
        for stage in self.stages:
            found = _tensors(stage[rank].module) | found
        for index, file in (files.layers[rank] if files.layers else {}).items():
            found |= dict(self._of_layer(index, _tensors(read(file))))
        for file in files.experts.values():
            found |= _tensors(read(file))
        return found

    def _of_layer(self, index: int, layer: _MODULE) -> Iterator[tuple[str, TorchTensor]]:
        """A layer of a pipeline module under the names of the whole; one that is tied has the name of its key."""
        names = {*self.trained(), *self.buffer_names}
        before = f"{index}."
        if not any(name.startswith(before) for name in names):
            for key in sorted({name.split(".")[1] for name in names if name.startswith(_TIED)}):
                tied = f"{_TIED}{key}."
                if {name.removeprefix(tied) for name in names if name.startswith(tied)} <= layer.keys():
                    before = tied
        yield from ((before + name, tensor) for name, tensor in layer.items())


def _tensors(module: Mapping[str, object]) -> _MODULE:
    return {name: tensor for name, tensor in module.items() if isinstance(tensor, TorchTensor)}
