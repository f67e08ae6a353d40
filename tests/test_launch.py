"""The shell launchers: the commands they build, and real runs that are stopped, resumed, and spread."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, load_script
from llada.flags.parser import parse
from llada.training.metrics import read_metrics

LAUNCH = ROOT / "scripts/launch"
# What a launcher may use besides bash itself.
TOOLS = ("bash", "dirname", "xargs", "printf", "grep", "rm")
TORCHRUN_FLAGS = {
    "--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint",
    "--rdzv-conf", "--signals-to-handle", "--shutdown-timeout", "--max-restarts",
}  # fmt: skip


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder that is all of PATH: no Python, no torchrun, no nvidia-smi."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    return folder


def add_tool(tools: Path, name: str, text: str) -> None:
    (tools / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
    (tools / name).chmod(0o755)


def start(tools: Path, launcher: str | Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / launcher), *flags],
        env={"PATH": str(tools), **variables}, capture_output=True, text=True, check=False, cwd=tools,
    )  # fmt: skip


def dry_run(tools: Path, launcher: str, *flags: str, **variables: str) -> tuple[list[str], str, list[str]]:
    """(torchrun's flags, script, the script's flags) of the one line that DRY_RUN=1 prints."""
    done = start(tools, launcher, *flags, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("[DRY_RUN] ")
    program, *words = shlex.split(line.removeprefix("[DRY_RUN] "))
    assert Path(program).name == "torchrun"
    end = next(i for i, word in enumerate(words) if not word.startswith("--"))
    assert {word.split("=")[0] for word in words[:end]} <= TORCHRUN_FLAGS
    return words[:end], words[end], words[end + 1 :]


pytestmark = pytest.mark.usefixtures("paths_unchecked")


def config_of(script: str, flags: list[str]):
    """The script's Config; a flag that it does not know ends the test."""
    return parse(load_script(Path(script).relative_to(ROOT).as_posix()).Config, flags)


def test_post_training_launchers(tools):
    _, script, flags = dry_run(tools, "grpo.sh", GRPO_REWARDS="math format", GRPO_ADAPTER="an adapter")
    config = config_of(script, flags)
    assert config.reward_funcs == ["math", "format"] and config.sft_adapter_path == "an adapter"
    assert (config.num_generations, config.batch_size, config.gen_length) == (4, 32, 256)
    assert config.use_lora and config.lora_target_modules == ["q_proj", "v_proj", "k_proj", "attn_out"]
    _, script, flags = dry_run(tools, "dpo.sh", "--beta", "0.5", DPO_LORA_TARGETS="", DPO_DATA="a file.jsonl")
    config = config_of(script, flags)
    assert config.train_data_path == ["a file.jsonl"] and config.beta == 0.5 and not config.use_lora


def test_the_judge_is_where_grpo_looks_for_it(tools):
    server = start(tools, "server_ollama.sh", DRY_RUN="1").stdout
    assert "OLLAMA_HOST=127.0.0.1:11435" in server and server.endswith("ollama serve\n")
    model = start(tools, "judge_ollama.sh", DRY_RUN="1", JUDGE_MODEL="tiny model").stdout
    assert model == "[DRY_RUN] OLLAMA_HOST=127.0.0.1:11435 ollama run tiny\\ model\n"
    default = config_of(str(ROOT / "rlhf/train_grpo.py"), ["--model_name_or_path", "m", "--output_dir", "o"])
    assert default.judge_base_url == "http://127.0.0.1:11435/v1" and default.reward_funcs == ["judge"]
    add_tool(tools, "ollama", 'echo "$OLLAMA_CONTEXT_LENGTH $*"')
    assert start(tools, "server_ollama.sh").stdout == "40960 serve\n"


