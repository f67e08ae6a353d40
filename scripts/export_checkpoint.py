"""Writes a plain checkpoint folder from a saved training state, at any time, also while the run goes on.

What comes out is what the run's final/ would be at that step: `from_pretrained`, generation, evaluation and
the next stage read it. With LoRA it is an adapter folder (scripts/merge_lora.py folds it in). States of
any number of ranks and of sharded models are read; nothing in the run's folder is changed.

Run:
    python scripts/export_checkpoint.py --run runs/pretrain --output_dir models/at_latest
    python scripts/export_checkpoint.py --run runs/pretrain --step 5000 --dtype bfloat16 \\
        --output_dir models/at_5000
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.flags.yaml_files import read_yaml


@dataclass
class Config:
    """Flags of this script."""

    run: str = flag(help="Folder of a training run: config.yaml and step-N states.")
    output_dir: str = flag(help="New folder for the checkpoint.", writes="new folder")
    step: int | None = flag(None, help="Which step-N; default the latest.")
    dtype: str = flag("float32", help="Of the weights written.", choices=["float32", "bfloat16", "float16"])


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from llada.models.building import build_model, run_tokenizer
from llada.models.checkpoints import DTYPES
from llada.models.saving import Origin, save_model
from llada.training.checkpoint import find_resume, load_weights, read_meta


def main(argv: list[str] | None = None) -> None:
    """Exports one state."""
    config = parse(Config, argv, description=__doc__)
    run, output_dir = Path(config.run), Path(config.output_dir)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"--run {run}: no config.yaml there; give the --output_dir of a training run")
    state = run / f"step-{config.step}" if config.step is not None else find_resume(run, "auto")
    if state is None or not (state / "meta.json").is_file():
        saved = sorted(path.name for path in run.glob("step-*") if (path / "meta.json").is_file())
        raise ValueError(f"--run {run}: no such state there; it has {', '.join(saved) or 'none'}")
    settings = read_yaml(run / "config.yaml")
    flags = SimpleNamespace(**{"model_name_or_path": None, "tokenizer_name": None} | settings)
    model = build_model(flags)
    load_weights(state, model)
    chat = "random_length_probability" not in settings  # pretraining alone adds no chat tokens
    tokenizer = run_tokenizer(flags, chat=chat)
    meta = read_meta(state)
    made_by = f"export_checkpoint.py --run {run} --step {meta['step']}"
    origin = Origin(made_by, flags.model_name_or_path, settings, meta.get("results", {}))
    save_model(model.to(DTYPES[config.dtype]), tokenizer, output_dir, origin=origin)
    print(f"{output_dir}: the weights of {state} (step {meta['step']})")


if __name__ == "__main__":
    run_main(main)
