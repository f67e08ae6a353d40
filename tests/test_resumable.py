"""llada/resumable.py: finished items stay, whoever wrote them, and other settings are refused by name."""

import pytest

from llada.resumable import ResumableJob, refuse_changes, write_atomically


def test_items_outlive_the_process_and_its_ranks(tmp_path):
    written = ResumableJob(tmp_path, {"cfg": 0.5}, rank=3, world_size=4)
    written.put("k", 0.0, note="zero is a result")
    with open(tmp_path / "rank-0.jsonl", "w", encoding="utf-8") as file:
        file.write('{"key": "cut in the mid')
    later = ResumableJob(tmp_path, {"cfg": 0.5})
    assert "k" in later and later["k"] == 0.0 and "cut in the mid" not in later
    later.put("l", [1])
    written.read()
    assert written["l"] == [1]


def test_shares_are_disjoint_and_leave_out_what_is_finished(tmp_path):
    keys = [ResumableJob.key(n) for n in range(5)]
    ResumableJob(tmp_path, {}).put(keys[2], "done")
    shares = [ResumableJob(tmp_path, {}, rank=rank, world_size=2).share(keys) for rank in (0, 1)]
    assert shares == [[0, 4], [1, 3]]


def test_a_key_is_what_is_asked():
    assert ResumableJob.key("score", [1]) == ResumableJob.key("score", (1,))
    assert ResumableJob.key("score", [1]) != ResumableJob.key("greedy", [1])


def test_other_settings_are_refused_by_name(tmp_path):
    ResumableJob(tmp_path, {"cfg": 1.0})  # finishes nothing, so it binds nobody
    ResumableJob(tmp_path, {"cfg": 0.0, "seed": 1}).put("k", 1)
    with pytest.raises(ValueError, match=r"other settings: cfg was 0.0, is 0.5; new was None, is 2\. Give"):
        ResumableJob(tmp_path, {"cfg": 0.5, "seed": 1, "new": 2})
    refuse_changes({"a": 1}, {"a": 1}, "x", "y")
    with pytest.raises(ValueError, match=r"x: a was 1, is None\. y"):
        refuse_changes({"a": 1}, {}, "x", "y")


def test_without_a_folder_everything_is_in_memory():
    job = ResumableJob(None, {"cfg": 0.0})
    job.put("k", 1)
    job.read()
    assert job["k"] == 1 and job.share(["k", "l"]) == [1]


def test_a_file_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        write_atomically(tmp_path / "file", text)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]
