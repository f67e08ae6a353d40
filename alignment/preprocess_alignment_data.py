"""alignment/precompute_teacher.py under the name, and with the defaults, of the system it succeeds.

Run:
    python alignment/preprocess_alignment_data.py --input_file sft_data/llama_logits.json \\
        --output_file sft_data/processed_alignment.pt --model_name GSAI-ML/LLaDA-8B-Instruct --max_length 4096

The output is a folder of Arrow rows, also where its name ends in .pt; train_kl.py takes it as --data_path.
"""

from pathlib import Path

from llada.flags.parser import run_as

DEFAULTS = {
    "input_file": "sft_data/llama_logits.json",
    "output_file": "sft_data/processed_alignment.pt",
    "model_name": "GSAI-ML/LLaDA-8B-Instruct",
    "max_length": "256",
}


def main(argv: list[str] | None = None) -> None:
    """Runs it with these defaults in front of the given flags."""
    run_as(Path(__file__).with_name("precompute_teacher.py"), DEFAULTS, argv)


if __name__ == "__main__":
    main()
