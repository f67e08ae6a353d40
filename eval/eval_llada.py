"""Evaluate a LLaDA checkpoint with lm_eval, as the model `llada_dist`.

Every flag of lm_eval's command line works (`--help`); `--model_args` takes the names of `ModelArgs` in
llada/inference/. `--preset NAME` fills in a published setting of eval/presets.yaml and prints the scores to
expect. Requests are sharded over the ranks; with `--output_path` a killed run continues. `--compare FOLDER
FOLDER` sets two outputs beside each other, question by question. Everything else: docs/evaluation.md.

Run:
    python eval/eval_llada.py --tasks gsm8k --model llada_dist --num_fewshot 5 --apply_chat_template \\
        --model_args model_path='GSAI-ML/LLaDA-8B-Instruct',gen_length=256,steps=256,block_length=8
    python eval/eval_llada.py --preset gsm8k-instruct --model_args model_path=CHECKPOINT \\
        --output_path runs/eval
    accelerate launch eval/eval_llada.py --tasks gsm8k_local --include_path eval/tasks \\
        --model_args model_path=CHECKPOINT,gen_length=256 --output_path runs/eval
    python eval/eval_llada.py --config configs/debug/eval_llada.yaml
    python eval/eval_llada.py --compare runs/eval-sft runs/eval-grpo
"""

import argparse
import difflib
import functools
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import yaml
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from llada.flags.parser import run_main
from llada.flags.yaml_files import read_yaml
from llada.inference.eval_args import parse_model_args

MODEL = "llada_dist"  # registered by the import of llada.inference.lm_eval_model
PRESETS = Path(__file__).with_name("presets.yaml")
TASKS = Path(__file__).with_name("tasks")
LM_EVAL_TASKS = Path(lm_eval.__file__).with_name("tasks")
TASK_FILES = (".yaml", ".py", "")
NOT_FOUND = "Tasks not found: "  # how lm_eval's own error starts
log = logging.getLogger("lm_eval.llada")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """lm_eval's arguments, with those of --config and --preset filled in where the command line has none."""
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--preset", help="a published setting of eval/presets.yaml")
    ours.add_argument("--compare", nargs=2, metavar=("FOLDER", "FOLDER"), help="two outputs, by question")
    known, rest = ours.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):  # lm_eval's help knows only its own flags
        print(ours.format_help())
    if known.compare is not None:
        return known
    # what lm_eval's own entry point does with sys.argv
    arguments = HarnessCLI()._parser.parse_args(["run", *rest])
    if arguments.config is not None:
        _fill(arguments, read_yaml(arguments.config), f"--config {arguments.config}")
        arguments.config = None
    if known.preset is not None:
        _fill(arguments, read_preset(known.preset), f"--preset {known.preset}")
    if arguments.model in (None, MODEL):
        _prepare_model_args(arguments)
    if arguments.include_path is None and any(
        (TASKS / f"{task}.yaml").is_file() for task in _task_names(arguments)
    ):
        arguments.include_path = str(TASKS)
    _check_tasks(arguments)
    arguments.compare = None
    return arguments


def _task_names(arguments: argparse.Namespace) -> list[str]:
    entries = [arguments.tasks] if isinstance(arguments.tasks, str) else arguments.tasks or []
    return [name for entry in entries for name in entry.split(",")]


def _check_tasks(arguments: argparse.Namespace) -> None:
    """ValueError for a task whose name is no word of any task file."""
    # lm_eval itself parses fourteen thousand files before it says so, and needs torch for it
    files, words = _task_words(arguments.include_path)
    for name in _task_names(arguments):
        if name not in words and "*" not in name and not Path(name).exists():
            raise ValueError(_about_unknown_task(name, files))


@functools.cache
def _task_words(include_path: str | None) -> tuple[list[Path], set[str]]:
    folders = [LM_EVAL_TASKS, *filter(None, [include_path])]
    files = [Path(top, name) for folder in folders for top, _, names in os.walk(folder) for name in names]
    files = [path for path in files if path.suffix in TASK_FILES]
    words = {path.stem for path in files}
    for path in files:
        words.update(re.findall(r"[\w.+-]+", path.read_text(encoding="utf-8", errors="replace")))
    return files, words


