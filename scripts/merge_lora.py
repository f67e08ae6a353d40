"""Fold a LoRA adapter into its base: base folder + adapter folder -> a plain checkpoint folder.

Run:
    python scripts/merge_lora.py --base_model checkpoints/8b --adapter_path runs/sft/final --output_path out
    python scripts/merge_lora.py --model_name checkpoints/8b --lora_weights runs/sft/final --output_dir out

Both spellings of the flags mean the same; without a base, the one named in the adapter is used. Every target
weight becomes W + scale * B A, computed in float32 and stored in the base's dtype. Shards keep their names
and their index. The model is never built: shards are copied as files and the target weights overwritten in
place, so memory is the adapter plus, at most, the target weights of one shard. Weights that the adapter
stores whole (modules_to_save, biases) replace the base's. The tokenizer is the adapter's where it has one.

LoRA variants that are not W + scale * B A (DoRA and others) are refused, and so is an adapter made for
another base: the message names the first key that does not fit.
"""

import json
import math
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from safetensors import safe_open
from tqdm import tqdm

from llada.flags import flag, parse
from llada.models import resolve_checkpoint

# Shapes: O outputs and I inputs of a linear layer, r rank, V vocabulary rows, D width.

# Options of LoraConfig under which the function is not W + scale * B A on the weights in the base's files.
REFUSED_OPTIONS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initialisations that subtract the initial B A from the base's weights, in memory only.
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# Weights in any format; and the record of a download, which would be untrue of the merged folder.
CONTEXT_FIELDS = ("rope_parameters", "rope_theta", "max_sequence_length")
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", "download.json")


@dataclass
class Config:
    """Flags of this script."""

    adapter_path: str = flag(help="LoRA adapter folder", aliases=("lora_weights",))
    output_dir: str = flag(help="new folder for the merged checkpoint", aliases=("output_path",))
    base_model: str | None = flag(
        None,
        help="base checkpoint folder, or hub name; default: the base named in the adapter",
        aliases=("model_name", "model_name_or_path"),
    )