def test_pretraining_defaults_and_variables(tools):
    torchrun, script, flags = dry_run(tools, "pretrain.sh")
    assert torchrun == [
        "--standalone", "--nproc-per-node=1", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP",
        "--shutdown-timeout=300", "--max-restarts=3",
    ]  # fmt: skip
    config = config_of(script, flags)
    assert config.output_dir == "checkpoints/pretrain_run"
    assert (config.batch_size, config.micro_batch_size, config.learning_rate) == (64, 8, 1e-5)
    assert config.model_name_or_path == "GSAI-ML/LLaDA-8B-Base"

    torchrun, script, flags = dry_run(
        tools, "pretrain.sh", "--run_name", "it's a run",
        PRETRAIN_OUTPUT="my runs/8k", PRETRAIN_MODEL="base model", PRETRAIN_DATA="corpus $HOME/train",
        PRETRAIN_ARGS="--eval_data_path 'held out' --lr 3e-4 --max_steps 500", NUM_GPUS="4", MAX_RESTARTS="0",
    )  # fmt: skip
    assert {"--nproc-per-node=4", "--max-restarts=0"} <= set(torchrun)
    config = config_of(script, flags)
    assert (config.output_dir, config.model_name_or_path) == ("my runs/8k", "base model")
    assert (config.train_data_path, config.eval_data_path) == ("corpus $HOME/train", "held out")
    assert (config.learning_rate, config.max_steps, config.run_name) == (3e-4, 500, "it's a run")

    _, script, flags = dry_run(tools, "pretrain.sh", PRETRAIN_CONFIG="1b", PRETRAIN_TOKENIZER="a tokenizer")
    config = config_of(script, flags)
    assert (config.config_name, config.tokenizer_name, config.model_name_or_path) == (
        "1b",
        "a tokenizer",
        None,
    )


def test_sft_defaults_and_variables(tools):
    config = config_of(*dry_run(tools, "sft.sh")[1:])
    assert (config.num_train_epochs, config.learning_rate) == (3, 1e-5)
    assert (config.batch_size, config.micro_batch_size) == (128, 8)
    assert (config.use_lora, config.lora_target_modules) == (True, ["q_proj", "v_proj", "k_proj", "attn_out"])

    config = config_of(
        *dry_run(
            tools, "sft.sh", SFT_MODEL="a model", SFT_DATA="some data", SFT_OUTPUT="an output",
            SFT_EPOCHS="2", SFT_LR="2e-4", SFT_LOCAL_BATCH="2", SFT_GLOBAL_BATCH="16",
            SFT_LORA_TARGETS="q_proj ff_out", SFT_ARGS="--turns last",
        )[1:]
    )  # fmt: skip
    assert (config.model_name_or_path, config.train_data_path) == ("a model", ["some data"])
    assert (config.output_dir, config.num_train_epochs, config.learning_rate) == ("an output", 2, 2e-4)
    assert (config.micro_batch_size, config.batch_size, config.turns) == (2, 16, "last")
    assert config.lora_target_modules == ["q_proj", "ff_out"]
    assert not config_of(*dry_run(tools, "sft.sh", SFT_LORA_TARGETS="")[1:]).use_lora
    adapter = config_of(*dry_run(tools, "sft.sh", SFT_LORA_WEIGHTS="runs/an adapter")[1:])
    assert adapter.model_name_or_path == "runs/an adapter"


def test_generation_defaults_and_variables(tools):
    config = config_of(*dry_run(tools, "generate.sh")[1:])
    assert (config.prompt, config.gen_length, config.temperature) == ("Hello", 64, 0.7)
    torchrun, script, flags = dry_run(
        tools, "generate.sh", GEN_MODEL="m", GEN_PROMPT="What's 2 + 2? \"Think\".", GEN_MAX_TOKENS="32",
        GEN_ARGS="temperature=0,steps=16 --is_instruct", NUM_GPUS="8",
    )  # fmt: skip
    assert "--nproc-per-node=1" in torchrun
    config = config_of(script, flags)
    assert (config.prompt, config.gen_length) == ('What\'s 2 + 2? "Think".', 32)
    assert (config.temperature, config.steps, config.is_instruct) == (0, 16, True)
    torchrun, script, flags = dry_run(tools, "generate.sh", GEN_PROMPTS_FILE="my prompts.jsonl", NUM_GPUS="8")
    assert "--nproc-per-node=8" in torchrun
    assert config_of(script, flags).prompts_file == "my prompts.jsonl"


