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
def script():
    """The loader itself, as a fixture."""
    return load_script