class Change(NamedTuple):
    """What happens to one weight of the base, by keys of the adapter's file."""

    whole: str | None = None  # replaces it
    lora_a: str | None = None  # then scale * B A is added
    lora_b: str | None = None
    scale: float = 1.0
    is_transposed: bool = False  # embeddings: W is [V, D] and B A is [D, V]


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, argv, description=__doc__)
    output_dir = Path(config.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {output_dir}: exists and is not empty; give a new folder")
    adapter_dir = checkpoint_folder("--adapter_path", config.adapter_path)
    settings = read_settings(adapter_dir)
    base_dir = base_folder(config.base_model or settings.get("base_model_name_or_path"))
    is_tied = json.loads((base_dir / "config.json").read_text(encoding="utf-8")).get("weight_tying", False)

    with safe_open(adapter_dir / "adapter_model.safetensors", "pt") as adapter:
        changes = plan(list(adapter.keys()), settings)
        shards = find_weights(base_dir, list(changes), is_tied=is_tied)
        check_shapes(base_dir, shards, adapter, changes)
        partial = output_dir.with_name(output_dir.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_small_files(base_dir, adapter_dir, partial)
        with tqdm(total=len(changes), unit="weight", desc="merge") as progress:
            for shard, keys in shards.items():
                shutil.copyfile(base_dir / shard, partial / shard)
                merge_shard(
                    base_dir / shard, partial / shard, {k: changes[k] for k in keys}, adapter, progress
                )
    if output_dir.exists():
        output_dir.rmdir()  # empty, as checked above
    partial.rename(output_dir)
    print(f"{output_dir}: {len(changes)} weights changed in {len(shards)} files")


def read_settings(adapter_dir: Path) -> dict[str, Any]:
    """The adapter's adapter_config.json; ValueError if it cannot be merged weight by weight."""
    where = f"--adapter_path {adapter_dir}"
    if not (adapter_dir / "adapter_config.json").is_file():
        raise ValueError(f"{where}: no adapter_config.json; this is not a peft adapter")
    if not (adapter_dir / "adapter_model.safetensors").is_file():
        raise ValueError(f"{where}: no adapter_model.safetensors")
    settings = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type {settings.get('peft_type')!r}; only LORA can be merged")
    for option in REFUSED_OPTIONS:
        if settings.get(option):
            raise ValueError(
                f"{where}: {option} is {settings[option]!r}, and such an adapter is not W + scale * B A; "
                "load it with peft and call merge_and_unload()"
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVES_THE_BASE):
        raise ValueError(
            f"{where}: init_lora_weights {start!r} changed the base before training, and the base folder has "
            "the unchanged weights; save the adapter with path_initial_model_for_weight_conversion"
        )
    return settings


def checkpoint_folder(flag_name: str, path: str) -> Path:
    """The checkpoint that `path` means (a run's folder means its final one); ValueError names the flag."""
    try:
        return Path(resolve_checkpoint(path))
    except ValueError as error:
        raise ValueError(f"{flag_name} {path}: no checkpoint folder there") from error


def base_folder(base_model: str | None) -> Path:
    """The base's folder; a hub name is fetched into the hub's cache."""
    if not base_model:
        raise ValueError("--base_model: the adapter names no base; give its folder")
    path = checkpoint_folder("--base_model", base_model)
    if path.is_dir():
        return path
    try:
        return Path(huggingface_hub.snapshot_download(base_model))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--base_model {base_model}: not a folder here, and the hub failed: {reason}"
        ) from error


def plan(adapter_keys: list[str], settings: dict[str, Any]) -> dict[str, Change]:
    """Which base weight changes how: base key -> Change.

    scale = alpha / r, or alpha / sqrt(r) with use_rslora; r and alpha by module where a pattern names it.
    """
    changes: dict[str, Change] = {}
    for key in sorted(adapter_keys):
        name = key.removeprefix("base_model.model.")
        module, mark, part = name.partition(".lora_")
        if not mark:
            changes[name.replace(".base_layer.", ".")] = Change(whole=key)  # sorted: before its lora_A
        elif part in ("A.weight", "embedding_A"):
            partner = key.removesuffix(part) + part.replace("A", "B", 1)
            if partner not in adapter_keys:
                raise ValueError(f"--adapter_path: {key} has no partner {partner}")
            # fan_in_fan_out is not looked at: peft switches it off for nn.Linear, and LLaDA has no other
            changes[module + ".weight"] = changes.get(module + ".weight", Change())._replace(
                lora_a=key,
                lora_b=partner,
                scale=scale_of(module, settings),
                is_transposed=part == "embedding_A",
            )
        elif part not in ("B.weight", "embedding_B"):
            raise ValueError(f"--adapter_path: {key} is not part of a plain LoRA adapter")
    if not changes:
        raise ValueError("--adapter_path: the adapter holds no weights")
    return changes


def scale_of(module: str, settings: dict[str, Any]) -> float:
    """The factor in front of B A for one module."""
    rank = by_pattern(module, settings.get("rank_pattern"), settings["r"])
    alpha = by_pattern(module, settings.get("alpha_pattern"), settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def by_pattern(module: str, patterns: dict[str, float] | None, default: float) -> float:
    """The value of the first pattern that matches the module's name or its end, as peft reads them."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matches, default)


def find_weights(base_dir: Path, wanted: list[str], *, is_tied: bool) -> dict[str, list[str]]:
    """Every shard of the base with the wanted weights it holds; ValueError names one that is nowhere."""
    index = base_dir / "model.safetensors.index.json"
    if index.is_file():
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (base_dir / "model.safetensors").is_file():
        with safe_open(base_dir / "model.safetensors", "pt") as file:
            where = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise ValueError(f"--base_model {base_dir}: no model.safetensors and no index of shards")
    tied = [key for key in wanted if key.endswith((".wte.weight", "transformer.ff_out.weight"))]
    if is_tied and tied:
        raise ValueError(
            f"--adapter_path: it changes {tied[0]}, and the base ties the embedding to the head: "
            "merged, both would change"
        )
    missing = [key for key in wanted if key not in where]
    if missing:
        raise ValueError(
            f"--adapter_path: {len(missing)} of the {len(wanted)} weights it changes are not in the base "
            f"{base_dir}, first {missing[0]}; the adapter belongs to another base"
        )
    shards = {shard: [] for shard in sorted(set(where.values()))}
    for key in wanted:
        shards[where[key]].append(key)
    return shards


def check_shapes(
    base_dir: Path, shards: dict[str, list[str]], adapter: Any, changes: dict[str, Change]
) -> None:
    """ValueError, before anything is written, for the first weight whose shape the adapter does not fit."""
    for shard, keys in shards.items():
        with safe_open(base_dir / shard, "pt") as file:
            for key in keys:
                expected = file.get_slice(key).get_shape()
                for shape in adapter_shapes(changes[key], adapter):
                    if shape != expected:
                        raise ValueError(
                            f"--adapter_path: {key} is {expected} in the base {base_dir}, and the adapter is "
                            f"for {shape}; it belongs to another base, or to a resized vocabulary"
                        )


def adapter_shapes(change: Change, adapter: Any) -> list[list[int]]:
    """The base weight's shape as the adapter's tensors tell it: that of `whole`, and that of B A."""
    shapes = []
    if change.whole is not None:
        shapes.append(adapter.get_slice(change.whole).get_shape())
    if change.lora_a is not None:
        outputs = adapter.get_slice(change.lora_b).get_shape()[0]
        inputs = adapter.get_slice(change.lora_a).get_shape()[1]
        shapes.append([inputs, outputs] if change.is_transposed else [outputs, inputs])
    return shapes


def merge_shard(source: Path, target: Path, changes: dict[str, Change], adapter: Any, progress: tqdm) -> None:
    """Overwrites the changed weights in `target`, a byte copy of the shard `source`.

    Names, shapes and dtypes do not change, so the header and all offsets of the file stay valid.
    """
    with safe_open(source, "pt") as file, target.open("r+b") as out:
        header_size = struct.unpack("<Q", out.read(8))[0]
        header = json.loads(out.read(header_size))
        for key, change in changes.items():
            merged = merge_weight(file.get_tensor(key), change, adapter).contiguous()
            start, end = header[key]["data_offsets"]  # counted from the end of the header
            data = merged.view(torch.uint8).numpy().data
            assert data.nbytes == end - start, key
            out.seek(8 + header_size + start)
            out.write(data)
            progress.update()


def merge_weight(weight: torch.Tensor, change: Change, adapter: Any) -> torch.Tensor:
    """W + scale * B A in float32, then in W's dtype."""
    dtype = weight.dtype
    if change.whole is not None:
        weight = adapter.get_tensor(change.whole)
    if change.lora_a is None:
        return weight.to(dtype)
    a = adapter.get_tensor(change.lora_a).float()  # [r, I]
    b = adapter.get_tensor(change.lora_b).float()  # [O, r]
    merged = (b @ a).mul_(change.scale)
    merged = merged.T if change.is_transposed else merged
    return merged.add_(weight).to(dtype)


def copy_small_files(base_dir: Path, adapter_dir: Path, target: Path) -> None:
    """Everything beside the base's weights, then the adapter's own tokenizer, if it has one."""
    for file in sorted(base_dir.iterdir()):
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copyfile(file, target / file.name)
    if (adapter_dir / "tokenizer_config.json").is_file():
        for name in TOKENIZER_FILES:
            if (adapter_dir / name).is_file():
                shutil.copyfile(adapter_dir / name, target / name)
    if (adapter_dir / "config.json").is_file():  # of an adapter trained here
        stretched = json.loads((adapter_dir / "config.json").read_text(encoding="utf-8"))
        fields = json.loads((target / "config.json").read_text(encoding="utf-8"))
        context = {name: stretched[name] for name in CONTEXT_FIELDS if name in stretched}
        if any(fields.get(name) != value for name, value in context.items()):
            text = json.dumps(fields | context, indent=2) + "\n"
            (target / "config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
