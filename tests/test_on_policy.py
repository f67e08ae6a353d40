"""Alignment on the student's own tracks: what it visits, what is said of it there, and runs that resume."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, load_script
from llada.autoregressive.causal_lm import load_causal_lm
from llada.autoregressive.on_policy import (
    AutoregressiveGuide,
    OwnGuide,
    OwnStates,
    draft_starts,
    verified_by,
)
from llada.autoregressive.teacher_model import TeacherModel
from llada.autoregressive.teacher_rows import Student
from llada.autoregressive.teacher_stream import Windows
from llada.autoregressive.vocabulary import VocabMap
from llada.data.prompts import read_prompts
from llada.diffusion.batches import Example
from llada.models.building import load_for_inference
from llada.models.saving import save_model
from llada.rewards.scoring import Reward
from llada.run import Run
from llada.speculative.decoder import SpeculativeDecoder
from llada.speculative.settings import SpeculativeSettings
from modelling_final import LLaDAGenerationConfig
from processes import run_ranks
from speculation import IdsOnly, make_drafter, make_verifier
from test_precompute_teacher import save_teacher
from test_speculative_models import Tokenizer

train_kl = load_script("alignment/train_kl.py")
PROMPTS = ROOT / "data/samples/prompts.jsonl"
ALONE = Run(rank=0, world_size=1, device=torch.device("cpu"))
V, MASK = 48, 48


@pytest.mark.parametrize("causal", [True, False])
def test_windows_begin_where_the_decoder_begins_its_drafts(causal):
    verifier = make_verifier(V)
    drafter = make_drafter(verifier, Tokenizer(), noise=0.6, causal=causal)
    settings = SpeculativeSettings(draft_length=4, max_new_tokens=40, draft_cache=False)
    decoder = SpeculativeDecoder(drafter, verifier, IdsOnly(V, MASK), settings)
    texts, rounds = [], []
    for prompt in ([7, 3, 9], [1, 2]):
        answer, stats = decoder.decode(prompt, prompt, record_id=0, is_done=lambda answer: False)
        in_answer = np.arange(len(prompt) + len(answer)) >= len(prompt)
        texts.append(Example(np.array([*prompt, *answer]), in_answer, 1.0, 1.0))
        rounds.append(stats.rounds)
    stream = SimpleNamespace(
        windows=Windows(4), example_of=lambda i, *_: texts[i], mask_id=MASK, pad_id=0
    )  # fmt: skip
    starts = draft_starts(drafter, stream, [1, 0, 1])
    assert [len(starts[i]) for i in (0, 1)] == rounds and min(rounds) > 10
    assert all(found[0] == 0 and (np.diff(found) >= 1).all() and found[-1] < 40 for found in starts.values())


@pytest.fixture(scope="module")
def pair(model_dir, tokenizer_dir, tmp_path_factory):
    """A student, an autoregressive teacher of its vocabulary, and prompts."""
    student, tokenizer = load_for_inference(str(model_dir), chat=True)
    folder = save_teacher(tmp_path_factory.mktemp("judge"), tokenizer)
    teacher, own = load_causal_lm(str(folder), flag="--teacher")
    prompts, _ = read_prompts(str(PROMPTS), tokenizer, chat=True, context=256, gen_length=12)
    judge = TeacherModel(teacher, own, Student(tokenizer), top_k=0)
    return SimpleNamespace(student=student, tokenizer=tokenizer, judge=judge, prompts=prompts, folder=folder)


def stream_of(pair, guide, *, run=ALONE, micro_batch_size=4, **settings):
    sampler = LLaDAGenerationConfig(**{"gen_length": 12, "temperature": 1.0, "seed": 3, **settings})
    ids = pair.student.config
    return OwnStates(
        pair.student, pair.prompts, sampler, guide, 4, micro_batch_size, 0, run, ids.mask_token_id,
        ids.pad_token_id,
    )  # fmt: skip


def test_a_state_is_one_of_the_trajectory_and_the_teacher_speaks_of_its_masks(pair):
    stream = stream_of(
        pair, AutoregressiveGuide(pair.judge), block_length=4, method="semi_autoregressive_padding"
    )
    mask_id, seen = stream.mask_id, set()
    for step in range(4):
        (batch,) = stream(step)
        states = stream.visit([pair.prompts[i] for i in batch.record_ids], [step * 4 + p for p in range(4)])
        width = batch.input_ids.shape[1]
        for b, state in enumerate(states):
            num = len(state.prompt.token_ids)
            given = batch.input_ids[b, num : num + 12].numpy()
            assert (given == state.canvas).all()
            decided = np.flatnonzero(given[: len(state.answer)] != mask_id)
            assert (given[decided] == np.array(state.answer)[decided]).all()
            rows = [r % width - num for r in batch.rows.tolist() if r // width == b]
            assert rows == np.flatnonzero(state.is_scored).tolist()
            # masks of one block: those before it are decided, those behind it not looked at
            assert (
                len({r // 4 for r in rows}) <= 1 and (given[: min(rows, default=0) // 4 * 4] != mask_id).all()
            )
            seen.add(len(decided))
            text = torch.tensor([state.prompt.token_ids + state.answer])
            log_p = pair.judge.model(text).logits[0].log_softmax(-1)[num - 1 :]
            mine = [n for n, r in enumerate(batch.rows.tolist()) if r // width == b]
            if not mine:
                continue
            told = batch.teacher.take(mine[0], mine[-1] + 1, torch.device("cpu"))
            torch.testing.assert_close(told.log_probs, log_p[rows][:, : told.log_probs.shape[1]])
            assert batch.targets[mine].tolist() == [state.answer[r] for r in rows]
            assert float(batch.teacher_weights[mine].sum()) == pytest.approx(1.0)
    assert len(seen) > 4  # states from all over the trajectories


def hashed(prompts, completions, **columns):
    return [float(len(text[0]["content"]) % 2) for text in completions]


def test_a_verified_answer_behind_the_state_makes_the_student_its_teacher(pair):
    verify = verified_by([Reward("hashed", hashed, 1.0)], pair.tokenizer.decode)
    vocabulary = VocabMap.between(pair.tokenizer, pair.tokenizer)
    guide = OwnGuide(pair.student, vocabulary, verify, 0, pair.student.config.pad_token_id)
    stream = stream_of(pair, guide, num_return_sequences=3)
    states = stream.visit(pair.prompts[:4], [5, 6, 7, 8])
    right, found = verify(states), guide(states)
    assert len(states) == 12 and right.any() and not right.all()
    for n, (state, told) in enumerate(zip(states, found, strict=True)):
        group = range(n // 3 * 3, n // 3 * 3 + 3)
        others = [m for m in group if right[m] and m != n] or [m for m in group if right[m]]
        assert (told is None) == (not others)
        if told is None:
            continue
        text = np.concatenate([state.prompt.token_ids, state.canvas, states[others[0]].answer])
        with torch.no_grad():
            logits = pair.student(torch.from_numpy(text)[None]).logits[0]
        places = np.flatnonzero(state.is_scored)
        assert (told[0] == places).all()
        expected = logits[places + len(state.prompt.token_ids)].log_softmax(-1)
        shown = torch.from_numpy(told[1].log_probs)
        torch.testing.assert_close(shown, expected[:, : shown.shape[1]], atol=1e-4, rtol=1e-4)


def test_the_future_of_a_right_answer_makes_the_student_its_teacher(pair):
    verify = verified_by([Reward("hashed", hashed, 1.0)], pair.tokenizer.decode)
    vocabulary = VocabMap.between(pair.tokenizer, pair.tokenizer)
    guide = OwnGuide(
        pair.student, vocabulary, verify, 0, pair.student.config.pad_token_id, shown_share=0.5, seed=3
    )
    stream = stream_of(
        pair, guide, num_return_sequences=3, block_length=4, method="semi_autoregressive_padding"
    )
    states = stream.visit(pair.prompts[:4], [5, 6, 7, 8])
    right, found, shown = verify(states), guide(states), set()
    for state, is_right, told in zip(states, right, found, strict=True):
        assert (told is None) == (not is_right)
        if told is None:
            continue
        canvas = guide._with_future(state, [state])
        places = np.flatnonzero(canvas != state.canvas)
        # nothing of the block that is being decided, and half of what the answer has behind it
        assert state.later % 4 == 0 and (places >= state.later).all()
        assert len(places) == max(0, len(state.answer) - state.later) // 2
        assert (canvas[places] == np.array(state.answer)[places]).all()
        shown.add(len(places))
        text = torch.from_numpy(np.concatenate([state.prompt.token_ids, canvas]))[None]
        with torch.no_grad():
            logits = pair.student(text).logits[0]
        expected = logits[told[0] + len(state.prompt.token_ids)].log_softmax(-1)
        mine = torch.from_numpy(told[1].log_probs)
        torch.testing.assert_close(mine, expected[:, : mine.shape[1]], atol=1e-4, rtol=1e-4)
    assert max(shown) == 4  # of a state in the first block

    whole, surest = stream(0)[0], replace(stream, max_positions=2)(0)[0]
    width = whole.input_ids.shape[1]
    for b in range(len(whole.input_ids)):
        all_of, some = ({r for r in batch.rows.tolist() if r // width == b} for batch in (whole, surest))
        best = {r: float(whole.teacher.take(n, n + 1, torch.device("cpu")).log_probs.max())
                for n, r in enumerate(whole.rows.tolist()) if r in all_of}  # fmt: skip
        assert len(some) == min(2, len(all_of))
        assert min((best[r] for r in some), default=0) >= max((best[r] for r in all_of - some), default=-99)


def test_ranks_share_a_step(pair):
    guide = AutoregressiveGuide(pair.judge)
    (whole,) = stream_of(pair, guide)(2)
    parts = [
        stream_of(pair, guide, run=replace(ALONE, rank=rank, world_size=2), micro_batch_size=2)(2)
        for rank in (0, 1)
    ]
    assert [ids for (part,) in parts for ids in part.record_ids] == whole.record_ids
    assert torch.equal(torch.cat([part.targets for (part,) in parts]), whole.targets)
    assert sum(part.num_units for (part,) in parts) == whole.num_units


def flags(folder, model_dir, data, *more):
    return [
        "--model_name_or_path", str(model_dir), "--train_data_path", str(data), "--output_dir", str(folder),
        "--max_length", "256", "--batch_size", "4", "--learning_rate", "1e-2", "--warmup_steps", "0",
        "--log_interval", "1", "--max_steps", "4", "--lr_scheduler_type", "constant", *more,
    ]  # fmt: skip


def rows_of(pair, folder):
    load_script("alignment/precompute_teacher.py").main(
        ["--input", str(ROOT / "data/samples/sft.jsonl"), "--tokenizer", str(pair.folder), "--teacher",
         str(pair.folder), "--output_dir", str(folder), "--max_length", "256"]
    )  # fmt: skip
    return folder


def reward_file(folder):
    path = folder / "fourth.py"
    path.write_text(
        "def fourth(prompts, completions, **columns):\n"
        "    return [float(len(text[0]['content']) % 4 == 0) for text in completions]\n"
    )
    return f"{path}:fourth"


FUTURE = ["--teacher_sees", "future", "--block_length", "4", "--fixed_teacher", "true"]
FUTURE += ["--loss_type", "reverse_kl", "--kl_clip", "0.5", "--teacher_positions", "2"]


@pytest.mark.parametrize("kind", ["answers", "answers in blocks", "self", "self in the future", "drafts"])
def test_a_resumed_run_is_bitwise_the_same(kind, pair, model_dir, tmp_path):
    data, more = PROMPTS, ["--gen_length", "12", "--steps", "6", "--on_policy", kind.split()[0]]
    if kind.startswith("answers"):
        more += ["--teacher", str(pair.folder)]
        if "blocks" in kind:
            model, tokenizer = load_for_inference(str(model_dir), chat=True)
            model.config.attention_pattern, model.config.attention_block_size = "block_causal", 4
            save_model(model, tokenizer, tmp_path / "blocks")
            model_dir = tmp_path / "blocks"
    elif kind.startswith("self"):
        more += ["--reward_funcs", reward_file(tmp_path), "--num_generations", "3"]
        more += FUTURE if "future" in kind else []
    else:
        data, more = rows_of(pair, tmp_path / "rows"), ["--on_policy", "drafts", "--window_length", "4"]
    train_kl.main(flags(tmp_path / "whole", model_dir, data, *more, "--save_interval", "2"))
    resume = ["--resume_from_checkpoint", str(tmp_path / "whole/step-2")]
    train_kl.main(flags(tmp_path / "half", model_dir, data, *more, *resume))
    weights = [load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "half")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    start = load_file(model_dir / "model.safetensors")
    assert any(not torch.equal(value, start[name]) for name, value in weights[0].items())
    assert json.loads((tmp_path / "whole/results.json").read_text())["steps"] == 4
    logged = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    judged = [line["judged"] for line in logged if "judged" in line]
    some = 0 < sum(judged) < len(judged)
    assert {"drafts": not judged, "self": some}.get(kind.split()[0], min(judged, default=0) > 0)


@pytest.mark.parametrize(
    "kind", ["answers", "self", "self in the future", "self in the future, whole", "drafts"]
)
def test_two_ranks_train_what_one_does(kind, pair, model_dir, tmp_path):
    is_whole = kind.endswith("whole")
    data, more = PROMPTS, ["--micro_batch_size", "2", *([] if is_whole else ["--use_lora", "--lora_r", "2"])]
    more += ["--on_policy", kind.split()[0]]
    if kind == "drafts":
        data, more = rows_of(pair, tmp_path / "rows"), [*more, "--window_length", "4"]
    else:
        own = {"answers": ["--teacher", str(pair.folder)], "self": ["--reward_funcs", reward_file(tmp_path)]}
        more += ["--gen_length", "8", "--steps", "4", *own[kind.split()[0]]]
        more += FUTURE if "future" in kind else []
    more += ["--max_steps", "2"]
    train_kl.main(flags(tmp_path / "one", model_dir, data, *more))
    run_ranks(2, "alignment/train_kl.py", flags(tmp_path / "two", model_dir, data, *more), tmp_path)
    file = "final/model.safetensors" if is_whole else "final/adapter_model.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3)
    if is_whole:
        start = load_file(model_dir / "model.safetensors")
        assert any(not torch.equal(value, start[name]) for name, value in one.items())
    else:
        assert any(value.any() for name, value in one.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--on_policy", "answers"], "--on_policy answers needs --teacher"),
        (["--on_policy", "self"], "--on_policy self needs --reward_funcs"),
        (
            ["--on_policy", "drafts", "--positions", "masked"],
            "--on_policy drafts is about --positions windows",
        ),
        (["--on_policy", "self", "--reward_funcs", "math", "--shard", "full"], "self asks the whole model"),
        (
            [
                "--on_policy",
                "self",
                "--reward_funcs",
                "math",
                "--teacher_sees",
                "future",
                "--gen_length",
                "8",
            ],
            "future needs a later block: give --block_length below 8",
        ),
    ],
)
def test_wrong_flags(more, message, model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_kl.main(flags(tmp_path, model_dir, PROMPTS, *more))
