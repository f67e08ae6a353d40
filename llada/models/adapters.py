"""A peft adapter that was trained before: its settings, and putting it on a model."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from modelling_final import LLaDAModelLM

Reference = Callable[[torch.nn.Module], AbstractContextManager[torch.nn.Module]]
"""A model in training -> a context that holds the frozen one it is compared with."""

# Initialisations that subtract the initial B A from the base's weights, in memory only.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_settings(path: str) -> PeftConfig:
    """adapter_config.json of a folder; ValueError if it cannot be read."""
    try:
        return PeftConfig.from_pretrained(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--adapter_path {path}: adapter_config.json cannot be read: {error!r}") from error


def put_adapter(model: LLaDAModelLM, adapter_path: str, *, merge: bool) -> LLaDAModelLM | PeftModel:
    """The model with an adapter, folded into its weights or trainable; ValueError if it does not fit."""
    where = f"--adapter_path {adapter_path}"
    start = getattr(adapter_settings(adapter_path), "init_lora_weights", None)
    if isinstance(start, str) and start.startswith(_MOVES_THE_BASE):
        raise ValueError(
            f"{where}: init_lora_weights {start!r} changed the base before training, and the base folder has "
            "the unchanged weights; save the adapter with path_initial_model_for_weight_conversion"
        )
    try:
        found = load_peft_weights(adapter_path, device="cpu").keys()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
            adapted = PeftModel.from_pretrained(model, adapter_path, is_trainable=not merge)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{where}: does not fit this base model: {error}") from error
    # peft itself loads whatever fits
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    for keys, what in (
        (expected - found, "are missing; the file is damaged"),
        (found - expected, "have no place in the base; the adapter was made for another one"),
    ):
        if keys:
            raise ValueError(f"{where}: {len(keys)} of its weights {what}. First: {min(keys)}")
    if not merge:
        return adapted
    at_ends = [key for key in found if ".transformer.wte." in key or ".transformer.ff_out." in key]
    if model.config.weight_tying and at_ends:
        raise ValueError(
            f"{where}: it changes {min(at_ends)}, and the base ties the embedding to the head: merged, both "
            "would change"
        )
    return adapted.merge_and_unload()


@contextmanager
def without_adapter(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model with its adapter switched off: that which training started from, if the adapter is fresh."""
    bare = getattr(model, "module", model)  # DistributedDataParallel's wrapping
    with bare.disable_adapter():
        yield model
