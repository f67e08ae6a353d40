"""Public preference files through train_dpo.py, and labelled ones through precompute_bref.py, decoded."""

import json

import pytest

from chat_samples import write_jsonl
from conftest import load_script
from llada.models.tokens import load_tokenizer
from llada.policies.kto_reference import read_bref
from llada.policies.pairs import read_pairs
from test_public_records import PAIRS, PROMPT, A, Q, said, share

DPO, BREF = "rlhf/train_dpo.py", "rlhf/precompute_bref.py"
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
ASKED = f"<|startoftext|>{USER}{Q}<|eot_id|>{HEADER}"
BRIEF = f"<|startoftext|>{SYSTEM}{USER}{Q}<|eot_id|>{HEADER}"
AGAIN = f"<|startoftext|>{USER}{Q}<|eot_id|>{HEADER}3<|eot_id|>{USER}Sure?<|eot_id|>{HEADER}"
TURN, TEXT = "<|eot_id|><|endoftext|>", "<|endoftext|>"

# name -> (the prompt, the chosen answer, the rejected one) as the model reads them, looked at by eye
ROWS = {
    "texts": (Q, "4" + TEXT, "5" + TEXT),
    "question": (Q, "4" + TEXT, "5" + TEXT),
    "instruction + input": ("Add.\n\n2, 2", "4" + TEXT, "5" + TEXT),
    "orca": (BRIEF, "4" + TURN, "5" + TURN),
    "orca with an empty system": (ASKED, "4" + TURN, "5" + TURN),
    "messages beside texts": (ASKED, "4" + TURN, "5" + TURN),
    "LLaMA-Factory": (ASKED, "4" + TURN, "5" + TURN),
    "LLaMA-Factory v1": (ASKED, "4" + TURN, "5" + TURN),
    "TRL conversational": (ASKED, "4" + TURN, "5" + TURN),
    "TRL implicit": (ASKED, "4" + TURN, "5" + TURN),
    "UltraFeedback": (ASKED, "4" + TURN, "5" + TURN),
    "prompt with a system that the answers lack": (BRIEF, "4" + TURN, "5" + TURN),
    "several turns": (AGAIN, "4" + TURN, "5" + TURN),
    "hh-rlhf as text": ("\n\nHuman: Hi\n\nAssistant:", " Hello there" + TEXT, " Hell no" + TEXT),
    "implicit text, at a word's border": ("The sky is", " blue." + TEXT, " black." + TEXT),
    "Stanford Human Preferences": (Q, "4" + TEXT, "5" + TEXT),
}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(str(tokenizer_dir), chat=True)


def flags(model_dir, tmp_path, file, *more):
    return [
        "--model_name_or_path", str(model_dir), "--train_data_path", str(file), "--max_length", "256",
        "--output_dir", str(tmp_path / "run"), *map(str, more),
    ]  # fmt: skip


def test_every_public_shape_is_looked_at():
    assert ROWS.keys() == PAIRS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_train_dpo_learns_from(name, model_dir, tokenizer, tmp_path):
    script = load_script(DPO)
    file = write_jsonl(tmp_path / "pairs.jsonl", [PAIRS[name][0]])
    config = script.parse(script.Config, flags(model_dir, tmp_path, file))
    ((chosen, rejected),), counts = read_pairs(config, tokenizer, [str(file)])
    found = [tokenizer.decode(ids) for ids in (chosen.context, chosen.answer, rejected.answer)]
    assert found == list(ROWS[name]) and counts["kept"] == 1
    assert chosen.context.tolist() == rejected.context.tolist()


def test_train_dpo_runs_on_all_of_them_and_says_what_it_left_out(model_dir, tmp_path, capsys):
    records = [record for record, _ in PAIRS.values()]
    bad = [
        {"task": Q, "chosen": A, "rejected": "5"},
        {"chosen": A},
        {"prompt": PROMPT, "chosen": [], "rejected": 4},
    ]
    file = write_jsonl(tmp_path / "pairs.jsonl", [*records, *bad])
    more = ["--max_steps", 1, "--batch_size", 2, "--num_masks", 1, "--bad_records", "drop"]
    load_script(DPO).main(flags(model_dir, tmp_path, file, *more))
    printed = capsys.readouterr().out
    assert f"training pairs: {{'kept': {len(records)}, 'truncated': 0, 'dropped': 0, 'equal': 0}}" in printed
    assert "plain texts among conversations, continued as they stand" in printed
    assert "pairs whose prompt is what both answers begin with: 2" in printed
    assert "bad records, dropped: 3" in printed and "warning: 3 of 19 are not used" in printed
    for line, reason in ((17, "no question"), (18, "a preference needs"), (19, "'chosen' must be")):
        assert f"pairs.jsonl:{line}: {reason}" in printed


LABELLED = [
    ({"prompt": PROMPT, "completion": said(A), "label": True}, ASKED, "4" + TURN, True),
    ({"prompt": Q, "completion": A, "label": False}, Q, "4" + TEXT, False),
    ({"messages": PROMPT + said(A), "label": False}, ASKED, "4" + TURN, False),  # LLaMA-Factory
    ({"conversations": share(Q, A), "kto_tag": True}, ASKED, "4" + TURN, True),
    ({"instruction": Q, "input": "", "output": A, "kto_tag": False}, Q, "4" + TEXT, False),
    ({"system": "Be brief.", "question": Q, "answer": A, "label": 1}, BRIEF, "4" + TURN, True),
]  # fmt: skip


def test_labelled_files_through_precompute_bref(model_dir, tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "kto.jsonl", [record for record, *_ in LABELLED])
    out = tmp_path / "bref.jsonl"
    load_script(BREF).main([
        "--model_path", str(model_dir), "--dataset", str(file), "--k_vals", "1", "--output_file", str(out),
        "--max_length", "256",
    ])  # fmt: skip
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["label"] for record in found] == [label for *_, label in LABELLED]
    records = read_bref(str(out), tokenizer, num_draws=1).records
    rows = [tuple(tokenizer.decode(ids) for ids in (r.tokens.context, r.tokens.answer)) for r in records]
    assert rows == [(prompt, answer) for _, prompt, answer, _ in LABELLED]
