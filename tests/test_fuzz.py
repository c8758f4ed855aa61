"""A small share of `make fuzz`: every parser accepts a damaged file, or refuses it as its docstring says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from conftest import PROJECT
from parsers import PARSERS
from processes import environment

INPUTS = 150
MEGABYTES = 256
"""By which a process may grow that reads small files."""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[str, dict]:
    """What became of each parser's inputs; in a process of its own, since it forks."""
    file = tmp_path_factory.mktemp("fuzz") / "outcomes.json"
    command = [
        sys.executable,
        PROJECT / "tests" / "fuzz.py",
        "--inputs",
        str(INPUTS),
        "--out",
        file,
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert file.exists(), done.stdout + done.stderr
    print(done.stdout)
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("parser", PARSERS)
def test_damaged_files_are_refused_as_documented_or_can_be_used(table, parser):
    outcome = table[parser]
    assert outcome["faults"] == {}, "\n".join(outcome["examples"].values())
    assert outcome["inputs"] >= INPUTS / 2, "hypothesis found too little to damage"
    assert outcome["refused"] or parser in ("precision", "kept answer")


@pytest.mark.parametrize("parser", PARSERS)
def test_damaged_files_make_no_parser_write_elsewhere_or_take_much_memory(table, parser):
    assert table[parser]["outside"] == 0
    assert table[parser]["megabytes"] < MEGABYTES


def test_the_page_has_a_row_for_every_parser():
    page = (PROJECT / "docs" / "untrusted_files.md").read_text(encoding="utf-8")
    table = page.partition("| parser |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == list(PARSERS)
