"""Older spellings of flags: of the systems we succeed, of libraries, and of this suite.

They are no fields. Where a script has a flag of such a name itself, that one is meant.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llada.flags.declaration import tell

# Of several new names the first that the script has.
# fmt: off
RENAMED = {
    "lr": "learning_rate", "l2": "weight_decay", "lora_rank": "lora_r", "eps_adam": "adam_epsilon",
    "target_modules": "lora_target_modules", "seq_len": "max_length", "max_len": "max_length",
    "max_train_steps": "max_steps", "epochs": "num_train_epochs", "max_epochs": "num_train_epochs",
    "train_batch_size": "batch_size", "train_batch": "batch_size", "local_batch": "micro_batch_size",
    "micro_batch": "micro_batch_size", "micro_train_batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size", "torch_dtype": "dtype",
    "dataloader_num_workers": "num_workers",
    "grad_clip_norm": "max_grad_norm", "max_norm": "max_grad_norm", "lr_scheduler": "lr_scheduler_type",
    "lr_warmup_ratio": "warmup_ratio", "logging_steps": "log_interval", "eval_steps": "eval_interval",
    "validation_interval": "eval_interval", "save_steps": "save_interval", "max_ckpt_num": "save_total_limit",
    "checkpoint_interval": "save_interval", "load_ckpt": "resume_from_checkpoint",
    "wandb_run_name": "run_name", "save_path": "output_dir", "output_file": "output_path output_dir",
    "train_data": "train_data_path", "sft_data": "train_data_path", "data_path": "train_data_path",
    "dataset": "train_data_path input", "train_dataset_path": "train_data_path",
    "val_data": "eval_data_path", "eval_dataset": "eval_data_path", "eval_dataset_path": "eval_data_path",
    "pretrained_model": "model_name_or_path", "pretrain": "model_name_or_path",
    "model_path": "model_name_or_path", "drafter": "model_name_or_path", "base_model": "model_name_or_path",
    "model_name": "model_name_or_path base_model tokenizer_name", "tokenizer": "tokenizer_name",
    "pretrained": "model_name_or_path", "sft_adapter": "sft_adapter_path", "lora_weights": "adapter_path",
    "ref_pretrain": "ref_model_name_or_path", "ref_model": "ref_model_name_or_path",
    "n_mc_samples": "num_masks", "n_mc": "num_masks", "num_mc": "num_masks", "mc_num": "num_masks",
    "l_sampling": "size_law", "nll_loss_coef": "rpo_alpha",
    "kto_beta": "beta", "kto_lambda_D": "desirable_weight", "kto_lambda_U": "undesirable_weight",
    "group_size": "num_generations", "num_samples_per_prompt": "num_generations", "gen_steps": "steps",
    "is_instruct": "apply_chat_template", "gamma": "window_length draft_length", "cfg": "cfg_scale",
    "input_key": "prompt_key", "completion_key": "answer_key", "response_key": "answer_key",
    "dataset_path": "prompts_file", "input_file": "input", "output_path": "output_dir",
}
# fmt: on

_NO_EFFECT = {
    "flash_attn": "PyTorch's own attention uses flash kernels by itself",
    "gradient_checkpointing_use_reentrant": "it never is",
    "ckpt_path": "states are saved in --output_dir",
    "save_hf_ckpt": "final/ always is a plain checkpoint",
    "disable_ds_ckpt": "this suite saves and resumes by itself",
    "use_ds_universal_ckpt": "states resume on any number of ranks",
    "max_ckpt_mem": "see --save_total_limit",
    "local_rank": "torchrun says it in the environment",
    "ref_offload": "see --cpu_offload",
    "input_template": "prompts go through the chat template",
    "dataset_probs": "files are read one after the other",
    "use_ms": "files are read from disk",
    "lora_dropout": "likelihoods are compared without dropout",
}
"""Accepted by scripts that train, with a line that says why nothing follows from it."""


def _if_on(*words: str) -> Callable[[list[str]], list[str]]:
    """These words, where the older flag stands alone or is true."""
    return lambda values: [] if values and values[0].lower() in ("false", "no", "0", "none", "") else [*words]


def _full_shard(is_wanted: bool) -> list[str]:
    return ["--shard", "full"] if is_wanted and int(os.environ.get("WORLD_SIZE", "1")) > 1 else []


def _adam_betas(values: list[str]) -> list[str]:
    if len(values) != 2:
        raise ValueError("give two numbers")
    return ["--adam_beta1", values[0], "--adam_beta2", values[1]]


def _environment(name: str) -> Callable[[list[str]], list[str]]:
    def keep(values: list[str]) -> list[str]:
        os.environ[name] = values[0]
        return []

    return keep


LIKELIHOODS = ("elbo", "trajectory", "diffu")  # what --estimator meant in GRPO alone

# Older flag -> a flag that the script must have for it, and the words of today from the older one's values.
_TRANSLATED: dict[str, tuple[str, Callable[[list[str]], list[str]]]] = {
    "bf16": ("dtype", _if_on("--dtype", "bfloat16")),
    "gradient_checkpointing": ("activation_checkpointing", _if_on("--activation_checkpointing", "full")),
    "adam_betas": ("adam_beta1", _adam_betas),
    "zero_stage": ("shard", lambda v: _full_shard(int(v[0]) >= 2)),
    "fsdp": ("shard", lambda v: ["--shard", "full" if "full_shard" in " ".join(v) else "none"]),
    "save_strategy": ("save_interval", lambda v: [] if v == ["steps"] else ["--save_interval", "0"]),
    # A key given here is not used, and so not in config.yaml: `wandb login` keeps it where nobody reads it.
    "use_wandb": ("report_to", _if_on("--report_to", "wandb")),
    "use_tensorboard": ("report_to", _if_on("--report_to", "tensorboard")),
    "wandb_org": ("report_to", _environment("WANDB_ENTITY")),
    "wandb_entity": ("report_to", _environment("WANDB_ENTITY")),
    "wandb_group": ("report_to", _environment("WANDB_RUN_GROUP")),
    "ipo": ("loss_type", _if_on("--loss_type", "ipo")),
    "estimator": ("mask_plan", lambda v: ["--likelihood" if v[0] in LIKELIHOODS else "--mask_plan", *v]),
    "k_vals": ("num_masks", lambda v: ["--num_masks", *" ".join(v).replace(",", " ").split()]),
    "disable_mask_verification": ("verify_masks", _if_on("--verify_masks=false")),
    "remasking_threshold": (
        "parallel_decoding",
        lambda v: ["--parallel_decoding", "threshold", "--threshold", *v],
    ),
}


def is_older(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a name that is no field is an older spelling that a script with these fields takes."""
    if name in _NO_EFFECT:
        return "learning_rate" in fields
    news = RENAMED.get(name, "").split() or _TRANSLATED.get(name, ())[:1]
    return any(new in fields for new in news)


def todays_words(words: Sequence[str], fields: Mapping[str, Any]) -> list[str]:
    """The command line with older spellings replaced; says on stderr which had no effect."""
    found: list[str] = []
    for item in _items(words):
        name, equals, value = item[0].removeprefix("--").partition("=")
        if not item[0].startswith("--") or name in fields or not is_older(name, fields):
            found += item
        elif name in RENAMED:
            new = next(new for new in RENAMED[name].split() if new in fields)
            found += [f"--{new}{equals}{value}", *item[1:]]
        elif name in _TRANSLATED:
            try:
                found += _TRANSLATED[name][1]([value] if equals else item[1:])
            except (IndexError, ValueError) as error:
                raise ValueError(f"--{name} {' '.join(item[1:])}: {error}") from error
        else:
            tell(f"--{name} has no effect: {_NO_EFFECT[name]}")
    return found


def _items(words: Iterable[str]) -> list[list[str]]:
    """Each flag with its values."""
    items: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not items:
            items.append([])
        items[-1].append(word)
    return items
