"""Shared test helpers: run a stage script in this process, without paying its imports again."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_script(path: str) -> ModuleType:
    """The module of a stage script, for example `load_script("pretraining/pretrain.py").main([...])`."""
    name = "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up while it is being executed
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def paths_unchecked(monkeypatch):
    """Command lines are read as on the machine that has their files."""
    monkeypatch.setattr("llada.flags.paths.check_paths", lambda config, *, overwrites: None)


@pytest.fixture
def script():
    """The loader itself, as a fixture."""
    return load_script


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A folder with a small byte-level tokenizer that has LLaDA's special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [(ROOT / "data/samples" / name).read_text() for name in ("pretrain.jsonl", "sft.jsonl")]
    load_script("scripts/train_tokenizer.py").train_tokenizer(texts, vocab_size=320).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A checkpoint folder with a randomly initialised model of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    size = folder.with_name("size.yaml")
    size.write_text(
        "{d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 2, mlp_hidden_size: 24, rope_theta: 1e4}"
    )
    from llada.models.building import new_model
    from llada.models.saving import save_model
    from llada.models.tokens import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    save_model(new_model(str(size), tokenizer, seed=0, max_length=256), tokenizer, folder)
    return folder
