"""The preparation scripts: their output, going on after a stop, and what they refuse."""

import json
import os

import pytest
import torch

from chat_samples import learned, small_tokenizer, write_jsonl
from conftest import ROOT, load_script
from llada.data import shards
from llada.data.prepared import load, prepare
from llada.data.reading import to_labelled, to_messages, to_pair, to_prompt
from llada.data.rows import ConversationRows, CorpusRows
from llada.data.shards import load_rows, read_manifest
from llada.run import Run

corpus = load_script("pretraining/prepare_corpus.py")
sft = load_script("sft_training/prepare_sft.py")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer().save_pretrained(folder)
    return str(folder)


def flags(**values):
    """`--name value ...` of each; a list gives several values."""
    return [
        item
        for name, value in values.items()
        for item in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def documents(path, count=50):
    return write_jsonl(path, [{"text": f"document number {i}"} for i in range(count)])


def test_corpus_script_splits_and_reports(tmp_path, tokenizer_folder, capsys):
    path = documents(tmp_path / "a.jsonl")
    out = tmp_path / "out"
    corpus.main(
        flags(
            input=path,
            tokenizer=tokenizer_folder,
            output_dir=out,
            max_length=16,
            validation_fraction=0.2,
            shard_size=7,
        )
    )
    counts = {split: read_manifest(out / split)["statistics"] for split in ("train", "validation")}
    assert counts["train"]["records"] + counts["validation"]["records"] == 50
    printed = capsys.readouterr().out
    for split, found in counts.items():
        assert (
            f"{out}/{split}: {found['records']} documents (0 empty), {found['tokens']} tokens in "
            f"{found['rows']} rows, unigram entropy {found['unigram_entropy']:.3f} nats/token"
        ) in printed
    assert not list(out.rglob("*.tmp"))


def test_corpus_script_takes_text_files(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    numbers = {}
    for mode in ("blank_line", "line", "file"):
        out = tmp_path / mode
        corpus.main(
            flags(
                input=tmp_path / "a.txt",
                tokenizer=tokenizer_folder,
                output_dir=out,
                max_length=16,
                text_documents=mode,
            )
        )
        numbers[mode] = read_manifest(out / "train")["statistics"]["records"]
    assert numbers == {"blank_line": 2, "line": 3, "file": 1}


def test_sft_script_takes_several_files_and_reports(tmp_path, tokenizer_folder, capsys):
    first = write_jsonl(tmp_path / "a.jsonl", [{"question": "2 + 2?", "answer": "4"}])
    second = write_jsonl(
        tmp_path / "b.jsonl",
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2}],
    )
    common = {"input": [first, second], "tokenizer": tokenizer_folder, "max_length": 200}
    sft.main(flags(**common, output_dir=tmp_path / "all"))
    assert "2 conversations in 2 rows (0 rows dropped, 0 truncated)" in capsys.readouterr().out
    sft.main(flags(**common, output_dir=tmp_path / "split", turns="split"))
    tokenizer = small_tokenizer()
    rows = {turns: load_rows(tmp_path / turns / "train") for turns in ("all", "split")}
    assert [learned(row, tokenizer) for row in rows["all"]] == [
        ["4<|eot_id|><|endoftext|>"],
        ["b<|eot_id|>", "b<|eot_id|><|endoftext|>"],
    ]
    assert [len(learned(row, tokenizer)) for row in rows["split"]] == [1, 1, 1]


def test_debug_configs_prepare_the_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    tokenizer = str(tmp_path / "tokenizer")
    train_tokenizer = load_script("scripts/train_tokenizer.py")
    train_tokenizer.main(["--config", "configs/debug/train_tokenizer.yaml", "--output_dir", tokenizer])
    for script, name in ((corpus, "prepare_corpus"), (sft, "prepare_sft")):
        out = tmp_path / name
        script.main(
            ["--config", f"configs/debug/{name}.yaml", "--tokenizer", tokenizer, "--output_dir", str(out)]
        )
        assert len(load_rows(out / "train")) > 0


def examples(heading):
    """The JSON examples of a section of data/README.md."""
    page = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {heading}")[2].partition("\n## ")[0].splitlines()
    lines = [line.split("`")[-2] for line in section if line.startswith("| ") and "`{" in line]
    return [json.loads(line) for line in lines + [line for line in section if line.startswith("{")]]


