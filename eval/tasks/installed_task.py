"""Tasks of the installed lm_eval with some settings replaced, above all where their data come from."""

from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.instance import Instance
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


class InfillTask(InstalledTask):
    """A task whose answer fills a hole: the prompt stands before it, the document's `suffix` behind it.

    `llada_dist` reads `hole` from the generation settings. As many masks as `canonical_solution` has tokens,
    of which it sees nothing else, unless --model_args gen_length says otherwise.
    """

    def construct_requests(self, doc: dict[str, Any], ctx: str, **others: Any) -> Instance:
        """lm_eval's request, with the text behind the hole."""
        request = super().construct_requests(doc, ctx, **others)
        request.arguments[1]["hole"] = {"suffix": doc["suffix"], "text": doc["canonical_solution"]}
        return request
