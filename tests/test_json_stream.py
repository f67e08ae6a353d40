"""Streamed JSON: the values of json.loads however the file is cut, and errors that name the place."""

import json

import pytest

from llada.data import records as json_stream
from llada.data.records import JsonStream

VALUES = [
    {"a": [1, 2.5, -3e-4, [], {}], "ü😀": 'x\n"\\ \ud83d', "long": [[0.5] * 30, [1e4, float("inf")]]},
    {"long": [], "b": None, "c": True},
    {},
]


def write(path, text):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("is_array", [True, False])
def test_values_do_not_depend_on_where_reads_end(chunk, indent, is_array, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    texts = [json.dumps(value, indent=indent, ensure_ascii=i == 0) for i, value in enumerate(VALUES)]
    text = "[" + " ,\n".join(texts) + "]\n" if is_array else "\n".join(texts)
    read = []
    file = write(tmp_path / "a.json", "\ufeff" + text)
    with JsonStream(file, read.append) as stream:
        found = list(stream.records(stream.value))
    assert [value for _, value in found] == VALUES
    starts = [text[: text.index(part)].count("\n") + 1 for part in texts[:2]]
    assert [where for where, _ in found][:2] == [f"{file}:{line}" for line in starts]
    assert sum(read) == file.stat().st_size


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_long_arrays_are_converted_element_by_element(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    file = write(tmp_path / "a.json", '[{"p": "x", "long": [[1, 2],\n[3]], "q": [4]},\n {"long": null}]')
    with JsonStream(file) as stream:
        convert = {"long": lambda element, where: (sum(element), where)}
        found = [value for _, value in stream.records(lambda: stream.record(convert))]
    assert found == [{"p": "x", "long": [(3, f"{file}:1"), (3, f"{file}:2")], "q": [4]}, {"long": None}]


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"n": 1},\n{"n": }]', "bad.json:2: malformed JSON: Expecting value at column 7"),
        ('[{"n": 1},\n {"n": 2', "bad.json:2: malformed JSON: .*the file ends there, at column 9"),
        ('[{"n": 1}\n', "bad.json:2: malformed JSON: expected ',' or ']', but the file ends there"),
        ('[{"n": 1}] 7', "bad.json:1: malformed JSON: '7' after the end of the array"),
        ('[{"n": "abc', "bad.json:1: malformed JSON: Unterminated string"),
    ],
)
def test_malformed_files_name_line_and_column(chunk, text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    with JsonStream(write(tmp_path / "bad.json", text)) as stream, pytest.raises(ValueError, match=message):
        list(stream.records(lambda: stream.record({}) if "2" in message else stream.value()))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "bad.json").write_bytes(b'[{"n": 1},\n{"n": "\xff"}]')
    with pytest.raises(ValueError, match=r"bad.json:2: byte 0xff at offset 18 of the file is not UTF-8"):
        JsonStream(tmp_path / "bad.json")


def test_memory_is_that_of_one_value(tmp_path):
    text = json.dumps({"long": [[0.25] * 1000] * 1000})
    with JsonStream(write(tmp_path / "a.json", text)) as stream:
        stream.record({"long": lambda element, _: None})
        assert len(text) > 4_000_000 > 2 * len(stream._text)
