"""Job files: every error names key, line and way out; overrides; the layout; the round trip."""

import json
import re
from pathlib import Path

import pytest
import yaml

from evermesh.launcher import JobConfig, load_job, write_job
from evermesh.launcher.demo import quickstart
from evermesh.launcher.errors import JobFileInvalid

KEYS = ", ".join(JobConfig.model_fields)
GOOD = """\
workers: 4
train:
  steps: 30
  data:
    sources:
      - kind: stdlib
        vocabulary: 2048
  layout:
    capacity: 512
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def errors(path: Path, *overrides: str) -> list[str]:
    """What is said about a file, one problem per line."""
    with pytest.raises(JobFileInvalid) as caught:
        load_job(path, overrides)
    assert len(str(caught.value).splitlines()) == len(caught.value.problems)
    return str(caught.value).splitlines()


def test_a_layout_that_is_not_given_uses_all_workers(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, GOOD))
    assert job.workers == job.train.layout.hdp == 4
    assert job.train.layout.capacity == 512


def test_a_layout_that_does_not_fit_names_its_line_and_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "    hdp: 3\n")
    [text] = errors(path)
    assert text.startswith(f"{path}:10: pp 1 x hdp 3 x tp 1 = 3 ranks, but 4 were started. Set layout.hdp to 4")


def test_workers_that_the_fixed_degrees_do_not_divide_name_the_line_of_workers(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "    pp: 3\n")
    [text] = errors(path)
    assert text.startswith(f"{path}:1: pp 3 x tp 1 = 3 ranks per model replica do not divide 4 workers. Start 3 or 6")


def test_an_unknown_key_suggests_the_closest_one(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("  steps: 30", "  stpes: 30"))
    assert errors(path) == [f"{path}:3: train.stpes is not a key. Did you mean train.steps?"]


def test_a_key_on_the_wrong_level_suggests_the_right_one(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "capacity: 4\n")
    assert errors(path) == [f"{path}:10: capacity is not a key. Did you mean train.layout.capacity?"]


def test_an_unknown_key_without_a_close_one_lists_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "zzz: 4\n")
    assert errors(path) == [f"{path}:10: zzz is not a key. Keys of a job: {KEYS}."]


def test_every_problem_is_reported_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("30", "-1").replace("2048", "12").replace("512", "much"))
    assert errors(path) == [
        f"{path}:3: train.steps is -1; it should be greater than 0.",
        f"{path}:7: train.data.sources.0.vocabulary is 12; it should be greater than or equal to 300.",
        f"{path}:9: train.layout.capacity is 'much'; it should be a valid integer, unable to parse string as an integer.",
    ]


def test_a_code_that_the_nodes_cannot_hold_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "  snapshot: {code: 2+2}\n")
    [text] = errors(path, "nodes=2")
    assert "train.snapshot.code 2+2 keeps parity on 2 other nodes, but there are 2 nodes in all" in text
    for given in ("nodes=4", "train.snapshot.code=auto", "train.snapshot.code=none", "train.snapshot=off"):
        load_job(path, ["nodes=2", given])
    assert "train.snapshot.code" in errors(path, "train.snapshot.code=raid5")[0]


def test_a_rule_between_values_names_the_line_of_their_section(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "  model:\n    hidden: 100\n    heads: 3\n")
    assert errors(path) == [f"{path}:10: train.model: hidden 100 is not a multiple of heads 3."]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("kind: stlib", "train.data.sources.0.kind is 'stlib'; it is one of 'corpus', 'stdlib'."),
        ("weight: 1", "train.data.sources.0.kind is missing; it is one of corpus, stdlib."),
    ],
)
def test_a_wrong_kind_lists_the_kinds(tmp_path: Path, source: str, text: str) -> None:
    path = write(tmp_path, f"train:\n  data:\n    sources:\n      - {source}\n")
    assert errors(path) == [f"{path}:4: {text}"]


def test_a_value_that_fits_no_type_of_several_is_named_by_its_key_alone(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("    capacity: ", "    activations: [keep, drop]\n    capacity: "))
    words = "it should be 'keep', 'recompute' or 'offload'."
    found = [text.partition(": ")[2] for text in errors(path)]
    assert found[0] == f"train.layout.activations is a list of 2; {words}"
    assert found[1] == f"train.layout.activations.1 is 'drop'; {words}"


def test_a_missing_key_is_named_with_the_line_around_it(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 3\n")
    [text] = errors(path)
    assert text.startswith(f"{path}:1: train.data is missing; add it.")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is empty. A job needs at least train.data.sources; see deploy/jobs/quickstart.yaml."),
        (
            "- 1\n",
            "holds no mapping of keys. A job needs at least train.data.sources; see deploy/jobs/quickstart.yaml.",
        ),
    ],
)
def test_a_file_without_keys_says_what_a_job_needs(tmp_path: Path, content: str, text: str) -> None:
    path = write(tmp_path, content)
    assert errors(path) == [f"{path}: {text}"]


def test_a_file_that_is_not_yaml_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: [1\n  data: 3\n")
    [text] = errors(path)
    assert text.startswith(f"{path}:3: not YAML: ")


def test_a_key_given_twice_names_the_second_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "workers: 2\n")
    assert errors(path) == [f"{path}:10: workers is given twice; remove one."]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "train:\n\tsteps: 3\n",
            ":2: not YAML: .*'.t' that cannot start any token. Check indentation .spaces, no tabs",
        ),
        ("? [1, 2]\n: 3\n", ":1: not YAML: a key is a list or a mapping"),
        ("train: !python/object {}\n", ":1: not YAML: could not determine a constructor for the tag"),
        ("workers: 1\n---\nworkers: 2\n", ":2: not YAML: expected a single document in the stream"),
        ("train: &t\n  data: *t\n", ": is nested too deeply, or an anchor contains itself"),
        (f"train: {'[' * 2000}{']' * 2000}\n", ": is nested too deeply"),
        ("train: \0\n", ": not YAML: unacceptable character"),
    ],
)
def test_what_no_job_can_hold_is_refused_with_its_place(tmp_path: Path, content: str, text: str) -> None:
    path = write(tmp_path, content)
    [found] = errors(path)
    assert re.match(re.escape(str(path)) + text, found)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"train: \xff\n")
    for path in (tmp_path / "job.yaml", tmp_path, tmp_path / "job.yaml" / "below", tmp_path / ("long" * 100)):
        [text] = errors(path)
        assert text.startswith(f"{path}: cannot be read as text (")


@pytest.mark.parametrize("value", ["yes", "true", "1:30", "2024-13-45", "0x10"])
def test_words_are_no_numbers(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, GOOD.replace("workers: 4", f"workers: {value}"))
    [text] = errors(path)
    assert text.startswith(f"{path}:1: workers is {value!r}; it should be a valid integer")


def test_numbers_are_decimal(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, GOOD.replace("workers: 4", "workers: 010")), ["train.data.batch_tokens=1e4"])
    assert (job.workers, job.train.data.batch_tokens) == (10, 10_000)


def test_a_key_that_is_no_word_is_an_unknown_key(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "3: 4\ntrue: 5\n")
    assert [text.split(". Keys")[0] for text in errors(path)] == [
        f"{path}:10: 3 is not a key",
        f"{path}:11: true is not a key",
    ]


def test_a_key_of_another_kind_says_whose_it_is_and_how_to_replace_the_section(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "  device:\n    threads: 2\n    kind: cpu\n")
    assert errors(path, "train.device.kind=cuda") == [
        f"{path}:11: train.device.threads is a key of kind cpu, but the kind is cuda. Remove it, or replace the "
        "section: --set 'train.device={kind: cuda}'."
    ]
    assert load_job(path, ["train.device={kind: cuda}"]).train.device.kind == "cuda"


def test_the_keys_of_a_section_with_kinds_are_those_of_its_kind(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  data:\n    sources:\n      - kind: corpus\n")
    assert errors(path) == [
        f"{path}:4: train.data.sources.0.path is missing; add it. Keys of train.data.sources.0: kind, path, weight."
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pp: 8", "8 pipeline stages, but the model has 4 layers, and every stage takes at least one. Set layout.pp"),
        (
            "split: [1, 2]",
            "layout.split names 2 stages with 3 layers together, but there are 1 stages (pp 1 x virtual_stages 1)",
        ),
        ("ep: 2", "layout.ep is 2, but the model has no experts to share. Leave it out, or describe"),
        ("etp: 2", "layout.etp is 2, but the model has no experts to share."),
        ("offload: 0.5", "layout.offload is 0.5, but no block offloads: layout.activations is keep. Set layout."),
        ("activations: [offload]", "layout.activations names 1 blocks, but the model has 4 layers. Name as many"),
        ("schedule: interleaved-1f1b", "schedule interleaved-1f1b takes at least 2 virtual stages per rank, not 1."),
    ],
)
def test_a_layout_that_cannot_work_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, GOOD + f"    {line}\n")
    [text] = errors(path)
    assert text.startswith(f"{path}:10: {message}"), text


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ("ep: 3", "layout.ep is 3, which does not divide experts, 8. It can be 1, 2, 4, 8."),
        (
            "ep: 8",
            "ep 8 x etp 1 = 8 ranks that share experts do not divide the hdp 4 x tp 1 = 4 ranks of a pipeline stage.",
        ),
    ],
)
def test_experts_that_the_workers_cannot_share_name_the_line(tmp_path: Path, degrees: str, message: str) -> None:
    path = write(tmp_path, GOOD + f"    {degrees}\n  model:\n    moe: {{experts: 8, ffn: 64}}\n")
    [text] = errors(path)
    assert text.startswith(f"{path}:10: {message}"), text


def test_a_tensor_parallel_degree_that_does_not_fit_names_its_line_and_those_that_do(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "    tp: 4\n")
    [text] = errors(path)
    assert text.startswith(f"{path}:10: layout.tp is 4, which does not divide kv_heads 2. ")
    assert text.endswith("can have a layout.tp of 1, 2.")
    layout = load_job(path, ["train.layout.tp=2"]).train.layout
    assert (layout.tp, layout.hdp) == (2, 2)


@pytest.mark.parametrize("name", ["../elsewhere", "a b", "-x", "x" * 101])
def test_a_name_that_is_no_name_says_what_is_one(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, GOOD + f"name: {name}\n")
    [text] = errors(path)
    assert text.startswith(f"{path}:10: name: {name!r} is no name for a run; use up to 100 letters, digits, dots")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    [text] = errors(tmp_path / "nothing.yaml")
    assert "no such file" in text
    assert str(Path.cwd()) in text


def test_overrides_are_yaml_values_and_later_ones_win(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    overrides = ["train.steps=7", "train.steps=8", "train.data.sources.0.vocabulary=512", "train.checkpoint={every: 3}"]
    job = load_job(path, [*overrides, "train.optimizer.clip_norm=null", "train.optimizer.lr=1e-4", "workers=2"])
    assert (job.train.steps, job.train.checkpoint.every, job.train.layout.hdp) == (8, 3, 2)
    assert job.train.data.sources[0].model_dump()["vocabulary"] == 512
    assert (job.train.optimizer.clip_norm, job.train.optimizer.lr) == (None, 1e-4)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.steps=0", "train.steps is 0; it should be greater than 0."),
        ("train.steps", "is not KEY=VALUE; write for example --set train.steps=20."),
        ("train..steps=3", "is not KEY=VALUE; write for example --set train.steps=20."),
        ("train.steps=[1", "'[1' is not a YAML value. Quote it."),
        ("train.layout=3", "train.layout is 3; it should be a mapping of keys."),
        ("train.data.sources=[]", "train.data.sources is a list of 0; it should have at least 1 item."),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas.1 is missing; add it."),
        ("1=2", f"1 is not a key. Keys of a job: {KEYS}."),
        ("train.steps.x=1", "train.steps is 30, which has no keys below it."),
        ("train.data.sources.4.kind=stdlib", "train.data.sources is a list; its indices are 0 to 0."),
        ("train.model={hiden: 4}", "train.model.hiden is not a key. Did you mean train.model.hidden?"),
        (
            "train.layout.hdp=3",
            "pp 1 x hdp 3 x tp 1 = 3 ranks, but 4 were started. Set layout.hdp to 4, or start 3 ranks.",
        ),
    ],
)
def test_an_error_in_an_override_names_the_override(tmp_path: Path, override: str, text: str) -> None:
    assert errors(write(tmp_path, GOOD), override) == [f"--set {override}: {text}"]


def test_a_written_job_is_read_back_equal(tmp_path: Path) -> None:
    job = load_job(quickstart(), ["train.optimizer.eps=1e-12", "train.checkpoint.every=null", "train.stop_at=null"])
    write_job(job, tmp_path / "copy.yaml")
    assert load_job(tmp_path / "copy.yaml") == job


@pytest.mark.parametrize("name", ["1e3", "010", "yes", "null", "3", "2024-01-01"])
def test_a_name_that_looks_like_something_else_is_written_so_that_every_reader_of_yaml_finds_it(
    tmp_path: Path, name: str
) -> None:
    job = load_job(write(tmp_path, GOOD), [f"name={json.dumps(name)}"])
    write_job(job, tmp_path / "copy.yaml")
    assert load_job(tmp_path / "copy.yaml").name == name
    assert yaml.safe_load((tmp_path / "copy.yaml").read_text())["name"] == name


def test_spaces_around_the_key_of_an_override_do_not_count(tmp_path: Path) -> None:
    assert load_job(write(tmp_path, GOOD), [" train.steps = 7"]).train.steps == 7


def test_the_quickstart_job_is_valid() -> None:
    job = load_job(quickstart())
    assert job.train.layout.hdp == job.workers == 4
    assert job.train.data.context == 8192
