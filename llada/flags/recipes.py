"""Published recipes by name: a file of flags in configs/recipes/, and where it differs from its paper."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llada.flags.declaration import flag
from llada.flags.yaml_files import read_yaml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "recipes"


def recipe_names(stage: str) -> list[str]:
    """Recipes of a stage script that our flags can say."""
    files = {path.stem: read_yaml(path) for path in sorted(FOLDER.glob("*.yaml"))}
    return [name for name, found in files.items() if found["stage"] == stage and "flags" in found]


@dataclass(kw_only=True)
class RecipeFlags:
    """A published recipe."""

    stage: ClassVar[str]  # the script that reads it
    recipe_notes: ClassVar[list[str]] = []

    recipe: str | None = flag(
        None,
        help="Flags of a published recipe, by the name of its file in configs/recipes/; single flags "
        "override it. See docs/rl_recipes.md.",
    )

    @classmethod
    def flags_of_recipe(cls, name: str, *, with_lora: bool = True) -> dict[str, Any]:
        """The recipe's flags, those of its adapter or not; ValueError if our flags cannot say it."""
        path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(f"--recipe {name}: not one of {', '.join(recipe_names(cls.stage))}")
        found = read_yaml(path)
        if found["stage"] != cls.stage:
            raise ValueError(f"--recipe {name}: a recipe of {found['stage']}")
        if "flags" not in found:
            raise ValueError(f"--recipe {name}: cannot be said yet; missing: {'; '.join(found['missing'])}")
        flags = found["flags"]
        return flags if with_lora else {key: flags[key] for key in flags if not key.startswith("lora_")}

    def check_flags(self) -> None:
        """Notes what the run will not do as its recipe says."""
        if self.recipe is None:
            return
        found = read_yaml(FOLDER / f"{self.recipe}.yaml")
        changed = [
            f"--{name} {getattr(self, name)} (recipe: {value})"
            for name, value in found["flags"].items()
            if getattr(self, name) != value
        ]
        differs = "; ".join(found["differs"]) or "nothing that we know of"
        self.recipe_notes = [
            f"recipe {self.recipe} ({found['source']})",
            f"differs from the paper in: {differs}",
            *([f"overridden: {', '.join(changed)}"] if changed else []),
        ]

    def tell_recipe(self, folder: str | None) -> None:
        """Prints the notes, and writes them to recipe.txt in the run's folder."""
        if not self.recipe_notes:
            return
        print("\n".join(self.recipe_notes), flush=True)
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, "recipe.txt").write_text("\n".join(self.recipe_notes) + "\n", encoding="utf-8")
