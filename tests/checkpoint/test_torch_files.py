"""Files of torch.save are indexed: the bytes at the places that the index names are the tensors that were saved."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evermesh.checkpoint import Interval, load
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.foreign.fragments import Slice, Whole, assemble
from evermesh.checkpoint.foreign.torch_files import Part, TorchTensor, read_torch_file
from evermesh.checkpoint.foreign.values import Values, number
from evermesh.checkpoint.format import StoredTensor
from evermesh.checkpoint.regions import Box
from evermesh.checkpoint.sources import Source, plain_files


def _save(value: Any, path: Path) -> Any:
    torch.save(value, path)
    return read_torch_file(Part(path))


def _source(folder: Path, tensors: dict[str, StoredTensor]) -> Source:
    return Source(folder, "deepspeed", tensors, plain_files(folder, tensors))


def _loaded(folder: Path, stored: StoredTensor) -> Tensor:
    got = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    result = load(_source(folder, {"w": stored}), {"w": (Interval(0, got.numel()), got)})
    assert result.bytes_read == got.nbytes
    return got


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_is_found(dtype: str, tmp_path: Path) -> None:
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (15 * DTYPES[dtype].num_bytes,), dtype=torch.uint8)
    values = raw.view(getattr(torch, dtype)).view(3, 5)
    found = _save({"w": values, "p": (values.clone()[1:],)}, tmp_path / "f.pt")
    for tensor, expected in ((found["w"], values), (found["p"][0], values[1:])):
        got = _loaded(tmp_path, assemble(tmp_path, "w", tensor.shape, [Whole(tensor)]))
        assert torch.equal(got.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w,
        lambda w: w.permute(2, 0, 1),
        lambda w: w[:, 1:3],
        lambda w: w[1:, ::2, 1:],
        lambda w: w[:, :, 3],
        lambda w: w[:1].expand(4, -1, -1),
        lambda w: w[2, 3, 1],
        lambda w: w[:0],
        lambda w: torch.nn.Parameter(w),
    ],
    ids=["whole", "permuted", "rows", "steps", "column", "expanded", "one", "none", "parameter"],
)
def test_views_of_any_strides_are_read_row_major(view: Any, tmp_path: Path) -> None:
    values = view(torch.arange(120.0).view(4, 5, 6))
    tensor = _save([values], tmp_path / "f.pt")[0]
    assert (tensor.shape, tensor.is_contiguous) == (tuple(values.shape), values.is_contiguous())
    assert torch.equal(_loaded(tmp_path, assemble(tmp_path, "w", tensor.shape, [Whole(tensor)])), values)


def test_slices_of_flat_tensors_make_up_boxes_of_tensors(tmp_path: Path) -> None:
    """As ZeRO over tensor parallelism stores them: flat partitions of the columns of each rank."""
    whole = torch.arange(7.0 * 6).view(7, 6)
    fragments = []
    for rank, (start, stop) in enumerate([(0, 2), (2, 6)]):
        flat = whole[:, start:stop].flatten()
        cut = len(flat) // 3 + 1
        for part, (first, last) in enumerate([(0, cut), (cut, len(flat))]):
            padded = torch.cat([torch.full((2,), -1.0), flat[first:last], torch.full((3,), -1.0)])
            tensor = _save(padded, tmp_path / f"{rank}-{part}.pt")
            fragments.append(Slice(tensor, 2, first, last - first, Box((0, start), (7, stop - start))))
    assert torch.equal(_loaded(tmp_path, assemble(tmp_path, "w", (7, 6), fragments)), whole)
    with pytest.raises(ForeignUnusable, match=r"do not fit together: tensor w of shape \(7, 6\): a gap"):
        assemble(tmp_path, "w", (7, 6), fragments[1:])
    with pytest.raises(ForeignUnusable, match="overlap"):
        assemble(tmp_path, "w", (7, 6), [*fragments, fragments[0]])
    with pytest.raises(ForeignUnusable, match="of a flat tensor"):
        assemble(tmp_path, "w", (7, 6), [Slice(fragments[0].tensor, 0, 0, 42)])


def test_fragments_of_two_types_are_refused(tmp_path: Path) -> None:
    one, two = _save([torch.zeros(2), torch.zeros(2, dtype=torch.int64)], tmp_path / "f.pt")
    with pytest.raises(ForeignUnusable, match="the tensor w is stored as float32 and int64"):
        assemble(tmp_path, "w", (4,), [Slice(one, 0, 0, 2), Slice(two, 0, 2, 2)])
    with pytest.raises(ForeignUnusable, match="the tensor w is not there"):
        assemble(tmp_path, "w", (4,), [])


def test_a_file_inside_a_file_is_read_where_it_is(tmp_path: Path) -> None:
    values = torch.randn(9)
    torch.save({"w": values}, tmp_path / "alone.pt")
    content = (tmp_path / "alone.pt").read_bytes()
    (tmp_path / "many").write_bytes(b"?" * 1001 + content + b"PK\x05\x06" + b"?" * 5000)
    tensor = read_torch_file(Part(tmp_path / "many", 1001, len(content)))["w"]
    assert torch.equal(_loaded(tmp_path, assemble(tmp_path, "w", (9,), [Whole(tensor)])), values)
    with pytest.raises(ForeignUnusable, match="are asked for"):
        read_torch_file(Part(tmp_path / "many", 1001, 10**9))


def _rewritten(source: Path, target: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            name = entry.filename.rpartition("/")[2]
            new.writestr(entry.filename, entries.get(name, old.read(entry)))
    return target


def test_files_that_are_of_another_kind_are_refused_with_the_reason(tmp_path: Path) -> None:
    torch.save([torch.zeros(100)], tmp_path / "f.pt")
    torch.save([torch.zeros(100)], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    _rewritten(tmp_path / "f.pt", tmp_path / "packed.pt", {}, zipfile.ZIP_DEFLATED)
    _rewritten(tmp_path / "f.pt", tmp_path / "big.pt", {"byteorder": b"big"})
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("a/b", b"")
    for name, reason in {
        "old.pt": r"no file of torch\.save since 1\.6",
        "packed.pt": "compressed or encrypted",
        "big.pt": "not little-endian",
        "other.zip": r"has not one data\.pkl",
        "none.pt": "cannot be read: No such file",
    }.items():
        with pytest.raises(ForeignUnusable, match=reason):
            read_torch_file(Part(tmp_path / name))


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(100, dtype=torch.float64), tmp_path / "f.pt")
    with zipfile.ZipFile(tmp_path / "f.pt") as archive:
        payload = archive.read("f/data.pkl")
    assert payload.count(b"Kd") == 2  # the number of elements, of the storage and of the tensor
    longer = payload[: payload.rindex(b"Kd")] + b"K\x65" + payload[payload.rindex(b"Kd") + 2 :]
    with pytest.raises(ForeignUnusable, match=r"of \[101\] float64 that reaches beyond its 800 bytes"):
        read_torch_file(Part(_rewritten(tmp_path / "f.pt", tmp_path / "longer.pt", {"data.pkl": longer})))


def test_values_are_json_where_they_can_be(tmp_path: Path) -> None:
    scalars = {
        t: torch.tensor(1.5 if t.is_floating_point else 1, dtype=t)
        for t in (torch.bfloat16, torch.float64, torch.int8, torch.bool)
    }
    value = {
        "a": (1, [2.5, None]),
        "t": torch.tensor([[7]]),
        "w": torch.zeros(3),
        "d": torch.float16,
        5: {"s": {1}},
        "c": 1j,
    }
    found = read_torch_file(Part(_path_of(value, tmp_path)), refuse_unknown=False)
    values = Values(tmp_path)
    assert values.json(found, "x") == {"a": [1, [2.5, None]], "t": 7, "d": "float16", "5": {"s": [1]}}
    assert list(values.tensors) == ["x.w"]
    assert values.left_out == ["x.c: __builtin__.complex"]
    for tensor in scalars.values():
        assert number(_save(tensor, tmp_path / "n.pt")) == tensor.item()


def _path_of(value: Any, folder: Path) -> Path:
    torch.save(value, folder / "value.pt")
    return folder / "value.pt"


def test_values_that_contain_themselves_or_multiply_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermesh.checkpoint.foreign.values._MOST_VALUES", 50_000)
    own: list[Any] = []
    own.append(own)
    pair: tuple[Any, ...] = ()
    for _ in range(40):
        pair = (pair, pair)
    for value in (own, pair):
        values = Values(tmp_path)
        assert values.objects({"x": value, "y": 1}, "") == {"y": 1}
        assert values.left_out == ["x: more than 50,000 values, or deeper than 64"]


def test_a_file_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    tensor = _save(torch.zeros(1000), tmp_path / "f.pt")
    source = _source(tmp_path, {"w": assemble(tmp_path, "w", (1000,), [Whole(tensor)])})
    with (tmp_path / "f.pt").open("r+b") as file:
        file.truncate(tensor.position + 10)
    with pytest.raises(ValueError, match="were saved"):
        load(source, {"w": (Interval(0, 1000), torch.empty(1000))})


def test_too_many_rows_are_refused(tmp_path: Path) -> None:
    tensor = TorchTensor(tmp_path / "f.pt", "float32", (1 << 17, 2), (1, 1 << 17), 64)
    with pytest.raises(ForeignUnusable, match=r"strides \[1, 131072\], as 262,144 rows"):
        assemble(tmp_path, "w", tensor.shape, [Whole(tensor)])
