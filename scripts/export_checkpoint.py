"""Writes a plain checkpoint folder from a saved training state, at any time, also while the run goes on.

What comes out is what the run's final/ would be at that step, with LoRA an adapter folder. States of any
number of ranks and of sharded models are read; nothing in the run's folder is changed.

--format pard writes a causal drafter (convert_ar.py --drafter causal) as the plain Llama, Qwen2 or Qwen3 that
it is, with the verifier's tokenizer, for vLLM and TensorRT-LLM, and prints how to serve it. Then it decodes
--prompts_file with plain transformers and with speculative_decode.py's loop: acceptance must be the same in
both. --run may be a checkpoint too.

Run:
    python scripts/export_checkpoint.py --run runs/pretrain --output_dir models/at_latest
    python scripts/export_checkpoint.py --run runs/pretrain --step 5000 --dtype bfloat16 \\
        --output_dir models/at_5000
    python scripts/export_checkpoint.py --run runs/drafter --format pard --output_dir models/drafter \\
        --verifier models/SmolLM2-135M-Instruct --prompts_file heldout.jsonl --is_instruct --draft_length 8
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.flags.yaml_files import read_yaml
from llada.models.flags import HubFlags


@dataclass(kw_only=True)
class Config(HubFlags):
    """Flags of this script."""

    run: str = flag(help="Folder of a training run: config.yaml and step-N states.", reads="path")
    output_dir: str = flag(help="New folder for the checkpoint.", writes="new folder")
    step: int | None = flag(None, help="Which step-N; default the latest.", at_least=0)
    dtype: str = flag("float32", help="Of the weights written.", choices=["float32", "bfloat16", "float16"])
    format: str = flag(
        "llada", help="llada, or pard: a causal drafter for engines.", choices=["llada", "pard"]
    )

    verifier: str | None = flag(
        None, help="The model that the drafter drafts for.", needs="format=pard", reads="model"
    )
    prompts_file: str | None = flag(
        None, help="Held-out prompts to measure acceptance on.", needs="format=pard", reads="path"
    )
    is_instruct: bool = flag(False, help="Use the verifier's chat template.", needs="format=pard")
    max_samples: int = flag(20, help="Prompts to decode.", needs="format=pard", at_least=1)
    max_new_tokens: int = flag(64, help="Tokens of an answer.", needs="format=pard", at_least=1)
    draft_length: int = flag(8, help="Tokens of a draft.", needs="format=pard", at_least=1)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llada.models.building import build_model, load_for_inference, run_tokenizer
from llada.models.checkpoints import DTYPES
from llada.models.hub import check_hub, push
from llada.models.saving import Origin, save_model
from llada.resumable import whole_folder
from llada.speculative.pard import SERVE, try_drafter, write_drafter
from llada.training.checkpoint import find_resume, load_weights, read_meta


def main(argv: list[str] | None = None) -> None:
    """Exports one state."""
    config = parse(Config, argv, description=__doc__)
    check_hub(config)
    if config.format == "pard":
        export_drafter(config)
    else:
        model, tokenizer, origin = trained(config)
        save_model(model.to(DTYPES[config.dtype]), tokenizer, Path(config.output_dir), origin=origin)
        print(f"{config.output_dir}: {origin.made_by.removeprefix('export_checkpoint.py ')}")
    push(Path(config.output_dir), config, name=Path(config.output_dir).name)


def trained(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Origin]:
    """The model of a run's state, its tokenizer, and how it came to be."""
    run = Path(config.run)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"--run {run}: no config.yaml there; give the --output_dir of a training run")
    state = run / f"step-{config.step}" if config.step is not None else find_resume(run, "auto")
    if state is None or not (state / "meta.json").is_file():
        saved = sorted(path.name for path in run.glob("step-*") if (path / "meta.json").is_file())
        raise ValueError(f"--run {run}: no such state there; it has {', '.join(saved) or 'none'}")
    settings = read_yaml(run / "config.yaml")
    # as in the run's first step: what config.yaml leaves out was not given
    lacks = [name for name in ("dtype", "max_length", "seed", "use_lora") if name not in settings]
    lacks += [] if settings.keys() & {"model_name_or_path", "config_name"} else ["model_name_or_path"]
    if lacks:
        raise ValueError(f"--run {run}: its config.yaml is not whole, it lacks {', '.join(lacks)}")
    flags = SimpleNamespace(**{"model_name_or_path": None, "tokenizer_name": None} | settings)
    model = build_model(flags)
    load_weights(state, model)
    chat = "random_length_probability" not in settings  # pretraining alone adds no chat tokens
    tokenizer = run_tokenizer(flags, chat=chat)
    meta = read_meta(state)
    made_by = f"export_checkpoint.py --run {run} --step {meta['step']}"
    return model, tokenizer, Origin(made_by, flags.model_name_or_path, settings, meta.get("results", {}))


def export_drafter(config: Config) -> None:
    """Writes a causal drafter for engines, tries it, and says how to serve it."""
    if config.verifier is None or config.prompts_file is None:
        raise ValueError("--format pard needs --verifier and --prompts_file, to try the drafter on")
    origin = Origin(f"export_checkpoint.py --run {config.run} --format pard", config.run)
    if (Path(config.run) / "config.yaml").is_file():
        model, _, origin = trained(config)
        model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    elif config.step is not None:
        raise ValueError(
            f"--step {config.step}: --run {config.run} is no training run, whose states have one"
        )
    else:
        model, _ = load_for_inference(config.run, chat=False)
    folder, mask_id = Path(config.output_dir), model.config.mask_token_id
    with whole_folder(folder) as partial:
        write_drafter(model.to(DTYPES[config.dtype]), config.verifier, partial, origin=origin)
        try_drafter(
            partial, config.verifier, config.prompts_file, chat=config.is_instruct, limit=config.max_samples,
            draft_length=config.draft_length, max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
    print(SERVE.format(folder=folder, length=config.draft_length, mask_id=mask_id))


if __name__ == "__main__":
    run_main(main)
