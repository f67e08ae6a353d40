"""Tokenizers, and the one table of special tokens."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from llada.flags.declaration import first_line
from llada.models.checkpoints import load_config, not_found, resolve_checkpoint
from modelling_final import LLaDAConfig

# role -> text, as in the tokenizer of LLaDA-8B-Instruct. Ids always come from a tokenizer or a config.
SPECIAL_TOKENS = {
    "bos": "<|startoftext|>",
    "eos": "<|endoftext|>",
    "mask": "<|mdm_mask|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "eot": "<|eot_id|>",
}

# Classes that only code beside them defines -> transformers' own with the same vocabulary and rules.
KNOWN_TOKENIZERS = {"DreamTokenizer": "qwen2"}

CHAT_ROLES = ("start_header", "end_header", "eot")  # of those, the ones that LLaDA-8B-Base lacks

HOW_TO_ADD = "add what is missing: python scripts/train_tokenizer.py --extend {} --output_dir NEW"

# The published template always appends the assistant's header; this one does so only when asked.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class SpecialIds:
    """Token ids by role. `eot` is None for a model without an end-of-turn token."""

    mask: int
    eos: int
    pad: int
    eot: int | None

    @property
    def ends(self) -> set[int]:
        """Ids at which an answer ends."""
        return {self.eos, self.eot} - {None}


def load_tokenizer(
    path: str, *, chat: bool = False, mask_token_id: int | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with its padding and mask tokens set.

    Args:
        path: checkpoint folder, run folder, tokenizer folder, or hub name.
        mask_token_id: for a checkpoint that names no mask token.
        chat: also make sure of `CHAT_ROLES` and of a chat template; added to LLaDA-8B-Base's tokenizer, the
            three tokens get the ids that they have in Instruct's.
    """
    path, tokenizer = _read(path)
    if tokenizer.eos_token is None:
        raise ValueError(f"--tokenizer_name {path}: it has no EOS token; {HOW_TO_ADD.format(path)}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.mask_token is None and mask_token_id is None and Path(path, "config.json").is_file():
        # Published tokenizers leave mask_token unset; the model's config knows the id.
        mask_token_id = load_config(path).mask_token_id
    if tokenizer.mask_token is None and mask_token_id is not None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_token_id)
    if chat:
        _add_chat(tokenizer)
    return tokenizer


def extend_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A tokenizer with the special tokens that it lacks: EOS, mask, padding, and a chat template's."""
    _, tokenizer = _read(path)
    for name, role in (("eos_token", "eos"), ("mask_token", "mask")):
        if getattr(tokenizer, name) is None:
            tokenizer.add_special_tokens({name: SPECIAL_TOKENS[role]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _add_chat(tokenizer)
    return tokenizer


def _read(path: str) -> tuple[str, PreTrainedTokenizerBase]:
    if not Path(path, "tokenizer_config.json").is_file():
        path = resolve_checkpoint(path)
    try:
        settings = get_tokenizer_config(path)
        known = KNOWN_TOKENIZERS.get(settings.get("tokenizer_class"))
        tokenizer = AutoTokenizer.from_pretrained(path, tokenizer_type=known, trust_remote_code=False)
    except OSError as error:
        raise not_found(path, error) from error
    except Exception as error:  # of damaged files, whatever the libraries met there
        reason = first_line(error)
        raise ValueError(f"--tokenizer_name {path}: cannot be read: {reason}") from error
    tokenizer.init_kwargs.pop("auto_map", None)  # that code does not travel with what is saved here
    return path, tokenizer


def _add_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    wanted = [SPECIAL_TOKENS[role] for role in CHAT_ROLES]
    missing = [token for token in wanted if token not in tokenizer.get_vocab()]
    if missing and SPECIAL_TOKENS["start_header"] in tokenizer.chat_template:
        added = {"additional_special_tokens": missing}
        tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)


def special_ids(config: LLaDAConfig, tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Token ids by role: the model's config decides, the tokenizer must agree.

    Raises:
        ValueError: the tokenizer has more tokens than the embedding has rows, or names another mask token.
    """
    if len(tokenizer) > config.embedding_size:
        raise ValueError(
            f"--tokenizer_name: the tokenizer has {len(tokenizer)} tokens and the model's embedding only "
            f"{config.embedding_size} rows; use the tokenizer that belongs to this model"
        )
    if tokenizer.mask_token_id not in (None, config.mask_token_id):
        raise ValueError(
            f"--tokenizer_name: the tokenizer's mask token {tokenizer.mask_token!r} has id "
            f"{tokenizer.mask_token_id}, the model's mask_token_id is {config.mask_token_id}"
        )
    eot = config.eot_token_id
    if eot is None:
        eot = tokenizer.get_vocab().get(SPECIAL_TOKENS["eot"], end_of_turn(tokenizer))
    return SpecialIds(mask=config.mask_token_id, eos=config.eos_token_id, pad=config.pad_token_id, eot=eot)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the first special token that the chat template writes after an assistant's answer, if any."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special), None)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, closing: int | None) -> list[int]:
    """Ids that end an answer of an autoregressive model; LLaDA's: `SpecialIds.ends`, `LLaDAConfig.end_ids`.

    Those of its generation config, its tokenizer's EOS, and `closing`, the end of a turn in its template.
    """
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({*named, tokenizer.eos_token_id, closing} - {None})
