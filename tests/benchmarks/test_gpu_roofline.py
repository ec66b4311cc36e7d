"""The page of the H200 says what its record does."""

import re
from pathlib import Path

from click.testing import CliRunner

from benchmarks.gpu_roofline import main

PAGES = Path(__file__).parents[2] / "docs" / "benchmarks"


def test_the_pages_shares_of_the_floor_are_those_of_its_record(tmp_path: Path) -> None:
    drawn = tmp_path / "roofline.svg"
    result = CliRunner().invoke(main, [str(PAGES / "h200.json"), str(drawn)])
    assert result.exit_code == 0, result.output
    shares = re.findall(r"batch \d+: (\d+)% of the floor", result.output)
    text = (PAGES / "h200.md").read_text(encoding="utf-8")
    table = text[text.index("of the floor |") : text.index("The floor of decoding")]
    assert re.findall(r"\| (\d+) % \|$", table, re.MULTILINE) == shares
    assert "batch 64" in drawn.read_text(encoding="utf-8")
