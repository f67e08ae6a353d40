"""pretraining/pretrain.py under the name, and with the defaults, of LLada-Reasoning: LoRA on, 8,192 tokens.

Run:
    torchrun --nproc_per_node 4 pretraining/pretrain_llada_extended.py --output-dir ./checkpoints/pretrain_run

Reads ./data_pretrain_stratified/{train,val}_new.txt and continues ./llada_local. W&B only with --use-wandb.
"""

from pathlib import Path

from llada.flags.llada_reasoning import todays_arguments
from llada.flags.parser import run_as, run_main

DEFAULTS = {
    "train_data_path": "./data_pretrain_stratified/train_new.txt",
    "eval_data_path": "./data_pretrain_stratified/val_new.txt",
    "output_dir": "./checkpoints/checkpoints_llada_pretrain_8k",
    "model_name_or_path": "./llada_local",
    "batch_size": "64",
    "micro_batch_size": "8",
    "max_length": "8192",
    "max_steps": "500",
    "learning_rate": "1e-5",
    "min_learning_rate": "1e-6",
    "lr_scheduler_type": "linear",
    "warmup_steps": "20",
    "weight_decay": "0",
    "dtype": "bfloat16",
    "activation_checkpointing": "full",
    "eval_interval": "32",
    "eval_limit": "600",
    "save_interval": "32",
    "use_lora": "true",
    "lora_dropout": "0.05",
}


def main(argv: list[str] | None = None) -> None:
    """Runs it with these defaults in front of the given flags."""
    targets = ["--lora_target_modules", "q_proj", "v_proj", "k_proj", "o_proj"]
    run_as(Path(__file__).with_name("pretrain.py"), DEFAULTS, [*targets, *todays_arguments(argv)])


if __name__ == "__main__":
    run_main(main)