def test_evaluation_defaults_and_variables(tools):
    eval_llada = load_script("eval/eval_llada.py")
    arguments = eval_llada.parse_arguments(dry_run(tools, "evaluate.sh")[2])
    assert (arguments.tasks, arguments.num_fewshot) == (["gsm8k"], 5)
    assert arguments.model_args["pretrained"] == "checkpoints/sft_newdataset"
    assert (arguments.model_args["num_masks"], arguments.model_args["steps"]) == (64, 256)
    *_, flags = dry_run(
        tools, "evaluate.sh", "--limit", "5", MODEL_PATH="runs/my model", TASKS="mmlu,gsm8k", FEWSHOT="0",
        BATCH_SIZE="4", EXTRA_ARGS="cfg=1.0", EVAL_OUTPUT="my results",
    )  # fmt: skip
    arguments = eval_llada.parse_arguments(flags)
    assert (arguments.model_args["pretrained"], arguments.model_args["cfg"]) == ("runs/my model", 1.0)
    assert (arguments.num_fewshot, arguments.limit, arguments.output_path) == (0, 5, "my results")


def test_processes_are_the_visible_gpus(tools):
    add_tool(tools, "nvidia-smi", 'for i in 0 1 2 3; do echo "GPU $i: H100 (UUID: GPU-$i)"; done')
    assert "--nproc-per-node=4" in dry_run(tools, "sft.sh")[0]
    assert "--nproc-per-node=2" in dry_run(tools, "sft.sh", CUDA_VISIBLE_DEVICES="1,3")[0]
    assert "--nproc-per-node=3" in dry_run(tools, "sft.sh", NUM_GPUS="2", NPROC_PER_NODE="3")[0]
    add_tool(tools, "nvidia-smi", "echo 'no driver' >&2; exit 9")
    assert "--nproc-per-node=1" in dry_run(tools, "sft.sh")[0]


