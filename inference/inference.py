"""inference/generate.py under the name, and with the defaults, of the system it succeeds.

Run:
    python inference/inference.py --model_path=GSAI-ML/LLaDA-8B-Instruct --output_path=answers.jsonl \\
        --dataset_path=data/kto-mix-14k-test/chosen.jsonl --num_gpus=8

Always the chat template; records {id, prompt, completion} with messages in both.
"""

from pathlib import Path

from llada.flags.parser import run_as

DEFAULTS = {
    "is_instruct": "true",
    "completion_format": "messages",
    "gen_length": "512",
    "steps": "512",
    "block_length": "32",
}


def main(argv: list[str] | None = None) -> None:
    """Runs it with these defaults in front of the given flags."""
    run_as(Path(__file__).with_name("generate.py"), DEFAULTS, argv)


if __name__ == "__main__":
    main()
