"""alignment/train_kl.py under the name, and with the defaults, of the system it succeeds.

Run:
    python alignment/finetune_llada_alignment.py --data_path sft_data/processed_alignment.pt \\
        --model_name GSAI-ML/LLaDA-8B-Instruct --output_dir alignment_output --batch_size 2 --epochs 3

KL on every token of the answer, masked or visible. The model is in OUTPUT_DIR/final.
"""

from pathlib import Path

from llada.flags.parser import run_as

DEFAULTS = {
    "data_path": "sft_data/processed_alignment.pt",
    "model_name": "GSAI-ML/LLaDA-8B-Instruct",
    "output_dir": "alignment_output",
    "positions": "answer",
    "loss_type": "kl",
    "batch_size": "2",
    "epochs": "3",
    "save_steps": "500",
    "log_interval": "100",
}


def main(argv: list[str] | None = None) -> None:
    """Runs it with these defaults in front of the given flags."""
    run_as(Path(__file__).with_name("train_kl.py"), DEFAULTS, argv)


if __name__ == "__main__":
    main()
