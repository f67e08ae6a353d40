"""The LLaDA model as it ships beside its weights.

Names are loaded when they are asked for, because the sampler's settings (`sampler_settings_llada`) become
flags before torch and transformers are imported. Loading any of them registers the model with transformers.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache_llada import WindowCache
    from .configuration_llada import LLaDAConfig
    from .generation_config_llada import LLaDAGenerationConfig
    from .generation_llada import LLaDAGenerateOutput
    from .modeling_llada import LLaDAModel, LLaDAModelLM, LLaDAOutput

__all__ = [
    "LLaDAConfig",
    "LLaDAGenerateOutput",
    "LLaDAGenerationConfig",
    "LLaDAModel",
    "LLaDAModelLM",
    "LLaDAOutput",
    "WindowCache",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


def _load() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for module in ("cache", "configuration", "generation_config", "generation", "modeling"):
        loaded = import_module(f".{module}_llada", __name__)
        globals().update({name: value for name, value in vars(loaded).items() if name in __all__})
    # exist_ok: remote code of another LLaDA checkpoint in the same process may have taken the name already.
    config, model = globals()["LLaDAConfig"], globals()["LLaDAModelLM"]
    for kind in (config.model_type, *import_module(".families_llada", __name__).MODEL_TYPES):
        CONFIG_MAPPING.register(kind, config, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        auto_class.register(config, model, exist_ok=True)


if "transformers" in sys.modules:  # nothing is saved by waiting: `import modelling_final` registers, too
    _load()
