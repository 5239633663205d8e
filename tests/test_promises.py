"""Small promises that nothing else would notice broken: the page, the licence, tests that do not sleep."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_has_fifteen_lines_and_loads_nothing() -> None:
    text = (ROOT / "app" / "page.html").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 15
    assert "new EventSource(" in text
    assert "src=" not in text
    assert "://" not in text


def test_the_licence_is_mit() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License")
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in text


def test_no_test_sleeps_for_a_fixed_time() -> None:
    """Zero seconds lets others run, a hundredth is a poll's pause; and a handler or a writer may take its time."""
    allowed = {"waiting.py", "writer.py", "test_kill.py", "test_tour.py"}
    for file in (ROOT / "tests").rglob("*.py"):
        if file.name not in allowed:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                fixed = re.search(r"\bsleep\((?!0\)|0\.01\))", line) and '"' not in line
                assert not fixed, f"{file.name}:{number} sleeps: wait for a named condition"
