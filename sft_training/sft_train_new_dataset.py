"""sft_training/train_sft.py under the name, and with the defaults, of LLada-Reasoning: LoRA on, 8,192 tokens.

Run:
    torchrun --nproc_per_node 8 sft_training/sft_train_new_dataset.py --output-dir ./checkpoints/sft_run \\
        --pretrained-model ./pretrain_merged_model

Reads the splits train and test of ./filtered_conversational_dataset/. W&B only with --use-wandb.
"""

from pathlib import Path

from llada.flags.llada_reasoning import todays_arguments
from llada.flags.parser import run_as, run_main

DEFAULTS = {
    "model_name_or_path": "./merged_model_good_base",
    "output_dir": "./checkpoints/checkpoints_llada_nemotron_pretrain",
    "batch_size": "64",
    "micro_batch_size": "8",
    "max_length": "8192",
    "epochs": "2",
    "learning_rate": "2e-5",
    "min_learning_rate": "2e-6",
    "warmup_ratio": "0.1",
    "weight_decay": "0.1",
    "dtype": "bfloat16",
    "activation_checkpointing": "full",
    "eval_interval": "100",
    "eval_limit": "600",
    "save_interval": "100",
    "use_lora": "true",
    "lora_dropout": "0.05",
}


def main(argv: list[str] | None = None) -> None:
    """Runs it with these defaults in front of the given flags."""
    first = ["--lora_target_modules", "q_proj", "v_proj", "k_proj", "o_proj"]
    words = todays_arguments(argv)
    data = next((words[i + 1] for i, w in enumerate(words[:-1]) if w in ("--sft-data", "--sft_data")), None)
    data = data or "./filtered_conversational_dataset"
    first += ["--train_data_path", data, "--eval_data_path", f"{data.rstrip('/')}/test"]
    run_as(Path(__file__).with_name("train_sft.py"), DEFAULTS, [*first, *words])


if __name__ == "__main__":
    run_main(main)
