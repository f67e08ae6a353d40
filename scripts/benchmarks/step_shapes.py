"""Models and batches on which scripts/benchmarks/bench_step.py times a training step."""

from dataclasses import dataclass

import torch

from llada.flags.yaml_files import read_yaml
from llada.models.building import ROOT, attach_lora
from llada.models.checkpoints import DTYPES
from modelling_final import LLaDAConfig, LLaDAModelLM


@dataclass(frozen=True)
class StepShape:
    """A model and a batch: fields of LLaDAConfig (or a size in configs/models), V, B, L and the LoRA rank."""

    model: dict[str, int] | str
    vocab_size: int
    batch_size: int
    length: int
    lora_r: int = 0


_SMALL = {"d_model": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "mlp_hidden_size": 1024}
_MICRO = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 48}
_LLADA_VOCABULARY = LLaDAConfig().embedding_size
SHAPES = {
    "cpu": StepShape(_SMALL, vocab_size=32_000, batch_size=8, length=256),
    "cpu-v126k": StepShape(_SMALL, vocab_size=_LLADA_VOCABULARY, batch_size=8, length=256),
    "1b": StepShape("1b", vocab_size=_LLADA_VOCABULARY, batch_size=1, length=4096),
    "8b-lora": StepShape("8b", vocab_size=_LLADA_VOCABULARY, batch_size=1, length=2048, lora_r=16),
    "micro": StepShape(_MICRO, vocab_size=200, batch_size=4, length=24),
}


def build_model(
    shape: StepShape, *, dtype: str, device: str, seed: int, gradient_checkpointing: bool
) -> torch.nn.Module:
    """The model with random weights on the device: float32, or in `dtype` under adapters."""
    fields, last = shape.model, shape.vocab_size - 1
    if isinstance(fields, str):
        fields = read_yaml(ROOT / f"configs/models/{fields}.yaml")
    model_config = LLaDAConfig(
        **fields, vocab_size=shape.vocab_size, embedding_size=shape.vocab_size, mask_token_id=last,
        eos_token_id=last - 1, pad_token_id=last - 1, max_sequence_length=shape.length,
    )  # fmt: skip
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LLaDAModelLM._from_config(
            model_config, dtype=DTYPES[dtype] if shape.lora_r else torch.float32
        )
    if shape.lora_r:
        model = attach_lora(
            model, rank=shape.lora_r, alpha=2.0 * shape.lora_r, dropout=0.0, seed=seed,
            target_modules=["all-linear"],
        ).to(device)  # fmt: skip
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and then lora_A has no gradient to compare
                torch.nn.init.constant_(parameter, 0.01)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def bare(model: torch.nn.Module) -> LLaDAModelLM:
    """The model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