def _about_unknown_task(name: str, files: Iterable[Path]) -> str:
    known = {path.stem for path in (*files, *TASKS.glob("*.yaml"))}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"--tasks {name}: unknown; {hint}all names: lm-eval ls tasks"


def _fill(arguments: argparse.Namespace, values: dict[str, Any], where: str) -> None:
    """Sets what the command line left open; model_args are merged name by name."""
    names = {*vars(arguments), *EvaluatorConfig.__slots__}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{where}: unknown key {name!r}; {_did_you_mean(name, names)}")
        if name == "model_args":
            arguments.model_args = {**value, **(arguments.model_args or {})}
        elif getattr(arguments, name, None) is None:
            setattr(arguments, name, value)


def read_preset(name: str) -> dict[str, Any]:
    """lm_eval's arguments of a published setting, or ValueError; says which scores to expect."""
    presets = yaml.safe_load(PRESETS.read_text(encoding="utf-8"))
    del presets["_shared"]
    if name not in presets:
        raise ValueError(f"--preset {name}: unknown; {_did_you_mean(name, presets)}")
    preset = presets[name]
    scores = {"published": preset["published"], "reached by others with these prompts": preset["reachable"]}
    told = [f"{what}: {score or 'no score known'}" for what, score in scores.items()]
    log.warning("--preset %s, for %s; %s", name, preset["for"], "; ".join(told))
    return preset["arguments"]


def _prepare_model_args(arguments: argparse.Namespace) -> None:
    arguments.model = MODEL
    model_args = dict(arguments.model_args or {})
    # lm_eval names the results folder after `pretrained`
    path = model_args.pop("model_path", model_args.pop("pretrained", None))
    if path is None:
        raise ValueError("--model_args model_path=FOLDER is missing")
    if arguments.output_path is not None:
        model_args.setdefault("record_dir", str(Path(arguments.output_path) / "requests"))
    arguments.model_args = {"pretrained": str(path), **model_args}
    parse_model_args(arguments.model_args)  # a misspelt name is refused before the tasks are read
    if getattr(arguments, "batch_size", None) is None:
        arguments.batch_size = "auto"  # lm_eval's default of 1 would override the model's


if __name__ == "__main__":
    run_main(lambda: parse_arguments(sys.argv[1:]))  # before the slow imports below

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from llada.inference.eval_compare import table
from llada.inference.eval_worker import EvalRank
from llada.inference.lm_eval_model import LLaDADist, with_flags
from llada.run import end_run


def _only_local_tasks(arguments: argparse.Namespace) -> AbstractContextManager:
    """Spares lm_eval its own ten thousand task files when --include_path has all that are asked for."""
    if arguments.include_path is None or not arguments.tasks:
        return nullcontext()
    local = TaskManager(include_path=arguments.include_path, include_defaults=False)
    if not all(local.match_tasks([task]) for task in _task_names(arguments)):
        return nullcontext()
    # its command line has no flag for this
    return mock.patch.object(
        lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False)
    )


def main(argv: list[str] | None = None) -> None:
    """Run lm_eval with `llada_dist` as its default model."""
    setup_logging()
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    if arguments.compare is not None:
        print(table(*arguments.compare))
        return
    if arguments.include_path is not None:
        sys.path.append(str(Path(arguments.include_path).resolve()))  # tasks' files may import each other
    if rank != 0 and arguments.model == MODEL:
        EvalRank(parse_model_args(with_flags(arguments.model_args, vars(arguments)))).serve()
    else:
        with _only_local_tasks(arguments):
            try:
                HarnessCLI().execute(arguments)
            except ValueError as error:
                if not str(error).startswith(NOT_FOUND):
                    raise
                name = str(error).removeprefix(NOT_FOUND)
                raise ValueError(_about_unknown_task(name, _task_words(arguments.include_path)[0])) from error
        notes = {"command.txt": "command: " + shlex.join(["python", "eval/eval_llada.py", *argv])}
        if LLaDADist.latest is not None:
            LLaDADist.latest.worker.dismiss()
            notes["likelihoods.md"] = LLaDADist.latest.describe_errors()
        for name, text in notes.items():
            if text:
                print(text)
            if text and arguments.output_path is not None:
                text = text.removeprefix("command: ") + "\n"
                Path(arguments.output_path, name).write_text(text, encoding="utf-8")
    end_run()


if __name__ == "__main__":
    run_main(main)