def test_example_lines_of_the_format_page_are_accepted(tmp_path, tokenizer_folder):
    conversations = examples("Conversations")
    assert len(conversations) == 22
    path = write_jsonl(tmp_path / "a.jsonl", conversations)
    sft.main(flags(input=path, tokenizer=tokenizer_folder, output_dir=tmp_path / "o"))
    rows = load_rows(tmp_path / "o" / "train")
    assert len(rows) == len(conversations)
    assert learned(rows[0], small_tokenizer()) == ["4<|eot_id|><|endoftext|>"]
    assert all(to_messages(record, "f:1") and to_prompt(record, "f:1") for record in conversations)
    assert [to_pair(record, "f:1").chosen for record in examples("Preference pairs")]
    labelled = [to_labelled(record, "f:1")[0].label for record in examples("Labelled answers")[:4]]
    assert labelled == [True, False, False, True]
    assert [to_prompt(record, "f:1") for record in examples("Prompts (generation)")]


@pytest.mark.parametrize("fraction", ["1.0", "-0.1"])
@pytest.mark.parametrize("script", [corpus, sft])
def test_validation_fraction_out_of_range(script, fraction, tmp_path, tokenizer_folder):
    with pytest.raises(ValueError, match=rf"--validation_fraction {fraction}: must be at least 0"):
        script.main(
            flags(
                input="absent", tokenizer=tokenizer_folder, output_dir=tmp_path, validation_fraction=fraction
            )
        )


def test_validation_that_holds_out_nothing(tmp_path, tokenizer_folder):
    path = documents(tmp_path / "a.jsonl", count=2)
    with pytest.raises(ValueError, match="validation: no row is left to write"):
        corpus.main(
            flags(
                input=path, tokenizer=tokenizer_folder, output_dir=tmp_path / "o", validation_fraction=0.001
            )
        )


def test_missing_input_is_named(tmp_path, tokenizer_folder):
    for script in (corpus, sft):
        with pytest.raises(ValueError, match="--input absent: no such file or folder"):
            script.main(flags(input="absent", tokenizer=tokenizer_folder, output_dir=tmp_path / "o"))
        assert not (tmp_path / "o").exists()


# --- going on after a stop ---


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.arrow")}


def test_a_stopped_run_keeps_its_shards_and_ends_with_the_same_rows(tmp_path, monkeypatch):
    path = documents(tmp_path / "a.jsonl")
    options = {"shard_size": 10}
    whole = prepare([path], CorpusRows(16), small_tokenizer(), tmp_path / "whole", **options)

    written = []
    real = shards._write_shard

    def stop_at_the_fourth(encode, folder, index, batch):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(index)
        return real(encode, folder, index, batch)

    monkeypatch.setattr(shards, "_write_shard", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        prepare([path], CorpusRows(16), small_tokenizer(), tmp_path / "out", **options)
    with pytest.raises(ValueError, match="out: preparation was interrupted; run the same command again"):
        load_rows(tmp_path / "out")
    # half a shard, as a kill leaves it
    (tmp_path / "out" / "shard-00003.tmp").mkdir()
    (tmp_path / "out" / "shard-00003.tmp" / "data.arrow").write_bytes(b"half")

    monkeypatch.setattr(shards, "_write_shard", lambda *args: written.append(args[2]) or real(*args))
    rows = prepare([path], CorpusRows(16), small_tokenizer(), tmp_path / "out", **options)
    assert written == [0, 1, 2, 3, 4]  # the first three were not made again
    assert rows[:] == whole[:] and contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert read_manifest(tmp_path / "out") == read_manifest(tmp_path / "whole")
    prepare([path], CorpusRows(16), small_tokenizer(), tmp_path / "out", **options)
    assert written == [0, 1, 2, 3, 4]  # nothing left to do


def test_other_settings_or_inputs_are_refused_by_name_unless_overwritten(tmp_path):
    path = documents(tmp_path / "a.jsonl")
    out = tmp_path / "out"
    prepare([path], CorpusRows(16), small_tokenizer(), out, shard_size=5)
    with pytest.raises(ValueError) as error:
        prepare([path], CorpusRows(8), small_tokenizer(), out, shard_size=5)
    assert str(error.value) == (
        f"{out} was prepared differently: max_length was 16, is 8. Use another folder, or --overwrite"
    )
    documents(path, count=51)
    with pytest.raises(ValueError, match=r"was prepared differently: inputs was .*a.jsonl.*, is .*a.jsonl"):
        prepare([path], CorpusRows(16), small_tokenizer(), out, shard_size=5)
    rows = prepare([path], CorpusRows(8), small_tokenizer(), out, shard_size=50, overwrite=True)
    assert read_manifest(out)["statistics"]["rows"] == len(rows)
    assert len(list(out.glob("shard-*"))) == 2


def test_a_folder_with_other_files_is_refused(tmp_path):
    path = documents(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="is not empty and holds no prepared rows; choose another output"):
        prepare([path], CorpusRows(16), small_tokenizer(), tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"no prepared rows there \(manifest.json is missing\)"):
        load_rows(tmp_path)


def test_two_processes_write_the_rows_of_one(tmp_path):
    pairs = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", pairs)
    options = {"shard_size": 3}
    prepare([path], ConversationRows(99), small_tokenizer(), tmp_path / "one", **options)
    prepare([path], ConversationRows(99), small_tokenizer(), tmp_path / "two", num_proc=2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert read_manifest(tmp_path / "one") == read_manifest(tmp_path / "two")


def test_an_error_in_a_worker_reaches_the_user(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "<|mdm_mask|>"}])
    with pytest.raises(ValueError, match=r"a.jsonl:2: the text contains the mask token"):
        prepare([path], CorpusRows(9), small_tokenizer(), tmp_path / "o", shard_size=1, num_proc=2)


