"""The house: arrows point down, every YAML parses, every script explains itself."""

import ast
import subprocess
import sys
from collections import Counter
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


FLOORS = (
    ("modelling_final",),
    ("llada.flags", "llada.run", "llada.resumable", "llada.chat_client"),
    ("llada.data", "llada.diffusion", "llada.models"),
    ("llada.training", "llada.rewards", "llada.inference"),
    ("llada.policies", "llada.autoregressive"),
    ("llada.speculative", "llada.serving"),
)
"""Rooms of the common module from the ground up. A room imports rooms below its floor, and none beside it."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room a module belongs to: `llada.data` of `llada.data.rows`."""
    parts = module.split(".")
    return {"llada": ".".join(parts[:2]), "modelling_final": "modelling_final"}.get(parts[0])


def climbs(path: Path, module: str) -> list[str]:
    """`line: what it imports` for every import of `module` that does not point down."""
    own, found = room_of(module), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from llada import run` imports the room llada.run
            names = [f"llada.{a.name}" for a in node.names] if node.module == "llada" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            room = room_of(name)
            if room is not None and room != own and FLOOR_OF[room] >= FLOOR_OF[own]:
                found.append(
                    f"{path.relative_to(ROOT)}:{node.lineno}: {own} imports {name}, which is not below it"
                )
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "llada").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down(path):
    if path.name == "__init__.py":
        # inside a function an import is paid for by who calls it
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in body if isinstance(node, ast.ImportFrom)}
        heavy = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}: every import would pay for it"
        return
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert room_of(module) in FLOOR_OF, f"{path.relative_to(ROOT)}: a new room needs a floor in FLOORS"
    stems = {script.stem for script in SCRIPTS}
    assert not imported_modules(path) & {*STAGES, *stems}, f"{path.relative_to(ROOT)} imports a script"
    assert not climbs(path, module), "\n".join(climbs(path, module))


def test_an_import_that_climbs_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "masking.py"
    file.write_text(
        "import math\nfrom llada.run import Run\n\n\ndef late():\n    from llada import training, models\n"
    )
    assert climbs(file, "llada.diffusion.masking") == [
        "masking.py:6: llada.diffusion imports llada.training, which is not below it",
        "masking.py:6: llada.diffusion imports llada.models, which is not below it",
    ]


def test_the_common_module_has_few_rooms():
    entries = {path.name for path in (ROOT / "llada").iterdir()} - {"__pycache__"}
    assert len(entries) <= 15, f"llada/ has {len(entries)} entries: {sorted(entries)}"


def test_no_two_classes_have_one_name():
    folders = [ROOT / "llada", ROOT / "modelling_final", *(script.parent for script in SCRIPTS)]
    found = Counter(
        node.name
        for path in {path for folder in folders for path in folder.rglob("*.py")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    del found["Config"]  # of each script
    assert [name for name, number in found.items() if number > 1] == []


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


# What takes from half a CPU second to five.
SLOW_IMPORTS = (
    "torch",
    "transformers",
    "datasets",
    "pyarrow",
    "matplotlib",
    "reasoning_gym",
    "huggingface_hub",
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_answers_help_before_its_slow_imports(path):
    code = (
        "import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"except SystemExit as stop: print([m for m in {SLOW_IMPORTS} if m in sys.modules], stop.code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
