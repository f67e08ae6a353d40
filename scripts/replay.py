"""Make one HTML file of an answer's denoising: every step by a slider, nothing else needed to look at it.

Run:
    python inference/generate.py --model_name_or_path runs/quickstart/sft --is_instruct \\
        --prompt "What is 3 + 4?" --gen_length 64 --trace steps.jsonl
    python scripts/replay.py --trace steps.jsonl --tokenizer runs/quickstart/sft --output replay.html
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of this script."""

    trace: str = flag(help="What generate.py --trace wrote.", reads="path")
    tokenizer_name: str = flag(help="Folder of the model's tokenizer.", reads="model")
    output: str = flag(help="HTML file to write.", writes="file")
    max_answers: int = flag(20, "Only the first so many answers of the trace.", at_least=1)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from llada.data.records import read_records
from llada.inference.denoising_view import spell
from llada.models.building import ROOT
from llada.models.tokens import load_tokenizer
from llada.resumable import write_atomically

PAGE = ROOT / "llada/serving/page"
STEP_FIELDS = ("positions", "token_ids", "confidences", "remasked", "step", "block")


def read_replays(config: Config) -> list[dict[str, Any]]:
    """The answers of a trace with their steps, for page/denoise.js. ValueError names file and line."""
    tokenizer = load_tokenizer(config.tokenizer_name)
    replays: dict[tuple, dict[str, Any]] = {}
    for where, entry in read_records(config.trace):
        if missing := [name for name in STEP_FIELDS if name not in entry]:
            raise ValueError(f"{where}: no {missing[0]!r}; expected a line of generate.py --trace")
        key = (str(entry.get("id")), entry.get("candidate", 0))
        if key not in replays and len(replays) == config.max_answers:
            continue
        replay = replays.setdefault(key, {"title": f"answer {key[0]}, candidate {key[1]}", "steps": []})
        # "·": a part of a character
        texts = [spell(tokenizer, [token_id])[0] or "\u00b7" for token_id in entry["token_ids"]]
        replay["steps"].append({name: entry[name] for name in STEP_FIELDS} | {"texts": texts})
    for replay in replays.values():
        touched = [p for step in replay["steps"] for p in (*step["positions"], *step["remasked"])]
        replay["length"] = max(touched, default=-1) + 1
    return list(replays.values())


def page_of(replays: list[dict[str, Any]]) -> str:
    """A whole HTML page; the texts of a model are data in it, never markup."""
    data = json.dumps(replays, ensure_ascii=False).replace("<", "\\u003c")  # cannot end the script element
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("page.css", "denoise.js"))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>LLaDA replay</title>'
        f"<style>{style}</style><main></main>"
        f'<script type="application/json" id="replays">{data}</script><script>{script}</script></html>'
    )


def main(argv: list[str] | None = None) -> None:
    """Writes the page."""
    config = parse(Config, argv, description=__doc__)
    replays = read_replays(config)
    write_atomically(Path(config.output), page_of(replays))
    print(f"{len(replays)} answers -> {config.output}")


if __name__ == "__main__":
    run_main(main)
