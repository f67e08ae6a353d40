"""The documents: links lead somewhere, commands name scripts and flags that exist, Python snippets run."""

import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from llada.flags.older import is_older
from llada.models.building import load_for_inference
from serving import serve

PAGES = [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SCRIPT = re.compile(r"[\w/]+\.(?:py|sh)")


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}: no such heading in {target.name}"


@functools.cache
def known_flags(script: str) -> set[str]:
    """The flags that a script's --help names."""
    run = [sys.executable, script, "--help"]
    text = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--\w[\w-]*", text))


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's shell blocks, continuation lines joined."""
    blocks = [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == "bash"]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_name_scripts_and_flags_that_exist(page):
    for words in commands(page):
        place = next((i for i, word in enumerate(words) if SCRIPT.fullmatch(word)), None)
        if place is None:
            continue
        script = words[place]
        assert (ROOT / script).is_file(), f"{page.name}: {script} does not exist"
        if script.endswith(".sh"):
            continue
        given = {word.split("=")[0] for word in words[place:] if re.match(r"--\w", word)}
        known = {flag.removeprefix("--"): None for flag in known_flags(script)}
        names = {flag.removeprefix("--").replace("-", "_") for flag in given}
        unknown = {name for name in names - known.keys() if not is_older(name, known)}
        assert not unknown, f"{page.name}: {script} has no {unknown}"


def snippets() -> list[tuple[str, str]]:
    return [
        (f"{page.name}-{i}", body)
        for page in (ROOT / "README.md", ROOT / "docs/serving.md")
        for i, (kind, body) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
        if kind == "python"
    ]


@pytest.mark.parametrize("snippet", [s for _, s in snippets()], ids=[name for name, _ in snippets()])
def test_python_snippets_run_as_printed(snippet, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "runs/quickstart/sft")
    Path("runs/quickstart/data").mkdir()
    Path("runs/quickstart/data/heldout.jsonl").write_text('{"prompt": "1 2 3"}\n')
    server = serve(load_for_inference(str(model_dir), chat=True)[0], model_dir)
    try:
        exec(snippet.replace("http://127.0.0.1:8000", server.url), {})
    finally:
        server.close()
    assert capsys.readouterr().out.strip()
