"""Where rows may lie: files, folders of shards, folders by `save_to_disk`, URLs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data import files
from adaptfleet.core.data.datasets import load_dataset, open_dataset
from adaptfleet.core.data.files import read_span, read_spans
from adaptfleet.core.data.sources import find_held_out, find_training
from tests.store.conftest import s3_endpoint, s3_url  # noqa: F401  fixtures


def rows(start: int, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(start, start + count)]


def write(file: Path, content: list[dict[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), file, row_group_size=7)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return file


def order(spec: DataSpec) -> list[str]:
    """The prompts of both sides as the files have them."""
    index = open_dataset(spec)
    return [e.messages[0].content for scan in index.scans for at in range(len(scan.spans)) for e in scan.span_examples(at)]


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(files, "SPAN_ROWS", 10)
    return 10


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_any_span_is_read_alone_as_it_was_read_in_turn(tmp_path: Path, small_spans: int, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    if suffix == ".arrow":
        feather.write_feather(pa.Table.from_pylist(rows(0, 95)), file, compression="uncompressed", chunksize=7)
    else:
        write(file, rows(0, 95))
    if suffix == ".jsonl":
        file.write_bytes(b"\xef\xbb\xbf\r\n" + file.read_bytes().replace(b'{"prompt": "p17"', b'\n  \n{"prompt": "p17"'))
    spans = [(span, list(found)) for span, found in read_spans(file)]
    assert len(spans) > 5
    assert [row for _, found in spans for _, row in found] == rows(0, 95)
    for span, found in reversed(spans):
        assert list(read_span(span)) == found
        assert span.number <= found[0][0] and span.num_rows == len(found)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_that_shrinks_between_two_passes_is_an_error(tmp_path: Path, small_spans: int, suffix: str) -> None:
    file = write(tmp_path / f"rows{suffix}", rows(0, 40))
    last = [span for span, found in read_spans(file) if list(found)][-1]
    write(file, rows(0, 5))
    with pytest.raises(DataError, match="was changed while it was being read"):
        list(read_span(last))


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    write(tmp_path / "d" / "part-1.jsonl", rows(10, 10))
    write(tmp_path / "d" / "part-0.parquet", rows(0, 10))
    write(tmp_path / "d" / "part-2.jsonl", rows(20, 10))
    write(tmp_path / "d" / ".part-3.jsonl", rows(90, 1))
    (tmp_path / "d" / "README.md").write_text("about")
    expected = [f"p{i}" for i in range(30)]
    assert order(DataSpec(train=f"{tmp_path}/d")) == expected
    assert order(DataSpec(train=(tmp_path / "d").as_uri())) == expected
    one = write(tmp_path / "one.jsonl", rows(0, 30))
    assert open_dataset(DataSpec(train=str(one))).sha256 == open_dataset(DataSpec(train=str(tmp_path / "d"))).sha256


def test_bad_rows_of_all_shards_are_listed_with_their_file(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.jsonl", [*rows(0, 5), {"text": ""}])
    write(tmp_path / "d" / "b.jsonl", [{"mesages": "x"}, *rows(5, 5)])
    with pytest.raises(DataError) as caught:
        open_dataset(DataSpec(train=str(tmp_path / "d")))
    message = str(caught.value)
    assert "2 rows of 12 cannot be used" in message
    assert "\n  a.jsonl, line 6: text is empty" in message and "\n  b.jsonl, line 1: unknown key 'mesages'" in message


def test_names_of_sides_divide_a_folder(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"):
        write(tmp_path / "d" / name, rows(sum(map(ord, name)), 10))
    sides = find_training(str(tmp_path / "d"), None)
    assert sides.train and sides.test
    assert [f.name for f in sides.train.files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert [f.name for f in sides.test.files] == ["test-00000-of-00001.parquet"]
    assert find_held_out(str(tmp_path / "d")).files == sides.test.files
    write(tmp_path / "d" / "more.jsonl", rows(0, 1))
    with pytest.raises(DataError, match=r"and others: more\.jsonl. Name all of them so, or none"):
        find_training(str(tmp_path / "d"), None)


def test_only_held_out_rows_are_no_training_rows(tmp_path: Path) -> None:
    write(tmp_path / "d" / "validation.jsonl", rows(0, 3))
    with pytest.raises(DataError, match=r"held-out ones alone \(validation.jsonl\)"):
        find_training(str(tmp_path / "d"), None)


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"p{i}"}, {"role": "assistant", "content": "a"}]} for i in range(50)]
    Dataset.from_list(chats).save_to_disk(tmp_path / "saved", num_shards=3)
    assert order(DataSpec(train=str(tmp_path / "saved"))) == [f"p{i}" for i in range(50)]
    both = DatasetDict(train=Dataset.from_list(rows(0, 20)), validation=Dataset.from_list(rows(20, 5)))
    both.save_to_disk(tmp_path / "both")
    data = load_dataset(DataSpec(train=str(tmp_path / "both")))
    assert [e.messages[0].content for e in data.test] == [f"p{i}" for i in range(20, 25)]
    assert len(data.train) == 20
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks data-00001-of-00003\.arrow"):
        open_dataset(DataSpec(train=str(tmp_path / "saved")))


def test_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.csv").write_text("a,b")
    for name, says in (("empty", "It is empty"), ("other", "It has rows.csv"), ("nowhere", "no file or folder")):
        with pytest.raises(DataError, match=says):
            open_dataset(DataSpec(train=str(tmp_path / name)))


def test_faults_of_all_sources_come_together(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": ""}])
    write(tmp_path / "b.jsonl", [{"prompt": "x"}, *rows(0, 9)])
    mixture = [{"source": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError) as caught:
        open_dataset(DataSpec.model_validate({"mixture": mixture}))
    assert "a.jsonl: 1 row of 1 cannot be used" in str(caught.value) and "b.jsonl: 1 row of 10 cannot be used" in str(caught.value)
    with pytest.raises(DataError) as caught:
        open_dataset(DataSpec.model_validate({"mixture": [{"source": f"{tmp_path}/x.jsonl"}, {"source": f"{tmp_path}/y.jsonl"}]}))
    assert "x.jsonl" in str(caught.value) and "y.jsonl" in str(caught.value)


@pytest.fixture
def bucket(s3_url: str, fresh_home: Path) -> Iterator[str]:  # noqa: F811
    yield s3_url


def upload(url: str, files: dict[str, Path]) -> None:
    name, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    for key, file in files.items():
        client.upload_file(str(file), name, f"{prefix}/{key}")


def test_rows_in_a_bucket_are_those_of_the_disk_and_fetched_once(bucket: str, tmp_path: Path, fresh_home: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", rows(0, 30)), write(tmp_path / "b.parquet", rows(30, 30))
    upload(bucket, {"set/part-0.jsonl": first, "set/part-1.parquet": second, "set/note.txt": first})
    upload(f"{bucket}-other", {"part-9.jsonl": first})  # a neighbour whose key begins alike
    assert order(DataSpec(train=f"{bucket}/set")) == [f"p{i}" for i in range(60)]
    assert order(DataSpec(train=f"{bucket}/set/part-1.parquet")) == [f"p{i}" for i in range(30, 60)]
    cached = sorted(p.stat().st_ino for p in (fresh_home / "cache" / "remote").rglob("*") if p.is_file())
    assert order(DataSpec(train=f"{bucket}/set/")) == [f"p{i}" for i in range(60)]
    assert order(DataSpec(train=f"{bucket}/set")) == [f"p{i}" for i in range(60)]
    assert sorted(p.stat().st_ino for p in (fresh_home / "cache" / "remote").rglob("*") if p.is_file()) == cached
    upload(bucket, {"set/part-0.jsonl": write(tmp_path / "c.jsonl", rows(100, 30))})
    assert order(DataSpec(train=f"{bucket}/set"))[0] == "p100"


def test_what_a_bucket_has_not(bucket: str) -> None:
    with pytest.raises(DataError, match="there is no file or folder s3://"):
        open_dataset(DataSpec(train=f"{bucket}/nothing"))
    with pytest.raises(DataError, match="there is no file or folder s3://"):
        open_dataset(DataSpec(train=f"{bucket}/nothing.jsonl"))
    for place in ("s3://no-such-bucket-here/set", "s3://no-such-bucket-here/a.jsonl"):
        with pytest.raises(DataError, match="The bucket does not exist; correct the URL"):
            open_dataset(DataSpec(train=place))
    with pytest.raises(DataError, match="begins with none of file://, s3://"):
        open_dataset(DataSpec(train="https://host/rows.jsonl"))
    with pytest.raises(DataError, match="names no file or folder in a bucket"):
        open_dataset(DataSpec(train="s3://bucket"))


def test_a_saved_set_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"x")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(DataError, match=r"names files outside of its folder: \.\./secret\.arrow"):
        open_dataset(DataSpec(train=str(folder)))
