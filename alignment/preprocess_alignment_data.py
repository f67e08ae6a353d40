"""alignment/precompute_teacher.py under the name, and with the defaults, of the system it succeeds.

Run:
    python alignment/preprocess_alignment_data.py --input_file sft_data/llama_logits.json \\
        --output_file sft_data/processed_alignment.pt --model_name GSAI-ML/LLaDA-8B-Instruct --max_length 4096

The output is a folder of Arrow rows, also where its name ends in .pt; train_kl.py takes it as --data_path.
"""

import runpy
import sys
from pathlib import Path

DEFAULTS = {
    "input_file": "sft_data/llama_logits.json",
    "output_file": "sft_data/processed_alignment.pt",
    "model_name": "GSAI-ML/LLaDA-8B-Instruct",
    "max_length": "256",
}


def main(argv: list[str] | None = None) -> None:
    """Runs precompute_teacher.py with these defaults in front of the given flags."""
    script = Path(__file__).with_name("precompute_teacher.py")
    defaults = [word for name, value in DEFAULTS.items() for word in (f"--{name}", value)]
    sys.argv = [str(script), *defaults, *(sys.argv[1:] if argv is None else argv)]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
