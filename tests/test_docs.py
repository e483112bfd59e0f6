"""The documentation runs: every Python block, every link to a file, the README's two commands, the CLI page."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "documentation"}
    for number, body in enumerate(blocks(page, "python"), 1):
        exec(compile(body, f"{page.name}, block {number}", "exec"), namespace)


def test_the_readme_example_is_short_and_spares_rows():
    (body,) = blocks(ROOT / "README.md", "python")
    statements = [line for line in body.splitlines() if line and not line.startswith("import ")]
    assert len(statements) <= 12
    namespace: dict = {}
    exec(body, namespace)
    head, scores = namespace["head"], namespace["scores"]
    assert scores.shape == (32, 5)
    assert 0 < namespace["ledger"].macs < 32 * head.num_classes * head.in_features


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_has_the_two_commands_and_they_name_real_extras():
    commands = blocks(ROOT / "README.md", "sh")
    assert len(commands) == 2
    assert commands[0].strip().endswith("&& sparingly bench")
    assert commands[1].strip().endswith("&& pytest")
    assert all("-c constraints.txt" in command and len(command.strip().splitlines()) == 1 for command in commands)
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    used = set(re.findall(r"\.\[(\w+)\]", "".join(commands)))
    assert used == {"bench", "test"} <= set(project["optional-dependencies"])


def test_every_dependency_is_pinned_in_the_constraints():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for rows in project["optional-dependencies"].values() for r in rows)]
    names = {re.split(r"[\[<>=;]", row)[0].strip().lower() for row in wanted} - {"sparingly"}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    assert [name for name in sorted(names) if not re.search(rf"^{re.escape(name)}==\d", pinned, re.MULTILINE)] == []


def test_the_command_line_page_is_what_the_commands_say(capsys):
    generate = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))
    assert generate["main"](["--check"]) == 0, capsys.readouterr().err
