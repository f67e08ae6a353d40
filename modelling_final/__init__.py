"""The LLaDA model as it ships beside its weights; importing it registers the model with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .cache_llada import WindowCache
from .configuration_llada import LLaDAConfig
from .generation_config_llada import LLaDAGenerationConfig
from .generation_llada import LLaDAGenerateOutput
from .modeling_llada import LLaDAModel, LLaDAModelLM, LLaDAOutput

# exist_ok: remote code of another LLaDA checkpoint in the same process may have taken the name already.
AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    auto_class.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)

__all__ = [
    "LLaDAConfig",
    "LLaDAGenerateOutput",
    "LLaDAGenerationConfig",
    "LLaDAModel",
    "LLaDAModelLM",
    "LLaDAOutput",
    "WindowCache",
]
