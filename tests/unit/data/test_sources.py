"""Reading files: every format gives the same rows, every broken one names its place."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from real_openrlhf.data.row import BadRow, DataError, Place, Row
from real_openrlhf.data.sources import _row, read_rows

ROWS = [{"input": "rate this", "label": 3}, {"input": 'two\nlines, "quoted" \u2028 é', "label": 4.5}]


def write(path, rows=ROWS):
    name = path.name.removesuffix(".gz")
    opened = gzip.open if path.suffix == ".gz" else open
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([{**r, "label": float(r["label"])} for r in rows]), path)
        return str(path)
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif name.endswith(".json"):
            json.dump(rows, file)
        else:
            writer = csv.DictWriter(file, ["input", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize(
    ("name", "indices", "unit"),
    [
        ("d.jsonl", [1, 2], "line"),
        ("d.jsonl.gz", [1, 2], "line"),
        ("d.json", [0, 1], "row"),
        ("d.json.gz", [0, 1], "row"),
        ("d.csv", [2, 3], "line"),
        ("d.csv.gz", [2, 3], "line"),
        ("D.PARQUET".lower(), [0, 1], "row"),
    ],
)
def test_every_format_gives_the_rows_and_their_places(tmp_path, name, indices, unit):
    source = write(tmp_path / name)
    rows = list(read_rows(source))
    assert [row.values["input"] for row in rows] == [row["input"] for row in ROWS]
    assert [float(row.values["label"]) for row in rows] == [3.0, 4.5]
    assert [(row.place.file, row.place.index, row.place.unit) for row in rows] == [(source, i, unit) for i in indices]


def test_csv_line_numbers_count_lines_not_rows(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('input,label\n"a\nb",1\nc,2\n\nd\n')
    rows = list(read_rows(str(path)))
    assert [row.place.index for row in rows] == [2, 4, 6]
    assert isinstance(rows[2], BadRow) and "1 fields, but the header has 2" in str(rows[2])


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "a"}\n\n  \n{"input": "b"}')
    assert [(row.values["input"], row.place.index) for row in read_rows(str(path))] == [("a", 1), ("b", 4)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"input": "a", "label": ', "broken JSON"),
        (b"input: a", "broken JSON"),
        (b"[1, 2]", "a row must be an object, not [1, 2]"),
        (b"null", "a row must be an object, not None"),
        (b'{"input": "\xff"', "not UTF-8 at byte 11 of the line, and broken JSON"),
        (b"[" * 200_000, "broken JSON"),
        (b'{"label": ' + b"9" * 5000 + b"}", "broken JSON"),
    ],
)
def test_a_broken_jsonl_line_is_one_bad_row(tmp_path, line, reason):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"input": "a"}\n' + line + b'\n{"input": "c"}\n')
    first, bad, last = read_rows(str(path))
    assert isinstance(first, Row) and isinstance(last, Row)
    assert isinstance(bad, BadRow) and bad.row == 2 and bad.column is None
    assert str(bad).startswith(f"{path}, line 2: ") and reason in str(bad)
    assert len(str(bad)) < 400 + len(str(path))


def test_a_json_item_that_is_no_object_is_one_bad_row(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('[{"input": "a"}, 5]')
    _, bad = read_rows(str(path))
    assert str(bad) == f"{path}, row 1 (counted from 0): a row must be an object, not 5"


BROKEN = [
    ("d.jsonl", b"", "the file is empty"),
    ("d.jsonl", b"\n  \n", "the file is empty: it has no rows"),
    ("d.json", b"[]", "the file is empty: it has no rows"),
    ("d.json", b"", "the file is empty"),
    ("d.csv", b"input,label\n", "the file is empty: it has no rows"),
    ("d.parquet", b"", "the file is empty"),
    ("d.json", b'{"input": "a"}', "must hold a list of objects"),
    ("d.json", b'{"input": "a"}\n{"input": "b"}', "one object per line is called .jsonl"),
    ("d.json", b'[{"input": "\xff"}', "not UTF-8 at byte 12, and broken JSON"),
    ("d.csv", b"\n1,2\n", "line 1: there is no header"),
    ("d.csv", b"a,b,a\n1,2,3\n", r"columns \['a'\] occur more than once"),
    ("d.csv", b'a,b\n1,2\n"x" y,3\n', "line 3: broken CSV"),
    ("d.csv", b'a,b\n1,2\n"x,3\n', "broken CSV"),
    ("d.csv", b"a,\xff\n1,2\n", "line 1: the header is not UTF-8"),
    ("d.csv", "a,b\n1,2\n".encode("utf-16"), "line 1: the header is not UTF-8"),
    ("d.parquet", b"PAR1 this is no parquet PAR1", "broken parquet"),
    ("d.jsonl.gz", b"this is not gzip", "broken gzip after 0 rows"),
    ("d.txt", b"hello", r"extension '.txt'; known are .jsonl, .json, .csv, .parquet"),
    ("d", b"hello", "cannot tell the format"),
    ("d.parquet.gz", b"hello", "cannot tell the format"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(str(path)))
    assert str(caught.value).startswith(str(path))


def test_parquet_without_rows_and_cut_parquet(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"input": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="no rows"):
        list(read_rows(str(path)))
    write(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="broken parquet at or after row 0"):
        list(read_rows(str(path)))


def test_parquet_with_a_damaged_page_in_the_middle(tmp_path):
    path = tmp_path / "d.parquet"
    rows = [{"input": f"text {i}" * 3, "label": 1} for i in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000, compression="gzip", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    data[start + 60 : start + 200] = bytes(140)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"broken parquet at or after row [23]\d\d\d"):
        list(read_rows(str(path)))


def test_gzip_that_ends_too_early(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"input": "%d"}\n' % (i * 7919) for i in range(3000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"broken gzip after \d+ rows"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("source", ["nothere/train.jsonl", "/nothere/x/y", "nothere", "a/b.jsonl.gz"])
def test_a_missing_file(source):
    with pytest.raises(DataError, match="there is no such file or folder") as caught:
        list(read_rows(source))
    assert source in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"did you mean 'train.jsonl'\?"):
        list(read_rows(str(tmp_path / "trian.jsonl")))


@pytest.mark.parametrize("source", ["", "  "])
def test_no_source(source):
    with pytest.raises(DataError, match="no data set is given"):
        list(read_rows(source))


def test_a_split_of_a_file_is_refused_and_a_name_with_an_at_sign_is_read(tmp_path):
    source = write(tmp_path / "d.jsonl")
    with pytest.raises(DataError, match="has no splits; drop '@train'"):
        list(read_rows(source + "@train"))
    assert len(list(read_rows(write(tmp_path / "a@b.jsonl")))) == 2


class TestFolder:
    def test_shards_in_order_and_other_files_left_alone(self, tmp_path):
        for i in (1, 0):
            write(tmp_path / f"train-0000{i}.parquet", [{"input": f"{i}", "label": i}])
        (tmp_path / "README.md").write_text("x")
        (tmp_path / ".hidden.jsonl").write_text("x")
        assert [row.values["label"] for row in read_rows(str(tmp_path))] == [0, 1]

    def test_splits_are_never_mixed(self, tmp_path):
        write(tmp_path / "train.jsonl", ROWS[:1])
        write(tmp_path / "test.jsonl", ROWS[1:])
        with pytest.raises(DataError, match=r"several splits, \['test', 'train'\]"):
            list(read_rows(str(tmp_path)))
        assert [row.values["label"] for row in read_rows(f"{tmp_path}@test")] == [4.5]
        with pytest.raises(DataError, match=r"no file is called dev\.\*; splits there: \['test', 'train'\]"):
            list(read_rows(f"{tmp_path}@dev"))

    def test_mixed_formats_empty_folder_empty_shard(self, tmp_path):
        with pytest.raises(DataError, match="the folder has no file"):
            list(read_rows(str(tmp_path)))
        write(tmp_path / "a.jsonl")
        (tmp_path / "b.jsonl").touch()
        with pytest.raises(DataError, match=r"b.jsonl: the file is empty"):
            list(read_rows(str(tmp_path)))
        write(tmp_path / "c.csv")
        with pytest.raises(DataError, match=r"mixes .csv, .jsonl"):
            list(read_rows(str(tmp_path)))

    def test_saved_to_disk(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_list([{"input": "a", "label": 1.0}])
        data.save_to_disk(tmp_path / "one")
        datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
        assert [row.values["label"] for row in read_rows(str(tmp_path / "one"))] == [1.0]
        assert [row.values["label"] for row in read_rows(f"{tmp_path / 'two'}@test")] == [1.0]
        with pytest.raises(DataError, match="has no splits"):
            list(read_rows(f"{tmp_path / 'one'}@test"))
        (tmp_path / "one" / "state.json").write_text("{")
        with pytest.raises(DataError, match="cannot be read as a saved data set"):
            list(read_rows(str(tmp_path / "one")))


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """Stands in for the hub: load_dataset answers from here."""
        datasets = pytest.importorskip("datasets")
        held = {}

        def load_dataset(name):
            if name not in held:
                raise FileNotFoundError(f"{name} is not on the hub")
            return held[name]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return held

    def test_splits(self, hub):
        hub["owner/name"] = {"train": [{"label": 1}], "test": [{"label": 2}]}
        hub["owner/one-split"] = {"train": [{"label": 3}]}
        rows = list(read_rows("owner/name@test"))
        assert rows[0].values == {"label": 2} and rows[0].place.file == "owner/name@test"
        assert [row.values["label"] for row in read_rows("owner/one-split")] == [3]
        with pytest.raises(DataError, match=r"splits \['train', 'test'\]; name one: 'owner/name@train'"):
            list(read_rows("owner/name"))
        with pytest.raises(DataError, match=r"no split 'tset'; .*did you mean 'test'"):
            list(read_rows("owner/name@tset"))

    def test_unknown_and_empty(self, hub):
        hub["owner/empty"] = {"train": []}
        with pytest.raises(DataError, match="no such file or folder, and as a hub id it could not be loaded: owner/x"):
            list(read_rows("owner/x"))
        with pytest.raises(DataError, match="empty"):
            list(read_rows("owner/empty"))


def test_csv_fields_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "x" * 200_000 + ",1\n", encoding="utf-8")
    (row,) = read_rows(str(path))
    assert isinstance(row, Row) and len(row.values["a"]) == 200_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_anywhere_is_a_bad_row(name: str, tmp_path: Path) -> None:
    rows = ['{"a": "whole \\ud83d\\ude00"}', '{"a": [{"b": "half \\uDe00"}]}', '{"\\ud800": 1}']
    text = "[" + ", ".join(rows) + "]" if name.endswith(".json") else "\n".join(rows) + "\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    whole, *halves = read_rows(str(tmp_path / name))
    assert isinstance(whole, Row) and whole.values == {"a": "whole \U0001f600"}
    assert [isinstance(row, BadRow) and row.column for row in halves] == ["a.0.b", "?"]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.csv", b"a,b\n1,fine\n2,caf\xe9\n3,fine\n", "line 3, column 'b'"),
        ("a.json", b'[{"b": "fine"}, {"b": "caf\xe9"}, {"b": "fine"}]', "row 1 (counted from 0), column 'b'"),
        ("a.jsonl", b'{"b": "fine"}\n{"b": "caf\xe9"}\n{"b": "fine"}\n', "line 2, column 'b'"),
        ("a.jsonl", b'{"b": "fine"}\n{"b": "\xed\xa0\x80"}\n{"b": "fine"}\n', "line 2, column 'b'"),
    ],
)
def test_bytes_that_are_not_utf8_are_one_bad_row(tmp_path: Path, name: str, content: bytes, place: str) -> None:
    (tmp_path / name).write_bytes(content)
    first, bad, last = read_rows(str(tmp_path / name))
    assert isinstance(first, Row) and isinstance(last, Row) and first.values["b"] == last.values["b"] == "fine"
    assert isinstance(bad, BadRow) and str(bad).startswith(f"{tmp_path / name}, {place}: not valid Unicode")


def test_bytes_that_are_not_utf8_in_arrow_files_are_one_bad_row(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [b"fine", b"caf\xe9", b"fine"]
    # A view: casting would check the bytes, which not every writer does.
    table = pa.table({"a": [1, 2, 3], "b": pa.array(texts).view(pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        first, bad, last = read_rows(str(source))
        assert isinstance(first, Row) and isinstance(last, Row)
        assert (first.values, last.values) == ({"a": 1, "b": "fine"}, {"a": 3, "b": "fine"})
        assert isinstance(bad, BadRow) and str(bad).startswith(
            f"{source}, row 1 (counted from 0), column 'b': not valid Unicode"
        )


def test_values_nested_too_deeply_are_a_bad_row() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    bad = _row(Place(file="a.json", index=1, unit="row"), {"a": deep}, suspect="half")
    assert str(bad) == "a.json, row 1 (counted from 0): its values are nested too deeply"