def test_many_nodes(tools):
    nodes = {"NNODES": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29501"}
    torchrun, *_ = dry_run(tools, "pretrain.sh", NODE_RANK="0", NUM_GPUS="8", **nodes)
    assert torchrun[:6] == [
        "--nnodes=4", "--rdzv-backend=c10d", "--rdzv-id=llada", "--rdzv-endpoint=node0:29501",
        "--rdzv-conf=is_host=true", "--nproc-per-node=8",
    ]  # fmt: skip
    assert "--rdzv-conf=is_host=false" in dry_run(tools, "pretrain.sh", NODE_RANK="3", **nodes)[0]
    elastic = dry_run(tools, "pretrain.sh", NNODES="2:8", RDZV_ENDPOINT="a:1", RDZV_ID="job 7")[0]
    assert elastic[:4] == ["--nnodes=2:8", "--rdzv-backend=c10d", "--rdzv-id=job 7", "--rdzv-endpoint=a:1"]


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ([], {"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        (["--output_dir", "x"], {}, "the folder comes from PRETRAIN_OUTPUT, SFT_OUTPUT"),
        ([], {"SFT_ARGS": "--run_name 'half a quote"}, "unmatched single quote"),
    ],
)
def test_bad_variables(flags, variables, message, tools):
    done = start(tools, "sft.sh", *flags, DRY_RUN="1", **variables)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stdout == ""


def slurm(
    tools: Path, job: Path, *, leaves: str, status: int
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The sbatch file with SLURM's commands replaced; the launcher leaves files and exits with `status`."""
    log = job / "log"
    log.write_text("")
    add_tool(tools, "scontrol", f'[[ $1 == show ]] && echo node7 || echo "$@" >>"{log}"')
    add_tool(
        tools,
        "srun",
        f'echo "srun $MASTER_ADDR $NNODES" >>"{log}"; while [[ $1 == -* ]]; do shift; done; "$@"',
    )
    launcher = job / "my launcher.sh"
    launcher.write_text(
        f'[[ -z $PRINT_OUTPUT_DIR ]] || {{ echo "{job}/out"; exit; }}\n'
        f'echo "rank $NODE_RANK: $*" >>"{log}"\n'
        f'for marker in {leaves}; do echo >"{job}/out/$marker"; done\nexit {status}\n'
    )
    variables = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    done = start(tools, "slurm.sbatch", str(launcher), "--run_name", "a b", SLURM_NODEID="1", **variables)
    return done, log.read_text().splitlines()


def test_slurm_requeues_by_the_markers(tools, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    started = ["srun node7 2", "rank 1: --run_name a b"]
    # torchrun exits with 1 after a signal; PREEMPTED says that the state was saved
    done, log = slurm(tools, tmp_path, leaves="PREEMPTED", status=1)
    assert (done.returncode, log) == (0, [*started, "requeue 12345"])
    # the marker of an earlier run is no reason to queue again
    done, log = slurm(tools, tmp_path, leaves="", status=3)
    assert (done.returncode, log) == (3, started)
    assert "neither DONE nor PREEMPTED" in done.stderr
    done, log = slurm(tools, tmp_path, leaves="DONE", status=0)
    assert (done.returncode, log) == (0, started)
    # a job that is requeued after its end does nothing
    done, log = slurm(tools, tmp_path, leaves="", status=1)
    assert (done.returncode, log) == (0, [])


def environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def sft(model_dir: Path, output: Path, args: str, **variables: str) -> subprocess.Popen:
    """sft.sh on the tiny model, started."""
    variables = {
        "SFT_MODEL": str(model_dir), "SFT_OUTPUT": str(output),
        "SFT_DATA": str(ROOT / "data/samples/sft.jsonl"),
        "SFT_GLOBAL_BATCH": "2", "SFT_LOCAL_BATCH": "1", "SFT_LORA_TARGETS": "q_proj ff_out",
        "SFT_ARGS": f"--max_length 256 --lora_r 2 --log_interval 1 --num_workers 0 {args}",
        "MAX_RESTARTS": "0", **variables,
    }  # fmt: skip
    command = ["bash", str(LAUNCH / "sft.sh")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(**variables), **pipes)


def test_sigterm_saves_and_the_same_command_continues(model_dir, tmp_path):
    output, args = tmp_path / "a run", "--max_steps 50 --save_interval 1000"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # two nodes of one process each; SLURM signals them all
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC_PER_NODE": "1"}
    both = [sft(model_dir, output, args, NODE_RANK=str(i), **nodes) for i in range(2)]
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        ended = [process for process in both if process.poll() is not None]
        assert not ended, ended[0].communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in both:
        process.send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=60)[0] for process in both]
    assert "the same command continues" in "".join(texts), "\n".join(text[-3000:] for text in texts)
    assert (output / "PREEMPTED").exists()
    assert not (output / "DONE").exists()
    state = output / (output / "latest").read_text()
    stopped_at = json.loads((state / "meta.json").read_text())["step"]
    assert 0 < stopped_at < 50
    assert not list(output.glob("*.tmp"))

    # one node, one process: the same global batches, in two micro-batches each
    resumed, whole = (sft(model_dir, path, args, NUM_GPUS="1") for path in (output, tmp_path / "whole"))
    for process in (resumed, whole):
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text[-3000:]
    assert (output / "DONE").exists()
    assert not (output / "PREEMPTED").exists()
    curves = [
        [(entry["step"], entry["loss"]) for entry in read_metrics(path / "metrics.jsonl") if "loss" in entry]
        for path in (output, tmp_path / "whole")
    ]
    assert [step for step, _ in curves[0]] == list(range(1, 51))
    assert np.array(curves[0]) == pytest.approx(np.array(curves[1]), rel=1e-6)


def commands_of(tools: Path, launcher: str, *flags: str, **variables: str) -> list[tuple[str, list[str]]]:
    """[(script, its flags)] of a launcher that runs several commands."""
    done = start(tools, launcher, *flags, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.splitlines():
        _, *words = shlex.split(line.removeprefix("[DRY_RUN] "))
        at = next(i for i, word in enumerate(words) if not word.startswith("--"))
        found.append((words[at], words[at + 1 :]))
    return found


def test_alignment_defaults_and_variables(tools):
    prepare, train, answer = commands_of(tools, "run_alignment_fine_tuning.sh")
    config = config_of(*prepare)
    assert (config.input, config.output_dir) == (
        ["sft_data/llama_logits.json"],
        "sft_data/processed_alignment.pt",
    )
    assert (config.tokenizer_name, config.max_length) == ("GSAI-ML/LLaDA-8B-Instruct", 256)
    config = config_of(*train)
    assert (config.positions, config.loss_type, config.output_dir) == ("answer", "kl", "alignment_output")
    assert (config.batch_size, config.learning_rate, config.num_train_epochs) == (2, 2.5e-5, 3)
    assert (config.weight_decay, config.warmup_steps, config.log_interval) == (0.1, 50, 100)
    assert config_of(*answer).model_name_or_path == "alignment_output/final"

    variables = {"MODEL_NAME": "a model", "INPUT_FILE": "some logits.json", "PROCESSED_FILE": "rows",
                 "OUTPUT_DIR": "out", "TEMPERATURE": "2.0", "PREPROCESS_ARGS": "--top_k 5"}  # fmt: skip
    prepare, train, answer = commands_of(tools, "run_alignment_fine_tuning.sh", "--use_lora", **variables)
    config = config_of(*prepare)
    assert (config.input, config.output_dir, config.top_k) == (["some logits.json"], "rows", 5)
    config = config_of(*train)
    assert (config.model_name_or_path, config.temperature, config.use_lora) == ("a model", 2.0, True)
    assert config_of(*answer).model_name_or_path == "out/final"


def test_fine_tuning_with_and_without_logits(tools):
    prepare, train, _ = commands_of(
        tools, "run_fine_tuning.sh", LOSS_TYPE="hybrid", ALPHA="0.2", BETA="0.8", LOGITS_FILE="l.json"
    )
    assert config_of(*prepare).input == ["l.json"] and config_of(*prepare).max_length == 4096
    config = config_of(*train)
    assert (config.loss_type, config.alpha, config.beta, config.positions) == ("hybrid", 0.2, 0.8, "masked")
    assert (config.train_data_path, config.output_dir) == ("sft_data/processed_logits.pt", "sft_output")
    prepare, train, _ = commands_of(tools, "run_fine_tuning.sh", USE_LOGITS="false", INPUT_FILE="c.json")
    assert prepare[0].endswith("prepare_sft.py") and config_of(*prepare).input == ["c.json"]
    assert config_of(*train).train_data_path == "sft_data/processed_conversations.pt/train"


def test_several_steps_stop_at_the_first_failure(tools):
    add_tool(tools, "torchrun", 'echo "$@" >> calls; [[ $* != *train_kl.py* ]]')
    done = start(tools, "run_alignment_fine_tuning.sh")
    assert done.returncode == 1
    calls = (tools / "calls").read_text().splitlines()
    assert [call.split("alignment/")[1].split()[0] for call in calls] == [
        "precompute_teacher.py",
        "train_kl.py",
    ]


def test_setup_checks_python_first_and_starts_half_made_environments_anew(tools, tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("a package\n")
    for name in ("cmp", "mkdir", "cp", "touch", "cat", "chmod"):
        (tools / name).symlink_to(shutil.which(name))
    venv = tmp_path / ".venv"

    def setup(python):
        add_tool(tools, "python3", python)
        command = ["bash", str(tmp_path / "scripts/setup.sh")]
        return subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, check=False)

    done = setup("[[ $1 == -V ]] && echo Python 3.10.2 || exit 1")
    assert (done.returncode, venv.exists()) == (2, False)
    assert done.stderr.startswith("setup.sh: needs Python 3.11 or newer, python3 is Python 3.10.2")
    assert len(done.stderr.splitlines()) == 1
    # makes an environment whose pip fails as long as there is no network
    new = (
        f"[[ $1 == -c ]] && exit; echo $* >>{tmp_path}/made; mkdir -p {venv}/bin; touch {venv}/bin/activate\n"
        f"echo '#!/bin/bash\n[[ -e {tmp_path}/network ]]' >{venv}/bin/python; chmod +x {venv}/bin/python"
    )
    assert setup(new).returncode != 0 and not (venv / "installed").exists()
    (tmp_path / "network").touch()
    assert setup(new).returncode == 0 and setup(new).returncode == 0
    assert (tmp_path / "made").read_text() == 2 * "-m venv --clear .venv\n"
