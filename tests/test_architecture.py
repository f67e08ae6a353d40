"""The house: arrows point down, every YAML parses, every script explains itself."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretraining", "sft_training", "rlhf", "alignment", "inference", "eval", "scripts")
SCRIPTS = sorted(
    path
    for stage in STAGES
    for path in (ROOT / stage).rglob("*.py")
    if "if __name__ ==" in path.read_text(encoding="utf-8")
)


def imported_modules(path: Path) -> set[str]:
    """Top-level names of everything a file imports, relative imports excluded."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "modelling_final").glob("*.py")), ids=lambda p: p.name)
def test_the_model_needs_only_torch_and_transformers(path):
    ours = imported_modules(path) & {"llada", *STAGES, "modelling_final"}
    assert not ours, (
        f"{path.name} imports {ours}: the model ships alone beside its weights (use relative imports)"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "llada").rglob("*.py")), ids=lambda p: p.name)
def test_the_common_module_imports_no_script(path):
    stems = {script.stem for script in SCRIPTS}
    assert not imported_modules(path) & {*STAGES, *stems}, f"{path.name} imports a script"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_never_import_scripts(path):
    stems = {script.stem for script in SCRIPTS} - {path.stem}
    assert not imported_modules(path) & {*STAGES, *stems}, f"{path.name} imports a script"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_every_script_is_its_own_manual(path):
    manual = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert manual, f"{path.name} has no docstring"
    assert "Run:" in manual, f"{path.name}: its docstring shows no command"
    assert path.name in manual, f"{path.name}: its docstring shows a command of another script"


def test_no_stage_folder_is_a_package():
    assert not [stage for stage in STAGES if (ROOT / stage / "__init__.py").exists()]


class _Tolerant(yaml.SafeLoader):
    """lm_eval's task files hold !function tags."""


_Tolerant.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("path", sorted(ROOT.glob("[ce]*/**/*.yaml")), ids=lambda p: p.name)
def test_every_yaml_parses(path):
    assert yaml.load(path.read_text(encoding="utf-8"), _Tolerant) is not None


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda p: p.name)
def test_every_config_opens_with_its_purpose(path):
    assert path.read_text(encoding="utf-8").startswith("#"), f"{path.name}: say first what it is for"
