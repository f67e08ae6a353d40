"""eval/eval_llada.py: lm_eval with a tiny model and local files; on one rank, on two, killed and resumed."""

import json
import logging
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from conftest import ROOT, load_script
from llada.diffusion.likelihood import Request
from llada.inference.eval_args import parse_model_args
from llada.inference.eval_worker import EvalRank, _deal, cut_answer
from llada.inference.lm_eval_model import LLaDADist, with_flags
from llada.models.building import new_model
from llada.models.saving import save_model

TASKS = ROOT / "eval/tasks"
DATA = ROOT / "data/samples/eval"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    lines = (DATA / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["question"] for line in lines]
    tokenizer = load_script("scripts/train_tokenizer.py").train_tokenizer(texts, vocab_size=300)
    shape = {
        "d_model": 32,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "mlp_hidden_size": 48,
        "max_sequence_length": 1024,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(shape))
    model = new_model(str(folder / "tiny.yaml"), tokenizer, seed=0, max_length=1024)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # sharper than at initialisation: no ties between choices
    save_model(model, tokenizer, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def main():
    return load_script("eval/eval_llada.py").main


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("LLADA_EVAL_DATA", raising=False)


def flags(checkpoint, output, tasks, model_args="", data=DATA):
    arguments = f"model_path={checkpoint},gen_length=8,block_length=4,temperature=0.7{model_args}"
    return [
        *("--tasks", tasks, "--include_path", str(TASKS), "--num_fewshot", "1"),
        *("--model_args", arguments, "--metadata", f"data_dir={data}", "--output_path", str(output)),
    ]


def records(output):
    lines = [
        line for file in output.glob("requests/*/*.jsonl") for line in file.read_text("utf-8").splitlines()
    ]
    return {record["key"]: record for record in map(json.loads, lines)}


def results(output):
    (file,) = output.glob("*/results_*.json")
    return json.loads(file.read_text())["results"]


@pytest.fixture(scope="module")
def finished(checkpoint, main, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    main([*flags(checkpoint, output, "gsm8k_local,mmlu_local"), "--log_samples"])
    return output


def test_results_and_every_generation_are_saved(finished):
    assert set(results(finished)) == {"gsm8k_local", "mmlu_local"}
    found = records(finished).values()
    answers = [record for record in found if "raw" in record]
    assert len(answers) == 3
    assert all(record["prompt"].startswith("Question:") and record["raw"] for record in answers)
    likelihoods = [record["result"] for record in found if "num_forwards" in record]
    assert len(likelihoods) == 16  # 4 questions, 4 choices
    assert all(value < 0 and error >= 0 for value, error in likelihoods)
    *_, line = (finished / "likelihoods.md").read_text().splitlines()
    largest = max(error for _, error in likelihoods)
    assert line.startswith("|mmlu_local|16|") and line.endswith(f"|{largest:.3f}|")
    assert list(finished.glob("*/samples_mmlu_local_*.jsonl"))


def test_multiple_choice_picks_the_likeliest_letter(finished, checkpoint):
    (file,) = finished.glob("*/samples_mmlu_local_*.jsonl")
    model = EvalRank(parse_model_args({"model_path": str(checkpoint)}))
    for sample in map(json.loads, file.read_text().splitlines()):
        context = sample["arguments"]["gen_args_0"]["arg_0"]
        ids = model.tokenizer(context)["input_ids"] + [model.ids.mask]
        with torch.no_grad():
            log_p = model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        letters = [model.tokenizer(" " + letter)["input_ids"] for letter in "ABCD"]
        if all(len(ids) == 1 for ids in letters):
            expected = [float(log_p[ids[0]]) for ids in letters]
            assert [float(r[0][0]) for r in sample["resps"]] == pytest.approx(expected, abs=1e-5)
        subject = sample["doc"]["subject"]
        assert context.startswith(
            f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        )
        examples = {"arithmetic": "What is 2 + 3?", "colours": "Which colour do blue and yellow paint make?"}
        assert examples[subject] in context and context.count("Answer:") == 2  # of the question's own subject


def test_a_finished_run_computes_nothing_again(finished, checkpoint, main, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(EvalRank, "_generate", fail)
    monkeypatch.setattr("llada.inference.eval_worker.iter_scores", fail)
    record_dir = f",record_dir={finished / 'requests'},generate_batch_size=1"
    main(flags(checkpoint, tmp_path, "gsm8k_local,mmlu_local", record_dir))
    assert results(tmp_path) == results(finished)


def test_a_killed_run_continues(finished, checkpoint, main, monkeypatch, tmp_path):
    generate, batches = EvalRank._generate, []

    def killed_at_the_second_batch(self, batch):
        batches.append(len(batch))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return generate(self, batch)

    monkeypatch.setattr(EvalRank, "_generate", killed_at_the_second_batch)
    arguments = flags(checkpoint, tmp_path, "gsm8k_local", ",generate_batch_size=1")
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    (log,) = tmp_path.glob("requests/*/rank-0.jsonl")
    with open(log, "a", encoding="utf-8") as file:
        file.write('{"key": "half a li')
    assert len(batches) == 2
    main(arguments)
    assert batches == [1, 1, 1, 1]  # the second and third again, the first not
    assert '"half a li\n' in log.read_text(encoding="utf-8")
    expected = {key: r["result"] for key, r in records(finished).items() if "raw" in r}
    whole = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert {r["key"]: r["result"] for r in map(json.loads, whole)} == expected


def test_two_ranks_give_the_same_numbers(finished, checkpoint, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = flags(checkpoint, tmp_path, "gsm8k_local,mmlu_local", ",generate_batch_size=1,batch_size=3")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    command = [*launch, str(ROOT / "eval/eval_llada.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(tmp_path) == results(finished)
    one, two = records(finished), records(tmp_path)
    assert one.keys() == two.keys()
    for key, record in one.items():
        result = two[key]["result"]
        is_likelihood = isinstance(result, list)
        expected = pytest.approx(record["result"], abs=1e-5) if is_likelihood else record["result"]
        assert result == expected
    assert len(list(tmp_path.glob("requests/*/rank-*.jsonl"))) == 2


def test_the_ranks_share_the_work_evenly():
    items = {f"{c}{n}": Request((c,) * c, (n,), "") for c in range(1, 9) for n in range(4)}
    hands = _deal(items, 3)
    assert sorted(key for hand in hands for key in hand) == sorted(items)
    for hand in hands:
        contexts = {item.context for item in hand.values()}
        assert len(hand) == 4 * len(contexts)  # the choices of a question stay together
    assert max(map(len, hands)) - min(map(len, hands)) <= 4


@pytest.fixture
def lm(checkpoint):
    def make(**model_args):
        return LLaDADist.create_from_arg_obj({"model_path": str(checkpoint), **model_args})

    return make


def test_long_contexts_lose_their_start_and_are_counted(lm, caplog):
    model = lm(max_length=16, gen_length=4, is_check_greedy=False)
    asked = []
    model.worker.compute = lambda kind, items: [asked.append(item) or (0.0, 0.0) for item in items.values()]
    long = "x" * 30 + "end"
    with caplog.at_level(logging.WARNING):
        model.loglikelihood([Instance("loglikelihood", {}, (long, " yes"), 0)], disable_tqdm=True)
        model.generate_until([Instance("generate_until", {}, (long, {"until": []}), 0)])
    request, prompt = asked
    assert len(request.context) + len(request.answer) == 16
    assert model.tokenizer.decode(request.context).endswith("end")
    assert len(prompt.token_ids) == 12
    assert model.tokenizer.decode(prompt.token_ids).endswith("end")
    assert caplog.text.count("1 of 1 contexts do not fit into max_length=16") == 2
    with pytest.raises(ValueError, match="max_length=16: no room for an answer of 17 tokens"):
        model._fit((), 17)


def test_rolling_likelihood_scores_every_token_once(lm):
    model = lm(max_length=9, likelihood="l2r", is_check_greedy=False)
    asked = []
    model.worker.compute = lambda kind, items: [asked.append(item) or (-1.0, 0.0) for item in items.values()]
    text = "abcdefghijklmnopqrstuvwxyz"
    (total,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert "".join(model.tokenizer.decode(request.answer) for request in asked) == text
    assert total == -len(asked)
    assert asked[0].context == (model.prefix_token_id,)
    assert all(len(request.context) + len(request.answer) <= 9 for request in asked)


def settings_of(lm, task, context=0, **model_args):
    length, _, settings = lm(**model_args)._settings(task, context)
    return length, *(settings[name] for name in ("gen_length", "steps", "block_length", "temperature"))


def test_task_settings_yield_to_model_args(lm):
    sampling = {"do_sample": True, "temperature": 0.2, "max_gen_toks": 12, "until": "x"}
    assert settings_of(lm, sampling) == (12, 12, 12, 12, 0.2)
    assert lm()._settings(sampling)[1] == ("x",)
    own = {"gen_length": 8, "steps": 4, "block_length": 4, "temperature": 0.0}
    assert settings_of(lm, sampling, **own) == (8, 8, 4, 4, 0.0)


@pytest.mark.parametrize(
    ("task", "length", "temperature"),
    [
        ({"max_gen_toks": 12}, 12, 0.0),
        ({"max_new_tokens": 12}, 12, 0.0),
        ({"max_tokens": 12}, 12, 0.0),
        ({"max_completion_tokens": 12}, 12, 0.0),
        ({"max_gen_toks": 12, "max_tokens": 13}, 12, 0.0),
        ({"max_length": 12}, 7, 0.0),  # with the prompt's 5
        ({}, 256, 0.0),
        ({"max_gen_toks": 12, "temperature": 0.2}, 12, 0.2),  # without do_sample: sampled
        ({"max_gen_toks": 12, "temperature": 0.2, "do_sample": True}, 12, 0.2),
        ({"max_gen_toks": 12, "temperature": 0.2, "do_sample": False}, 12, 0.0),
        ({"max_gen_toks": 12, "temperature": 0.0}, 12, 0.0),
    ],
)
def test_a_task_is_read_by_lm_evals_own_rules(lm, task, length, temperature):
    found = settings_of(lm, task, context=5)
    assert (found[0], found[-1]) == (length, temperature)


def test_answers_fill_whole_blocks_and_are_cut(lm, caplog):
    assert settings_of(lm, {}, gen_length=10, block_length=4) == (10, 12, 12, 4, 0.0)
    assert settings_of(lm, {"max_gen_toks": 3}, block_length=32) == (3, 32, 32, 32, 0.0)
    assert not caplog.records
    # tasks of different lengths in one command
    model = lm(block_length=8, steps=24)
    assert [model._settings({"max_gen_toks": n})[2]["steps"] for n in (48, 24, 16, 10)] == [24, 24, 16, 16]
    assert model._settings({"max_gen_toks": 40})[2] == {
        **{"gen_length": 40, "steps": 25, "block_length": 8, "temperature": 0.0}
    }
    assert "steps=24 become 25 for an answer of 40 tokens" in caplog.text
    with pytest.raises(ValueError, match="max_length 4 leaves no room behind 5 prompt tokens"):
        model._settings({"max_length": 4}, 5)
    texts = lm(gen_length=6, block_length=4, steps=2).generate_until(
        [Instance("generate_until", {}, ("Question: 1 + 1", {"until": []}), n) for n in range(2)]
    )
    whole = lm(gen_length=8, block_length=4, steps=2).generate_until(
        [Instance("generate_until", {}, ("Question: 1 + 1", {"until": []}), 0)]
    )
    assert texts[0] == texts[1] and whole[0].startswith(texts[0])


GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<model>"
)
SILENT = (
    "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<model>"
)


@pytest.mark.parametrize("template", [GEMMA, SILENT])
def test_a_template_without_system_role_puts_its_text_into_the_first_user_turn(lm, template, caplog):
    model = lm()
    model.tokenizer.chat_template = template
    turns = [("system", "Be brief. "), ("user", "1 + 1?"), ("assistant", "2"), ("user", "2 + 2?")]
    history = [{"role": role, "content": content} for role, content in turns]
    for _ in range(2):
        text = model.apply_chat_template(history)
        assert text == "<user>Be brief.\n\n1 + 1?<assistant>2<user>2 + 2?<model>"
    assert caplog.text.count("no system role") == 1
    assert model.apply_chat_template(history[1:]) == "<user>1 + 1?<assistant>2<user>2 + 2?<model>"


def test_repeats_differ_only_where_tokens_are_drawn(lm):
    requests = [Instance("generate_until", {}, ("Question: 1 + 1", {"until": []}), 0)] * 3
    drawn = lm(gen_length=8, temperature=1.0)
    texts = drawn.generate_until(requests)
    assert len(set(texts)) > 1
    assert lm(gen_length=8, temperature=1.0).generate_until(requests) == texts
    sure = lm(gen_length=8)
    calls = []
    generate = sure.worker._generate
    sure.worker._generate = lambda batch: calls.append(len(batch)) or generate(batch)
    assert len(set(sure.generate_until(requests))) == 1
    assert calls == [1]


def test_chat_templates_and_bos(lm):
    model = lm()
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    ids = model.tok_encode(text)
    assert ids.count(model.tokenizer.bos_token_id) == 1
    started = model.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}],
        add_generation_prompt=False,
    )
    assert started.endswith("It is")


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("a b\n\nc", ["\n\n"], "a b"),
        ("one two three", ["three", "two"], "one "),  # the first in the text, not in the list
        ("all of it", [], "all of it"),
        ("all of it", [""], "all of it"),
        ("<think>\n1\n</think>42\nQuestion:", ["\n"], "42"),
        ("<think>\n1\n</think>\n\n42\nQuestion:", ["\n"], "42"),  # its white space is no stop string
        ("1 + 1</think>\n2", ["\n"], "2"),  # the template has opened the thought
        ("<think>never ends, 42", [], ""),
        ("\n42", ["\n"], ""),
    ],
)
def test_answers_are_cut_at_the_first_stop_string(text, until, expected):
    assert cut_answer(text, until) == expected


def test_generation_is_cut_at_the_end_token(lm, monkeypatch):
    model = lm(gen_length=6)
    ids = model.tok_encode("ab")
    row = [*ids, model.worker.ids.eot, *ids, model.worker.ids.eos]
    output = type("Output", (), {"sequences": torch.tensor([row[:6]])})
    monkeypatch.setattr(type(model.worker.model), "generate", lambda *_, **__: output)
    assert model.generate_until([Instance("generate_until", {}, ("Hi", {"until": []}), 0)]) == ["ab"]


def refuse(values):
    with pytest.raises(ValueError) as refused:
        parse_model_args(values)
    return str(refused.value)


def test_bad_model_args_are_explained(lm, checkpoint):
    assert "did you mean 'gen_length'" in refuse({"model_path": "an/example", "gen_lenght": 3})
    assert "--likelihood 'elbow': choose from" in refuse({"model_path": "an/example", "likelihood": "elbow"})
    assert "--steps: invalid int value: 'many'" in refuse({"model_path": "an/example", "steps": "many"})
    with pytest.raises(ValueError, match="--load_lora True: has no effect without --adapter_path"):
        parse_model_args({"model_path": "an/example", "load_lora": True})
    with pytest.raises(ValueError, match=r"--mask_token_id 5: .* has \d+ in config.json"):
        lm(mask_id=5)
    lm(mask_id=lm().worker.ids.mask)
    with pytest.raises(ValueError, match="no checkpoint there"):
        LLaDADist.create_from_arg_string("model_path=./nowhere")


def test_the_predecessors_model_args_are_accepted():
    args = parse_model_args(
        {
            **{
                "model_path": "an/example",
                "adapter_path": "an/adapter",
                "load_lora": False,
                "mask_id": 126336,
            },
            **{"max_length": 8192, "batch_size": 32, "mc_num": 128, "is_check_greedy": True, "cfg": 0.0},
            **{"steps": 1024, "gen_length": 1024, "block_length": 128, "remasking": "low_confidence"},
            **{"device": "cuda", "generate_batch_size": 1, "repetition_penalty": 1.2, "use_thinking": True},
            **{"temperature": 0.0},
        }
    )
    assert args.adapter_path is None  # load_lora=False
    assert (args.num_masks, args.cfg_scale, args.is_check_greedy) == (128, 0.0, True)


def test_lm_evals_own_flags_yield_to_model_args():
    assert with_flags({}, {"batch_size": "auto", "device": "cuda:0"}) == {}
    assert with_flags({}, {"batch_size": "8", "device": "cpu"}) == {"batch_size": 8, "device": "cpu"}
    assert with_flags({"batch_size": 2}, {"batch_size": 8}) == {"batch_size": 2}


def test_bad_command_lines_are_explained(main, tmp_path, checkpoint):
    with pytest.raises(ValueError, match="--preset gsm8k-instrct: unknown; did you mean 'gsm8k-instruct'"):
        main(["--preset", "gsm8k-instrct", "--model_args", "model_path=x"])
    with pytest.raises(ValueError, match="model_path=FOLDER is missing"):
        main(["--tasks", "gsm8k_local"])
    config = tmp_path / "config.yaml"
    config.write_text("tasks: [gsm8k_local]\nnum_fewshots: 3\n")
    with pytest.raises(ValueError, match="unknown key 'num_fewshots'; did you mean 'num_fewshot'"):
        main(["--config", str(config)])
    with pytest.raises(ValueError, match=r"set LLADA_EVAL_DATA to the folder that holds gsm8k/train.jsonl"):
        main([*flags(checkpoint, tmp_path, "gsm8k_local")[:-4], "--output_path", str(tmp_path)])
    with pytest.raises(ValueError, match=r"has no gsm8k/train.jsonl"):
        main(flags(checkpoint, tmp_path, "gsm8k_local", data=tmp_path))
    with pytest.raises(ValueError, match="marked as unsafe"):
        (tmp_path / "humaneval").mkdir()
        problem = {
            "task_id": "0",
            "prompt": "def f():\n",
            "entry_point": "f",
            "test": "",
            "canonical_solution": "",
        }
        (tmp_path / "humaneval/HumanEval.jsonl").write_text(json.dumps(problem) + "\n")
        main(flags(checkpoint, tmp_path, "humaneval_local", data=tmp_path))


def test_an_unknown_task_is_answered_with_the_nearest(main, checkpoint, tmp_path, monkeypatch):
    # lm_eval's own ten thousand files take half a minute to read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match="--tasks gms8k_local: unknown; did you mean 'gsm8k_local'"):
        main(flags(checkpoint, tmp_path, "gms8k_local"))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": \n')
    with pytest.raises(ValueError, match=r"gsm8k/train.jsonl:2: malformed JSON"):
        main(flags(checkpoint, tmp_path, "gsm8k_local", data=tmp_path))


def test_the_debug_config_and_the_presets_are_valid(main):
    script = load_script("eval/eval_llada.py")
    debug = ["--config", str(ROOT / "configs/debug/eval_llada.yaml"), "--model_args", "model_path=an/example"]
    config = script.parse_arguments(debug)
    assert config.model == "llada_dist"
    assert config.model_args["record_dir"] == "runs/debug/eval/requests"
    parse_model_args(config.model_args)
    presets = yaml.safe_load((ROOT / "eval/presets.yaml").read_text())
    del presets["_shared"]
    assert "gsm8k-instruct" in presets
    for name, preset in presets.items():
        assert set(preset) == {"for", "published", "reachable", "arguments"}
        assert set(preset["arguments"]) <= set(EvaluatorConfig.__slots__)
        parsed = script.parse_arguments(["--preset", name, "--model_args", "model_path=an/example,seed=3"])
        args = parse_model_args(parsed.model_args)
        assert args.seed == 3
        if args.gen_length:
            assert args.gen_length % args.block_length == 0
            steps = args.gen_length // (2 if name.startswith("d1-") else 1)
            assert args.steps == (steps if args.parallel_decoding == "none" else None)
        is_code = any(word in task for task in parsed.tasks for word in ("humaneval", "mbpp"))
        assert preset["arguments"].get("confirm_run_unsafe_code", False) == is_code
    given = script.parse_arguments(
        [
            "--preset",
            "gsm8k-instruct",
            "--num_fewshot",
            "2",
            "--model_args",
            "model_path=an/example,gen_length=128",
        ]
    )
    assert (given.num_fewshot, given.model_args["gen_length"], given.model_args["block_length"]) == (
        2,
        128,
        8,
    )


def test_results_of_other_settings_stand_beside(finished, checkpoint, main, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    main(flags(checkpoint, tmp_path, "gsm8k_local", ",gen_length=4,steps=4,block_length=4"))
    assert len(list(tmp_path.glob("requests/*/settings.json"))) == 2


def test_every_local_task_is_found():
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    ours = ["gsm8k_local", "mmlu_local", "mmlu_generative_local", "humaneval_local"]
    assert set(tasks.match_tasks([*ours, "humaneval_instruct_sanitized"])) >= set(ours)


@pytest.mark.parametrize(
    ("task", "installed", "replaced"),
    [
        ("gsm8k_local", "gsm8k/gsm8k.yaml", set()),
        ("mmlu_local", "mmlu/default/_default_template_yaml", {"test_split", "fewshot_split"}),
        ("mmlu_generative_local", "mmlu/generative/_default_template_yaml", {"test_split", "fewshot_split"}),
        ("humaneval_local", "humaneval/humaneval.yaml", {"metric_list", "filter_list"}),
    ],
)
def test_local_tasks_are_lm_evals_own_but_for_their_data(task, installed, replaced, tmp_path):
    folder = load_script("eval/tasks/installed_task.py").FOLDER
    published = load_yaml(folder / installed, resolve_func=False)
    (tmp_path / "humaneval").mkdir()
    problem = {"task_id": "0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): ..."}
    (tmp_path / "humaneval/HumanEval.jsonl").write_text(json.dumps(problem) + "\n")
    data_dir = str(tmp_path if task == "humaneval_local" else DATA)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_dir": data_dir})
    local = manager.load([task])["tasks"][task]
    same = set(published) - replaced - {"task", "tag", "metadata", "dataset_path", "fewshot_config"}
    assert len(same) >= 5
    for name in same:
        assert getattr(local.config, name) == published[name], name
    assert published["metadata"]["version"] == local.VERSION
    assert len(local.test_docs()) > 0


def test_the_prompt_of_gsm8k_is_lm_evals(finished):
    prompts = [record["prompt"] for record in records(finished).values() if "raw" in record]
    train = [json.loads(line) for line in (DATA / "gsm8k/train.jsonl").read_text("utf-8").splitlines()]
    shots = [f"Question: {doc['question']}\nAnswer: {doc['answer']}\n\nQuestion: " for doc in train]
    assert all(prompt.startswith(tuple(shots)) and prompt.endswith("\nAnswer:") for prompt in prompts)


def test_mmlu_files_of_either_kind(tmp_path):
    local_data = load_script("eval/tasks/local_data.py")
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        row = '"Is ""it"", really?",a,b,c,d,C\n'
        (tmp_path / "mmlu" / split / f"high_school_physics_{split}.csv").write_text(row)
        (tmp_path / "mmlu" / split / f"anatomy_{split}.csv").write_text(row * 2)
    found = local_data.mmlu(data_dir=str(tmp_path), gen_length=3)["all"]
    assert found[0] == {
        **{"question": 'Is "it", really?', "choices": ["a", "b", "c", "d"], "answer": 2},
        **{"subject": "anatomy", "split": "dev"},
    }
    assert len(local_data.mmlu_test(found)) == len(local_data.mmlu_dev(found)) == 3
    assert len(local_data.mmlu(data_dir=str(tmp_path), subject="anatomy")["all"]) == 4
    with pytest.raises(ValueError, match="subject=law: dev has only anatomy, high_school_physics"):
        local_data.mmlu(data_dir=str(tmp_path), subject="law")
    (tmp_path / "mmlu/test/anatomy_test.csv").write_text("q,a,b,c,d,E\n")
    with pytest.raises(ValueError, match=r"anatomy_test.csv:1: 'answer' must be A to D"):
        local_data.mmlu(data_dir=str(tmp_path))
    (tmp_path / "mmlu/test/anatomy_test.csv").write_text("q,a,b,c,d\n")
    with pytest.raises(ValueError, match=r"anatomy_test.csv:1: expected question,A,B,C,D,answer, got 5"):
        local_data.mmlu(data_dir=str(tmp_path))


def test_programs_pass_only_when_their_tests_run_through():
    code = load_script("eval/tasks/code_execution.py")
    doc = {"prompt": "import math\n\ndef up(x):\n    '''Next.'''\n", "entry_point": "up"}
    test = "def check(f):\n    assert f(1) == 2\ncheck(up)"

    def passes(programs):
        return code.pass_at_1([test], programs)["pass@1"]

    assert passes(code.complete_function([["    return x + 1\n"]], [doc])) == 1.0
    assert (
        passes(code.complete_function([["    return x\n", "    return x + math.floor(1.5)\n"]], [doc])) == 0.5
    )
    fenced = "Sure:\n```python\ndef up(x):\n    return math.floor(x + 1.5)\n```\nDone."
    assert passes(code.extract_function([[fenced]], [doc])) == 1.0
    assert passes(code.extract_function([["```\n    return x + 1\n```"]], [doc])) == 1.0
    assert passes([["def up(x): return 2\nimport os, sys; os._exit(0)"]]) == 0.0
    assert passes([["def up(x): return bytearray(2**32) and 2"]]) == 0.0


def test_the_shell_script_prints_its_commands(tmp_path):
    environment = {**os.environ, "DRY_RUN": "1", "MODEL_PATH": "my model", "NUM_GPUS": "2", "LIMIT": "7"}
    script = str(ROOT / "eval/eval_llada.sh")
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mmlu, gsm8k, humaneval = done.stdout.splitlines()
    assert "--tasks mmlu_generative" in mmlu and "gen_length=3" in mmlu
    assert r"model_path=my\ model" in gsm8k and "--nproc_per_node 2" in gsm8k and "--limit 7" in gsm8k
    assert "humaneval_instruct_sanitized" in humaneval and "--confirm_run_unsafe_code" in humaneval
    bad = subprocess.run(
        ["bash", script], env={**environment, "TASKS": "law"}, capture_output=True, text=True
    )
    assert bad.returncode == 2
    assert "unknown task 'law'" in bad.stderr
