"""Older spellings of flags: of the systems we succeed, of libraries, and of this suite.

They are no fields. Where a script has a flag of such a name itself, that one is meant.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# Of several new names the first that the script has.
# fmt: off
RENAMED = {
    "lr": "learning_rate", "l2": "weight_decay", "lora_rank": "lora_r",
    "target_modules": "lora_target_modules", "seq_len": "max_length", "max_len": "max_length",
    "max_train_steps": "max_steps", "epochs": "num_train_epochs", "max_epochs": "num_train_epochs",
    "train_batch_size": "batch_size", "train_batch": "batch_size", "local_batch": "micro_batch_size",
    "micro_batch": "micro_batch_size", "micro_train_batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size", "torch_dtype": "dtype",
    "grad_clip_norm": "max_grad_norm", "max_norm": "max_grad_norm", "lr_scheduler": "lr_scheduler_type",
    "lr_warmup_ratio": "warmup_ratio", "logging_steps": "log_interval", "eval_steps": "eval_interval",
    "validation_interval": "eval_interval", "save_steps": "save_interval", "max_ckpt_num": "save_total_limit",
    "checkpoint_interval": "save_interval", "load_ckpt": "resume_from_checkpoint",
    "wandb_run_name": "run_name", "save_path": "output_dir", "output_file": "output_dir",
    "train_data": "train_data_path", "sft_data": "train_data_path", "data_path": "train_data_path",
    "dataset": "train_data_path", "train_dataset_path": "train_data_path",
    "val_data": "eval_data_path", "eval_dataset": "eval_data_path", "eval_dataset_path": "eval_data_path",
    "pretrained_model": "model_name_or_path", "pretrain": "model_name_or_path",
    "model_path": "model_name_or_path", "drafter": "model_name_or_path",
    "model_name": "model_name_or_path tokenizer base_model", "model_name_or_path": "model_path base_model",
    "sft_adapter": "sft_adapter_path", "lora_weights": "adapter_path",
    "ref_pretrain": "ref_model_name_or_path", "ref_model": "ref_model_name_or_path",
    "n_mc": "n_mc_samples", "num_mc": "n_mc_samples", "nll_loss_coef": "rpo_alpha",
    "beta": "kto_beta", "desirable_weight": "kto_lambda_D", "undesirable_weight": "kto_lambda_U",
    "train_data_path": "train_dataset_path", "eval_data_path": "eval_dataset_path",
    "group_size": "num_generations", "num_samples_per_prompt": "num_generations", "gen_steps": "steps",
    "is_instruct": "apply_chat_template", "gamma": "window_length draft_length", "cfg": "cfg_scale",
    "input_key": "prompt_key", "completion_key": "answer_key", "response_key": "answer_key",
    "dataset_path": "prompts_file", "input_file": "input", "output_path": "output_dir",
}
# fmt: on


def is_older(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether a name that is no field is an older spelling that a script with these fields takes."""
    return any(new in fields for new in RENAMED.get(name, "").split())


def todays_words(words: Sequence[str], fields: Mapping[str, Any]) -> list[str]:
    """The command line with older spellings replaced."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        older = name.removeprefix("--")
        if word.startswith("--") and older not in fields and is_older(older, fields):
            name = "--" + next(new for new in RENAMED[older].split() if new in fields)
        found.append(name + equals + value)
    return found
