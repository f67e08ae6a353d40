"""A thinking model's texts, replayed: our scores are those of lm_eval's own `hf` model fed the same texts."""

import json

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from conftest import ROOT
from llada.inference.lm_eval_model import LLaDADist

TASKS = ROOT / "eval/tasks"

GSM8K = {  # question: (gold, what the model writes); stop strings and numbers stand in its thoughts
    "How many legs have 4 cats?": (
        "16",
        "<think>\n4 * 4 is 15? No.\nQuestion: is it 16?\n</think>\n\n#### 16",
    ),
    "What is 9 times 2?": ("18", "<think>18</think>\n\n\n9 * 2 = 18, so\n#### 18\n\nQuestion: more?"),
    "What is 7 plus 5?": ("12", "<think>#### 12</think>\nIt is 13.\n#### 13"),
    "What is 1,000 plus 500?": ("1500", "thinking of it\n\n</think>The answer is 1,500."),  # template-opened
    "How many eggs are in a dozen?": ("12", "#### 12"),  # no thought at all
}
MMLU = {
    "What is 2 + 3?": ("B", "<think>\n\nA is 4, B is 5.\n</think>\n\nB\nsince 2 + 3 = 5"),
    "What is 2 * 3?": ("C", "<think>C</think>\nA"),
    "What is 8 / 2?": ("A", "<think></think> A"),
}
HUMANEVAL = {
    "double": "<think>2 * x\ndef double(x):\n    return x\n</think>\n\nSure:\n"
    "```python\ndef double(x):\n    return 2 * x\n```",
    "half": "<think>easy</think>\n```python\ndef half(x):\n    return x // 3\n```\nDone.",
    "third": "<think>\n```\nx\n```\n</think>```\n    return x / 3\n```",
}
IFEVAL = {
    "Write two words in lower case.": "<think>TWO WORDS.\n\nHello</think>\n\nhello there",
    "Write one word in lower case.": "<think>one</think>\nHELLO",
    "Write three words in lower case.": "no thought here",
}  # fmt: skip
TEXTS = {
    **{question: text for question, (_, text) in (GSM8K | MMLU).items()},
    **{f"def {name}(": text for name, text in HUMANEVAL.items()},
    **IFEVAL,
}

IFEVAL_TASK = """
task: ifeval_like
custom_dataset: !function ifeval_like.prompts
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: ""
process_results: !function ifeval_like.check
generation_kwargs:
  until: []
  do_sample: false
  temperature: 0.0
  max_gen_toks: 200
metric_list:
  - metric: strict
    aggregation: mean
    higher_is_better: true
"""
IFEVAL_CODE = f"""
from datasets import Dataset, DatasetDict

def prompts(**_):
    return DatasetDict({{"test": Dataset.from_list([{{"prompt": p}} for p in {list(IFEVAL)!r}])}})

def check(doc, results):
    number = ["zero", "one", "two", "three"].index(doc["prompt"].split()[1])
    return {{"strict": float(results[0].islower() and len(results[0].split()) == number)}}
"""


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def manager(tmp_path):
    """Local data in the tasks' own layout, and lm_eval's tasks over them."""
    gsm8k = [{"question": q, "answer": f"So it is.\n#### {gold}"} for q, (gold, _) in GSM8K.items()]
    for split in ("train", "test"):
        write_lines(tmp_path / f"gsm8k/{split}.jsonl", gsm8k)
        mmlu = [
            {"question": q, "choices": ["4", "5", "6", "7"], "answer": gold, "subject": "arithmetic"}
            for q, (gold, _) in MMLU.items()
        ]
        write_lines(tmp_path / f"mmlu/{'dev' if split == 'train' else split}.jsonl", mmlu)
    tests = {"double": "f(3) == 6", "half": "f(4) == 2", "third": "f(9) == 3"}
    problems = [
        {
            **{"task_id": name, "prompt": f"def {name}(x):\n", "entry_point": name, "canonical_solution": ""},
            "test": f"def check(f):\n    assert {test}\n",
        }
        for name, test in tests.items()
    ]
    write_lines(tmp_path / "humaneval/HumanEval.jsonl", problems)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/ifeval_like.yaml").write_text(IFEVAL_TASK)
    (tmp_path / "own/ifeval_like.py").write_text(IFEVAL_CODE)
    folders = [str(TASKS), str(tmp_path / "own")]
    return TaskManager(include_path=folders, include_defaults=False, metadata={"data_dir": str(tmp_path)})


def replayed(tokenizer, prompt_ids):
    """Token ids of what the model writes to the last question of a prompt, to the end of the canvas."""
    prompt = tokenizer.decode(prompt_ids)
    question = max(TEXTS, key=lambda question: prompt.rfind(question))
    assert question in prompt
    ids = tokenizer(TEXTS[question], add_special_tokens=False)["input_ids"]
    return ids + [tokenizer.eos_token_id] * (300 - len(ids))


@pytest.fixture
def ours(model_dir, monkeypatch):
    lm = LLaDADist.create_from_arg_obj(
        {"model_path": str(model_dir), "gen_length": 300, "max_length": 4096, "device": "cpu"}
    )

    def generate(prompts, **_):
        rows = [torch.tensor(replayed(lm.tokenizer, ids)) for ids in prompts]
        return type("Output", (), {"sequences": torch.stack(rows)})

    monkeypatch.setattr(lm.worker.model, "generate", generate)
    return lm


@pytest.fixture
def theirs(ours, monkeypatch):
    lm = HFLM(
        pretrained=ours.worker.model, tokenizer=ours.tokenizer, backend="causal", think_end_token="</think>",
        batch_size=1, max_length=4096, device="cpu",
    )  # fmt: skip

    def generate(context, **_):
        ids = [replayed(lm.tokenizer, row) for row in context.tolist()]
        return torch.cat([context, torch.tensor(ids)], dim=1)

    monkeypatch.setattr(lm, "_model_generate", generate)
    return lm


@pytest.mark.parametrize(
    ("task", "metric", "expected"),
    [
        ("gsm8k_local", "exact_match,flexible-extract", 0.8),
        ("mmlu_generative_local", "exact_match,get_response", 2 / 3),
        ("humaneval_instruct_sanitized", "pass@1,create_test", 2 / 3),
        ("ifeval_like", "strict,none", 2 / 3),
    ],
)
def test_scores_are_those_of_lm_evals_own_model(ours, theirs, manager, task, metric, expected):
    found = []
    for lm in (ours, theirs):
        results = lm_eval.simple_evaluate(
            lm, tasks=[task], task_manager=manager, num_fewshot=0, apply_chat_template=True,
            bootstrap_iters=0, confirm_run_unsafe_code=True, log_samples=True,
        )  # fmt: skip
        found.append((results["results"][task], [s["filtered_resps"] for s in results["samples"][task]]))
    assert found[0] == found[1]
    assert found[0][0][metric] == pytest.approx(expected)
