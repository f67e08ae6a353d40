"""Imports every stage that trains, once, for the server in tests/processes.py and all that it forks."""

from conftest import load_script
from llada.training.stages import STAGES

for stage in STAGES.values():
    if stage.trains:
        load_script(stage.script)
