"""Fold an adapter into its base: base folder + adapter folder -> a plain checkpoint folder.

Run:
    python scripts/merge_lora.py --base_model checkpoints/8b --adapter_path runs/sft/final --output_path out
    python scripts/merge_lora.py --model_name checkpoints/8b --lora_weights runs/sft/final --output_dir out

Both spellings mean the same; without a base, the one named in the adapter is used. peft merges whatever it
can fold in, in float32, stored in the base's dtype. An adapter made for another base, or with weights
missing, is refused. The tokenizer is the adapter's where it has one.
"""

from dataclasses import dataclass
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.models.flags import HubFlags


@dataclass(kw_only=True)
class Config(HubFlags):
    """Flags of this script."""

    adapter_path: str = flag(help="adapter folder", reads="model")
    output_dir: str = flag(
        "merged_model_final", help="new folder for the merged checkpoint", writes="new folder"
    )
    base_model: str | None = flag(
        None,
        help="base checkpoint folder, or hub name; default: the base named in the adapter",
        reads="model",
    )


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from llada.models.checkpoints import base_and_adapter, load_model
from llada.models.hub import check_hub, push
from llada.models.saving import Origin, save_model
from llada.models.tokens import load_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Merges and saves."""
    config = parse(Config, argv, description=__doc__)
    output_dir = Path(config.output_dir)
    check_hub(config)
    base, adapter = base_and_adapter(config.base_model, config.adapter_path, flag="--base_model")
    model = load_model(base, adapter_path=adapter, dtype="auto")
    has_tokenizer = Path(adapter, "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter if has_tokenizer else base)
    save_model(model, tokenizer, output_dir, origin=Origin("merge_lora.py", f"{base} with {adapter}"))
    print(f"{output_dir}: {model.num_parameters() / 1e6:.1f} M parameters in {model.dtype}")
    push(output_dir, config, name=output_dir.name)


if __name__ == "__main__":
    run_main(main)
