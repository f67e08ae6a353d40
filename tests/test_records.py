"""Reading records: every kind of file, where each record stands, and what is said of a bad file."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from llada.data.files import files_of, input_files, left_out
from llada.data.records import read_records


def records(path, **options):
    return [record for _, record in read_records(path, **options)]


def places(path, **options):
    return [where for where, _ in read_records(path, **options)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def message(path, **options) -> str:
    with pytest.raises(ValueError) as error:
        records(path, **options)
    return str(error.value)


def test_jsonl_gives_lines_and_skips_blank_ones(tmp_path):
    content = b'\xef\xbb\xbf{"text": "\xc3\xbc"}\n\n{"text": "b"}\r\n{"text": "no line end"}'
    path = write(tmp_path / "a.jsonl", content)
    assert records(path) == [{"text": "ü"}, {"text": "b"}, {"text": "no line end"}]
    assert places(path) == [f"{path}:1", f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('[{"n": 1},\n {"n":\n 2}]\n', [1, 2]),
        ('{"n": 1}\n{"n":\n 2}\n', [1, 2]),
        (' [\n\n{"n":1}\n,{"n":2}]', [3, 4]),
    ],
)
def test_json_array_and_json_objects_one_after_the_other(tmp_path, content, lines):
    path = write(tmp_path / "a.json", content)
    assert records(path) == [{"n": 1}, {"n": 2}]
    assert places(path) == [f"{path}:{line}" for line in lines]


@pytest.mark.parametrize(
    ("text_documents", "documents", "lines"),
    [
        ("blank_line", ["one\ntwo", " three"], [2, 5]),
        ("line", ["one", "two", " three"], [2, 3, 5]),
        ("file", ["\none\ntwo\n \n three\n"], [1]),
    ],
)
def test_documents_of_a_text_file(tmp_path, text_documents, documents, lines):
    path = write(tmp_path / "a.txt", "\none\ntwo\n \n three\n")
    assert records(path, text_documents=text_documents) == [{"text": text} for text in documents]
    assert places(path, text_documents=text_documents) == [f"{path}:{line}" for line in lines]


def test_parquet_and_dataset_folders(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(2500)]  # more than one batch of rows
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "single"))
    DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:3])).save_to_disk(
        str(tmp_path / "splits")
    )
    for name in ("a.parquet", "single", "splits"):
        assert records(tmp_path / name) == rows
    assert places(tmp_path / "a.parquet")[-1] == f"{tmp_path / 'a.parquet'}:2500"
    assert records(tmp_path / "splits" / "test") == rows[:3]


def test_a_folder_is_its_files_in_order(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path / "b.jsonl", '{"n": 2}\n')
    write(tmp_path / "a.json", '[{"n": 1}]')
    write(tmp_path / "below" / "c.jsonl", '{"n": 3}\n')
    write(tmp_path / "notes.md", "not data")
    assert records(tmp_path) == [{"n": 1}, {"n": 2}, {"n": 3}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet", "folder"])
def test_progress_adds_up_to_the_bytes_of_the_file(tmp_path, name):
    rows = [{"text": f"document {i}"} for i in range(1500)]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name == "folder":
        Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
    else:
        write(tmp_path / name, "\n".join(json.dumps(row) for row in rows))
    reported = []
    list(read_records(tmp_path / name, on_bytes=reported.append))
    size = sum(file.stat().st_size for file in files_of(tmp_path / name))
    assert 0.9 * size <= sum(reported) <= size  # JSON counts the objects, not what stands between them
    assert name == "a.json" or len(reported) > 1


def test_jsonl_is_streamed(tmp_path):
    # the third line is bad, and the first two come out before anybody looks at it
    stream = read_records(write(tmp_path / "a.jsonl", '{"n": 1}\n{"n": 2}\n{broken\n'))
    assert [next(stream)[1], next(stream)[1]] == [{"n": 1}, {"n": 2}]


def test_malformed_json_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"\n')
    assert message(path) == (
        f"{path}:2: malformed JSON: Expecting ',' delimiter, but the file ends there, at line 3, column 1"
    )
    path = write(tmp_path / "b.jsonl", '["text"]\n')
    assert message(path) == f'{path}:1: expected a JSON object {{...}}, got ["text"]'


def test_malformed_json_file(tmp_path):
    path = write(tmp_path / "a.json", '[{"n": 1},\n{"n": }]')
    assert message(path) == f"{path}:2: malformed JSON: Expecting value at column 7"
    path = write(tmp_path / "b.json", '[{"n": 1}')
    assert "malformed JSON" in message(path)
    path = write(tmp_path / "c.json", '[{"n": 1}] [')
    assert message(path) == f"{path}:1: malformed JSON: '[' after the end of the array"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "empty_folder_of_rows"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file(tmp_path, name, content):
    path = tmp_path / name
    if name == "empty_folder_of_rows":
        Dataset.from_dict({"text": []}).save_to_disk(str(path))
    else:
        write(path, content)
    assert message(path) == f"{path}: holds no records; is it a failed download or export?"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jsonl", {}),
        ("a.json", {}),
        ("a.txt", {}),
        ("a.txt", {"text_documents": "line"}),
        ("a.txt", {"text_documents": "file"}),
    ],
)
def test_not_utf8(tmp_path, name, options):
    path = write(tmp_path / name, '{"text": "fine"}\n{"text": "Köln"}\n'.encode("latin-1"))
    assert message(path, **options) == (
        f"{path}:2: byte 0xf6 at offset 28 of the file is not UTF-8; convert the file, for example with iconv"
    )


def test_missing_file_or_folder(tmp_path):
    assert message(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such file or folder"
    kinds = ".jsonl, .ndjson, .json, .txt, .csv, .tsv, .parquet (also .gz, .bz2, .xz, .zst) or a folder "
    kinds += "written by datasets.save_to_disk"
    assert message(tmp_path) == f"{tmp_path}: no data files in this folder; expected {kinds}"
    path = write(tmp_path / "a.doc", "a,b\n")
    assert message(path) == f"{path}: cannot read .doc files; use {kinds}"
    path = write(tmp_path / "a.parquet", "not parquet")
    assert message(path).startswith(f"{path}: not a Parquet file")


def test_missing_split(tmp_path):
    DatasetDict(test=Dataset.from_dict({"text": ["a"]})).save_to_disk(str(tmp_path / "d"))
    folder = tmp_path / "d"
    assert message(folder) == (
        f"{folder}: has no split 'train'; name one of ['test'] by its folder, {folder}/SPLIT"
    )


def test_unknown_text_documents(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    assert message(path, text_documents="page") == (
        "--text_documents 'page': use one of blank_line, line, file"
    )


# --- kinds of files, and folders of them

ROWS = [{"question": "2 + 2?", "answer": "4"}, {"question": 'two\nlines, "quoted"', "answer": "yes"}]


def in_kind(kind: str) -> bytes:
    if kind in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(ROWS[0]), delimiter="," if kind == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(ROWS)
        return text.getvalue().encode()
    if kind == ".json":
        return json.dumps(ROWS, indent=1).encode()
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def packed(data: bytes, ending: str) -> bytes:
    if ending == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending](data)


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_every_kind_of_file_plain_and_compressed_in_any_case(tmp_path, kind, ending):
    for name in ("a" + kind + ending, "A" + (kind + ending).upper()):
        path = write(tmp_path / name, packed(in_kind(kind), ending))
        told = []
        found = list(read_records(path, on_bytes=told.append))
        assert [record for _, record in found] == ROWS
        lines = {".json": [2, 6], ".csv": [2, 3], ".tsv": [2, 3]}.get(kind, [1, 2])
        assert [where for where, _ in found] == [f"{path}:{line}" for line in lines]
        assert 0 < sum(told) <= path.stat().st_size


def test_records_over_several_lines_in_a_jsonl_file(tmp_path):
    records_ = [{"conversations": [{"role": "user", "content": "a"}]}, {"text": "b"}]
    text = "\n".join(json.dumps(record, indent=2) for record in records_) + '\n{"text": "c"}\n'
    path = write(tmp_path / "a.jsonl", text)
    assert records(path) == [*records_, {"text": "c"}]
    assert places(path) == [f"{path}:1", f"{path}:9", f"{path}:12"]


def test_damaged_files_are_named(tmp_path):
    for ending, data in ((".gz", b"no"), (".bz2", b"no"), (".xz", b"no"), (".zst", b"nothing at all")):
        path = write(tmp_path / f"a.jsonl{ending}", data)
        assert message(path).startswith(f"{path}: damaged {ending} file: ")
    whole = gzip.compress(b'{"n": 1}\n' * 1000)
    path = write(tmp_path / "cut.jsonl.gz", whole[: len(whole) // 2])
    assert message(path).startswith(f"{path}: damaged .gz file: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": ' + "[" * 100_000, "malformed JSON: "),
        ('{"a": ' + "9" * 5000 + "}", "malformed JSON: Exceeds the limit"),
    ],
)
def test_json_that_python_cannot_hold(tmp_path, content, said):
    path = write(tmp_path / "a.jsonl", '{"n": 1}\n' + content)
    assert message(path).startswith(f"{path}:2: {said}")


def test_a_table_with_too_many_or_too_few_fields(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\n1,2\n1,2,3\n")
    assert message(path) == f"{path}:3: not 2 fields, as the header has"
    path = write(tmp_path / "a.csv", "a,b\n1\n")
    assert message(path) == f"{path}:2: not 2 fields, as the header has"


def test_what_of_a_folder_is_training_data(tmp_path):
    names = {
        "a.jsonl": None, "b.NDJSON": None, "sub/latest.json": None, "train-00000-of-00002.jsonl": "train",
        "my_train.jsonl": "train", "unit-test-generation.jsonl": None, "data.csv.gz": None,
        "test.jsonl": "test", "gsm8k_test.jsonl": "test", "test-00000-of-00001.jsonl": "test",
        "validation/x.jsonl": "validation", "dev.jsonl": "validation", "valid.jsonl": "validation",
    }  # fmt: skip
    left = ["LICENSE.txt", "README.md", "readme.txt", "notes.doc", ".cache/x.jsonl", "dataset_infos.json"]
    for name in (*names, *left):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = b"n\n1\n" if "csv" in name else b'{"n": 1}\n'
        write(tmp_path / name, packed(data, ".gz" if name.endswith(".gz") else ""))

    def read(split="train"):
        return sorted(str(file.relative_to(tmp_path)) for file in input_files(tmp_path, split))

    assert read() == sorted(name for name, split in names.items() if split in (None, "train"))
    for split in ("test", "validation"):
        assert read(split) == sorted(name for name, found in names.items() if found == split)
    ((told, number),) = left_out(tmp_path).items()
    assert number == 6 + 6 and told.startswith("files left out: .cache/x.jsonl, LICENSE.txt, README.md, ")
    assert told.endswith("and 7 more")
    assert left_out(tmp_path / "sub") == {}
    assert [record for _, record in read_records(tmp_path / "validation")] == [{"n": 1}]  # named, so read
    assert message(tmp_path, split="holdout").startswith(
        f"{tmp_path}: no files of the split 'holdout', only of"
    )


def test_a_malformed_line_can_be_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"n": 1}\n{"n": \n["x"]\n{"n": 2}\n')
    bad = []
    assert [record for _, record in read_records(path, on_bad=bad.append)] == [{"n": 1}, {"n": 2}]
    assert [told.split(": ")[0] for told in bad] == [f"{path}:2", f"{path}:3"]
