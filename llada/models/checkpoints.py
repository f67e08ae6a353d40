"""Checkpoint folders: what a path means, loading it, recognising it again."""

import contextlib
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from llada.flags.declaration import first_line
from llada.models.adapters import adapter_settings, put_adapter
from modelling_final import LLaDAConfig, LLaDAModelLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPECIAL_IDS = ("mask_token_id", "eos_token_id", "pad_token_id")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
ROPE_SCALING = ("none", "linear", "ntk", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How a model's positions are stretched to a longer context.

    linear divides positions by `factor`; ntk raises rope_theta by factor^(d / (d - 2)), d the head's width;
    yarn does either by frequency (arXiv 2309.00071). `factor` is the new context over the original one.
    """

    kind: str
    factor: float
    max_length: int

    def apply(self, config: LLaDAConfig) -> LLaDAConfig:
        """The config with stretched positions, changed in place; ValueError if the two do not fit."""
        if self.kind == "none":
            if self.factor != 1.0:
                raise ValueError(f"--rope_factor {self.factor} needs --rope_scaling")
            return config
        if self.factor <= 1.0:
            raise ValueError(
                f"--rope_factor {self.factor}: must be above 1, the new context / the original one"
            )
        old = config.rope_parameters
        original = old.get("original_max_position_embeddings", config.max_sequence_length)
        if self.max_length > round(original * self.factor):
            raise ValueError(
                f"--rope_factor {self.factor} stretches {original} tokens to "
                f"{round(original * self.factor)}, --max_length is {self.max_length}"
            )
        if self.kind == "ntk":
            config.rope_theta *= self.factor ** (config.head_dim / (config.head_dim - 2))
        else:
            config.rope_parameters = {
                "rope_type": self.kind,
                "factor": self.factor,
                "original_max_position_embeddings": original,
                "rope_theta": config.rope_theta,
            }
        config.max_sequence_length = max(self.max_length, config.max_sequence_length)
        return config


NO_SCALING = RopeScaling("none", 1.0, 0)


def resolve_checkpoint(path: str, *, flag: str = "--model_name_or_path") -> str:
    """The folder (or hub name) that a user means by `path`; ValueError, naming `flag`, if there is none.

    A checkpoint folder is itself; a run's output folder means its `final` (else `best`) checkpoint.
    """
    folder = Path(path)
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return str(folder)
    # what the predecessors' commands name: `best`, else `final`, beside it
    if folder.name in ("best_model.pt", "best_sft_model.pt") and not folder.exists():
        candidates = [folder.parent / "best", folder.parent / "final"]
    else:
        candidates = [folder / "final", folder / "best"]
    for candidate in candidates:
        if candidate.is_dir():
            return resolve_checkpoint(str(candidate), flag=flag)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        wanted = "config.json or adapter_config.json, or a run's final/ or best/ folder"
        hub = "" if "/" in path else "; on the hub a name is owner/model, as HuggingFaceTB/SmolLM2-135M"
        raise ValueError(f"{flag} {path}: no checkpoint there (looked for {wanted}){hub}")
    return path


def base_and_adapter(
    path: str | None, adapter_path: str | None = None, *, flag: str = "--model_name_or_path"
) -> tuple[str, str | None]:
    """(the checkpoint with the weights, the adapter on it or None) that these paths mean.

    An adapter folder, given as either, names its base itself where there is no other `path`, of `flag`.
    """
    if path is not None:
        path = resolve_checkpoint(path, flag=flag)
    if adapter_path is not None:
        adapter_path = resolve_checkpoint(adapter_path, flag="--adapter_path")
        if Path(adapter_path).is_dir() and not Path(adapter_path, "adapter_config.json").is_file():
            raise ValueError(f"--adapter_path {adapter_path}: no adapter_config.json; not a peft adapter")
    elif Path(path, "adapter_config.json").is_file():
        path, adapter_path = None, path
    if path is None:
        path = adapter_settings(adapter_path).base_model_name_or_path
        if not path:
            raise ValueError(f"--adapter_path {adapter_path}: it names no base; give its {flag}")
        path = resolve_checkpoint(path, flag=f"--adapter_path {adapter_path}: its base")
    return path, adapter_path


def load_config(path: str, *, mask_token_id: int | None = None) -> LLaDAConfig:
    """The config of a checkpoint, with its special ids; code beside the weights is never run, nor offered.

    An adapter has its own only if it was trained on stretched positions; else it is that of its base.

    Args:
        mask_token_id: for a file that names none; else the tokenizer's mask token, and never a guess.

    Raises:
        ValueError: it cannot be found, is not a LLaDA model's, or its mask token is not known.
    """
    path = resolve_checkpoint(path)
    if not Path(path, "config.json").is_file():
        path, _ = base_and_adapter(path)
    where = f"--model_name_or_path {path}"
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path)
    except OSError as error:
        raise not_found(path, error) from error
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: config.json holds {type(settings).__name__}, not names with values")
    try:
        config = LLaDAConfig.from_dict({"model_type": None, **settings}, name_or_path=path)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{where}: config.json: {' '.join(str(error).split())}") from error
    if mask_token_id is not None and config.mask_token_id not in (None, mask_token_id):
        raise ValueError(f"--mask_token_id {mask_token_id}: {path} has {config.mask_token_id} in config.json")
    if None in (config.mask_token_id, config.eos_token_id, config.pad_token_id):
        _settle_ids(config, path, mask_token_id)
    return config


def _settle_ids(config: LLaDAConfig, path: str, mask_token_id: int | None) -> None:
    """Fills the ids that config.json does not name, from the flag and the tokenizer beside it."""
    if mask_token_id is not None:
        config.mask_token_id = mask_token_id
    named = _named_ids(path)
    for name in SPECIAL_IDS:
        if getattr(config, name) is None:
            setattr(config, name, named[name])
    if config.mask_token_id is None:
        missing = "neither config.json nor the tokenizer names a mask token; give --mask_token_id"
        raise ValueError(f"--model_name_or_path {path}: {missing}")
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id


def _named_ids(path: str) -> dict[str, int | None]:
    """Ids of the special tokens that the tokenizer beside a model names."""
    tokenizer = None
    # Without a vocabulary transformers makes one up of the special tokens alone, with ids of its own.
    if any(Path(path, name).is_file() for name in VOCABULARIES):
        with contextlib.suppress(OSError, ValueError):  # what is then missing is named by the caller
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer is not None:
        return {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
    settings = get_tokenizer_config(path)
    ids = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    tokens = {name: settings.get(name.removesuffix("_id")) for name in SPECIAL_IDS}
    return {name: ids.get(t["content"] if isinstance(t, dict) else t) for name, t in tokens.items()}


def not_found(path: str, error: Exception) -> ValueError:
    """What to tell a user whose path or hub name transformers could not read."""
    reason = first_line(error)
    return ValueError(
        f"--model_name_or_path {path}: not a folder here, and the hub did not give it ({reason}). "
        "Give a checkpoint folder, or fetch one first: python scripts/download.py --help"
    )


def check_weight_files(folder: str, model: PreTrainedModel | None = None) -> int:
    """Bytes of a folder's safetensors files, after a look at their headers; 0 if it has none.

    Args:
        model: names and shapes must be exactly those of its parameters.

    Raises:
        ValueError: a file is missing or cut short, or holds other tensors, or whole numbers.
    """
    where = f"--model_name_or_path {folder}"
    index, single = Path(folder, "model.safetensors.index.json"), Path(folder, "model.safetensors")
    names = {single.name} if single.is_file() else set()
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{where}: {index.name} is damaged: {error!r}") from error
    size, found, kinds = 0, {}, {}
    for file in (Path(folder, name) for name in sorted(names)):
        try:
            size += file.stat().st_size
            with safe_open(file, "pt") as tensors:
                parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
                found |= {key: part.get_shape() for key, part in parts.items()}
                kinds |= {key: part.get_dtype() for key, part in parts.items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{where}: {file.name} is damaged: {error}") from error
    if whole := [key for key, kind in kinds.items() if not kind.startswith(("F", "BF"))]:
        kind = kinds[min(whole)]
        raise ValueError(f"{where}: {min(whole)} holds {kind}: quantised weights are not read here")
    expected = {} if model is None else _saved_shapes(model)
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if model is not None and names and wrong:
        name = min(wrong)
        raise ValueError(
            f"{where}: {len(wrong)} tensors are not what config.json asks for; {name} should be "
            f"{expected.get(name, 'absent')} and is {found.get(name, 'absent')}"
        )
    return size


def _saved_shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    """Names and shapes of the tensors that a model is saved as, in its family's layout."""
    buffers = {name: value for name, value in model.named_buffers() if name in model.state_dict()}
    tensors = revert_weight_conversion(model, {**dict(model.named_parameters()), **buffers})
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def is_meta(device: torch.device | str | None) -> bool:
    """Whether tensors there have shapes and no values."""
    return device is not None and torch.device(device).type == "meta"


def _is_no_report(record: logging.LogRecord) -> bool:
    """Keeps back transformers' table of keys that do not fit: `load_model` names them in one line."""
    return "LOAD REPORT" not in record.getMessage()


_SET_BY_TRAINING = (
    "rope_theta", "rope_parameters", "max_sequence_length", "attention_pattern", "attention_block_size",
)  # fmt: skip


def load_model(
    path: str | None,
    *,
    dtype: str = "float32",
    adapter_path: str | None = None,
    attn_implementation: str | None = None,
    device: torch.device | str | None = None,
    merge_adapter: bool = True,
    rope: RopeScaling = NO_SCALING,
    mask_token_id: int | None = None,
) -> LLaDAModelLM | PeftModel:
    """The model of a checkpoint, with every weight accounted for.

    Args:
        path: checkpoint folder, run folder, hub name, or an adapter folder (its base is then loaded too).
        dtype: of the parameters: float32, bfloat16, float16, or auto (as saved).
        device: default the CPU; on "meta" it is built from the configuration alone.
        merge_adapter: fold the adapter into the weights (for inference); else return a trainable PeftModel.
        rope: how to stretch the positions.
        mask_token_id: see `load_config`.

    ValueError: no such checkpoint, or weights or adapter are not exactly what the configuration asks for.
    """
    path, adapter_path = base_and_adapter(path, adapter_path)
    config = load_config(path, mask_token_id=mask_token_id)
    if adapter_path is not None and Path(adapter_path, "config.json").is_file():
        # An adapter trained on stretched positions, or by blocks, says so there.
        trained = load_config(adapter_path, mask_token_id=mask_token_id)
        for name in _SET_BY_TRAINING:
            setattr(config, name, getattr(trained, name))
    config = rope.apply(config)
    if is_meta(device):
        return _without_values(config, dtype, adapter_path, attn_implementation, device)
    check_weight_files(path)
    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(_is_no_report)
    try:
        model, report = LLaDAModelLM.from_pretrained(
            path,
            config=config,
            dtype=DTYPES.get(dtype, dtype),
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except (OSError, ImportError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"--model_name_or_path {path}: cannot be read: {reason}") from error
    finally:
        loader.removeFilter(_is_no_report)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            keys = sorted(map(str, report[kind]))
            raise ValueError(
                f"--model_name_or_path {path}: {len(keys)} {kind.replace('_', ' ')}: {keys[:3]} ..."
            )
    if adapter_path is not None:
        model = put_adapter(model, adapter_path, merge=merge_adapter)
    return model.to(device) if device is not None else model


def _without_values(
    config: LLaDAConfig,
    dtype: str,
    adapter_path: str | None,
    attention: str | None,
    device: torch.device | str,
) -> LLaDAModelLM | PeftModel:
    if attention is not None:
        config._attn_implementation = attention
    with torch.device(device):
        model = LLaDAModelLM(config).to(DTYPES[dtype])
        if adapter_path is None:
            return model
        adapter = adapter_settings(adapter_path)
        adapter.inference_mode = False  # as saved; what training continues is trainable
        return get_peft_model(model, adapter)


_PIECES, _PIECE_BYTES = 256, 1 << 16  # of a weight file: 16 MiB, so that every matrix is met
# Where the files were written, not what they hold.
_NOISE = ("transformers_version", "peft_version", "base_model_name_or_path", "auto_map", "_name_or_path")


def describe_checkpoint(*paths: str | Path | None) -> str:
    """A hash of the weights and settings of these checkpoints, the same on any machine; None is skipped.

    `paths`: folders, run folders, hub names, or single files (GGUF); of an adapter, its base counts too.
    """
    digest = hashlib.sha256()
    for path in filter(None, paths):
        parts = [str(path)] if Path(path).is_file() else filter(None, base_and_adapter(str(path)))
        files = [file for part in parts for file in _described_files(Path(part))]
        if not any(file.suffix != ".json" for file in files):
            raise ValueError(f"{path}: no weight files there to recognise the checkpoint by")
        for file in files:
            if file.suffix == ".json":
                settings = json.loads(file.read_text(encoding="utf-8"))
                kept = {name: value for name, value in settings.items() if name not in _NOISE}
                digest.update(json.dumps(kept, sort_keys=True).encode())
                continue
            size = file.stat().st_size
            digest.update(f"{file.name} {size};".encode())
            with file.open("rb") as stream:
                if size <= _PIECES * _PIECE_BYTES:
                    digest.update(stream.read())
                    continue
                # pieces spread over the file: always cheap, and every matrix is met
                for place in range(_PIECES):
                    stream.seek(place * (size - _PIECE_BYTES) // (_PIECES - 1))
                    digest.update(stream.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]


def _described_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = path if path.is_dir() else Path(cached_file(str(path), "config.json")).parent
    named = ("config.json", "adapter_config.json")
    return [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin") or f.name in named]
