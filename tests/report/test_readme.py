"""The README's generated blocks: filled from a result, stale when they differ, refused when unknown."""

from pathlib import Path

import pytest

from sparingly.report import readme, result

ROOT = Path(__file__).parents[2]
SAMPLE = Path(__file__).with_name("sample.json")
TEXT = "before\n<!-- figures: table -->\nold\n<!-- /figures -->\nafter\n"


def test_a_block_is_filled_and_the_rest_is_left_alone():
    fresh = readme.update(TEXT, result.load(SAMPLE))
    assert fresh.startswith("before\n<!-- figures: table -->\n| Spelling correction, 288,992 classes |")
    assert fresh.endswith("\n<!-- /figures -->\nafter\n")
    assert "old" not in fresh
    for words in ("**212× [197, 229]** processor time", "**84.1 % [83.8, 84.4]**", "symspellpy: 68.7 %", "no powercap"):
        assert words in fresh
    assert readme.update(fresh, result.load(SAMPLE)) == fresh


@pytest.mark.parametrize("text", ["no block", TEXT.replace("table", "tabel")])
def test_no_block_or_an_unknown_one_is_refused(text):
    with pytest.raises(ValueError, match="README blocks must be among"):
        readme.update(text, result.load(SAMPLE))


def test_check_writes_nothing_and_says_stale(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(TEXT, encoding="utf-8")
    arguments = ["--readme", str(path), "--results", str(SAMPLE)]
    assert readme.main([*arguments, "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == TEXT
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0


def test_a_block_without_its_result_is_refused():
    with pytest.raises(ValueError, match="no result of a converted network"):
        readme.update("<!-- figures: converted -->\n<!-- /figures -->\n", result.load(SAMPLE))


def test_the_readme_shows_the_committed_results():
    results = [str(ROOT / file) for file in readme.RESULTS]
    assert readme.main(["--check", "--readme", str(ROOT / "README.md"), "--results", *results]) == 0
