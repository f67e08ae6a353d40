"""Saved model folders: weights, code, settings, tokenizer and a model card, whole or not at all."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from llada.models.tokens import special_ids
from llada.resumable import whole_folder
from modelling_final import LLaDAConfig, LLaDAModelLM
from modelling_final.modeling_llada import put_code_beside


@dataclass(frozen=True)
class Origin:
    """How a model came to be, for its card."""

    made_by: str  # the script
    base: str | None = None  # what it started from; None for new weights
    flags: Mapping[str, Any] = field(default_factory=dict)  # the script's, by name
    results: Mapping[str, float] = field(default_factory=dict)  # numbers of the model or of its training

    @classmethod
    def of(cls, config: Any, results: Mapping[str, float]) -> "Origin":
        """That of a training run with these flags."""
        script = Path(sys.modules[type(config).__module__].__file__).name
        base = getattr(config, "model_name_or_path", None)
        return cls(script, base, asdict(config), results)


def save_model(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    origin: Origin | None = None,
) -> None:
    """Writes a checkpoint folder (or adapter folder, for a PeftModel) that loads without this repository.

    The folder appears whole or not at all, in place of an older one. `state_dict`: the full weights, where
    the module itself only holds a shard of them.
    """
    is_adapter = hasattr(model, "peft_config")
    base = model.get_base_model() if is_adapter else model
    if isinstance(base, LLaDAModelLM):
        # What a tokenizer knows and a published config does not: plain `generate` has to stop there.
        base.config.eot_token_id = special_ids(base.config, tokenizer).eot
        base.generation_config.eos_token_id = base.config.end_ids
        base.generation_config.pad_token_id = base.config.pad_token_id
    with whole_folder(Path(folder)) as partial:
        model.save_pretrained(partial, state_dict=state_dict)
        if is_adapter:
            base.config.save_pretrained(partial)  # see load_model
            base.generation_config.save_pretrained(partial)
            put_code_beside(partial)
        tokenizer.save_pretrained(partial)
        has_template = tokenizer.chat_template is not None
        card = model_card(partial.name, model, origin or Origin("the LLaDA suite"), has_template=has_template)
        (partial / "README.md").write_text(card, encoding="utf-8")
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which colleagues on a cluster cannot read


_CARD = """---
library_name: {library}
pipeline_tag: text-generation
tags: [llada, diffusion-language-model]
---
# {name}

{what} with {config.num_hidden_layers} layers and a context of {config.max_position_embeddings} tokens.
Made by `{made_by}` from {base}.

{data}{results}## Load
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("{path}", trust_remote_code=True)
{adapt}{prompt}
answer = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```
{flags}"""
_ADAPT = """from peft import PeftModel

model = PeftModel.from_pretrained(model, "FOLDER")
"""
_PLAIN = 'prompt = tokenizer("What is 2 + 3?", return_tensors="pt")'
_CHAT = """messages = [{"role": "user", "content": "What is 2 + 3?"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""


def model_card(name: str, model: torch.nn.Module, origin: Origin, *, has_template: bool) -> str:
    """README.md of a model folder: what it is, base, data, metrics, how to load it, and the flags."""
    is_adapter = hasattr(model, "peft_config")
    config = (model.get_base_model() if is_adapter else model).config
    size = sum(p.numel() for p in model.parameters() if p.requires_grad or not is_adapter) / 1e6
    kind = "masked diffusion" if isinstance(config, LLaDAConfig) else "autoregressive"
    what = f"A {kind} language model ({config.model_type}) of {size:.4g} M parameters"
    if is_adapter:
        what = f"An adapter of {size:.4g} M parameters for a {kind} language model ({config.model_type})"
    flags = {key: value for key, value in origin.flags.items() if value is not None}
    paths = {key: value for key, value in flags.items() if "data" in key and isinstance(value, str | list)}
    data = ["## Data", *(f"- {key}: {value}" for key, value in paths.items()), "\n"] if paths else []
    numbers = {key: value for key, value in origin.results.items() if isinstance(value, int | float)}
    rows = [f"| {key} | {value:.6g} |" for key, value in numbers.items()]
    results = ["## Results", "| metric | value |", "|---|---|", *rows, "\n"] if numbers else []
    return _CARD.format(
        library="peft" if is_adapter else "transformers",
        name=name,
        what=what,
        config=config,
        made_by=origin.made_by,
        base=f"`{origin.base}`" if origin.base else "new weights",
        data="\n".join(data),
        results="\n".join(results),
        path=origin.base or "BASE" if is_adapter else "FOLDER",
        adapt=_ADAPT if is_adapter else "",
        prompt=_CHAT if has_template else _PLAIN,
        flags=f"\n## Flags\n```yaml\n{yaml.safe_dump(flags, sort_keys=False)}```\n" if flags else "",
    )
