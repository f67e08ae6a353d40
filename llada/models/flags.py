"""What flags say of models. Nothing slow is imported: see llada/flags/parser.py."""

from dataclasses import dataclass

from llada.flags.declaration import flag

# Names of LLaDA's linear layers inside a block, each with the name Llama-style code gives it. Those of the
# MLP are the shared experts' too.
LINEAR_LAYERS = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "attn_out": "o_proj",
    "ff_proj": "gate_proj",
    "up_proj": "up_proj",
    "ff_out": "down_proj",
}
EXPERTS = "experts"  # not among all-linear: an adapter for each of hundreds is as large as a small model


@dataclass(kw_only=True)
class MaskTokenFlag:
    """For a config.json without `mask_token_id` beside a tokenizer without mask token."""

    mask_token_id: int | None = flag(None, at_least=0, help="Mask token id of a checkpoint that names none.")


@dataclass(kw_only=True)
class HubFlags:
    """Sharing of what is saved, by the names of transformers."""

    push_to_hub: bool = flag(
        False, "Upload the saved model to the Hugging Face Hub, as whom `hf auth login` says."
    )
    hub_model_id: str | None = flag(
        None, "Repository there, NAME or OWNER/NAME; default the folder's name.", needs="push_to_hub"
    )
    hub_private_repo: bool = flag(False, "Only you see a repository that is new.", needs="push_to_hub")
