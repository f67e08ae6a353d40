"""Tasks of the installed lm_eval with some settings replaced, above all where their data come from."""

from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

FOLDER = Path(lm_eval.tasks.__file__).parent


class InstalledTask(ConfigurableTask):
    """A task whose YAML names lm_eval's own file with `installed`; the keys beside it replace that file's.

    What lm_eval's `include` is for, which takes no path into an installed package. Functions in the installed
    file are not imported (humaneval's fetch a metric from the hub as they are), so replace the keys that name
    some.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        own = {name: value for name, value in config.items() if name not in ("class", "installed")}
        installed = load_yaml(FOLDER / config["installed"], resolve_func=False)
        metadata = {**installed.get("metadata", {}), **own.get("metadata", {})}
        for name in ("tag", "group"):  # places in lm_eval's own tables
            installed.pop(name, None)
        super().__init__(config={**installed, **own, "metadata": metadata})