# --- inputs are known by their content


def test_inputs_are_recognised_by_their_whole_content(tmp_path):
    # a change in the middle of a large file, with the old size and time
    path = tmp_path / "a.txt"
    text = ("one two three " * 2000 + "\n\n") * 80
    path.write_text(text)
    out = tmp_path / "out"
    prepare([path], CorpusRows(64), small_tokenizer(), out)
    before = os.stat(path)
    middle = len(text) // 2
    path.write_text(text[:middle] + "x" + text[middle + 1 :])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"was prepared differently: inputs was .*a.txt.*, is .*a.txt"):
        prepare([path], CorpusRows(64), small_tokenizer(), out)
    path.write_text(text)  # the old content at a new time
    rows = prepare([path], CorpusRows(64), small_tokenizer(), out)
    assert len(rows) == len(load_rows(out))


def test_unchanged_inputs_are_not_read_again(tmp_path, monkeypatch):
    path = documents(tmp_path / "a.jsonl")
    prepare([path], CorpusRows(64), small_tokenizer(), tmp_path / "out")
    monkeypatch.setattr(shards.hashlib, "file_digest", None)
    prepare([path], CorpusRows(64), small_tokenizer(), tmp_path / "out")


def test_a_corrected_record_and_the_same_command_go_on(tmp_path):
    """Rows inside a run folder are made anew as long as the run has no state."""
    run = Run(rank=0, world_size=1, device=torch.device("cpu"))
    path = tmp_path / "a.jsonl"
    options = {"prepared": tmp_path / "run/data/train", "run": run, "run_folder": tmp_path / "run"}

    def load_again():
        return load([str(path)], ConversationRows(99), small_tokenizer(), **options)

    write_jsonl(path, [{"question": "a", "answer": "b"}, {"question": "a", "answer": ""}])
    with pytest.raises(ValueError, match=r"a.jsonl:2: empty answer"):
        load_again()
    write_jsonl(path, [{"question": "a", "answer": "b"}, {"question": "a", "answer": "c"}])
    assert [learned(row, small_tokenizer())[0][0] for row in load_again()] == ["b", "c"]
    write_jsonl(path, [{"question": "a", "answer": "b"}, {"question": "a", "answer": "d"}])
    assert [learned(row, small_tokenizer())[0][0] for row in load_again()] == ["b", "d"]
    (tmp_path / "run/latest").write_text("step-1")
    write_jsonl(path, [{"question": "a", "answer": "e"}])
    with pytest.raises(ValueError, match="was prepared differently: inputs"):
        load_again()


def test_what_was_dropped_is_told_at_every_start(tmp_path, capsys):
    run = Run(rank=0, world_size=1, device=torch.device("cpu"))
    pairs = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "b" * 99}]
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data/a.jsonl", pairs)
    (tmp_path / "data/test.jsonl").write_text("never read")
    for _ in range(2):
        load([str(tmp_path / "data")], ConversationRows(40, long="drop"), small_tokenizer(),
             prepared=tmp_path / "p", run=run)  # fmt: skip
        printed = capsys.readouterr().out
        assert "2 conversations in 1 rows (1 rows dropped, 0 truncated)" in printed
        assert "warning: 1 of 2 are not used" in printed
        assert "files left out: test.jsonl" in printed
    assert path.exists()
