"""docs/errors.md: every error that a user can cause has a row, with a remedy and a test that causes it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import PROJECT

PAGE = PROJECT / "docs" / "errors.md"

NO_ROW = {
    "NotImplementedError": "a method that each architecture or regulariser has",
    "AttributeError(name)": "asked by copy and pickle, which expect it",
    "_HookReached(activation)": "ends a forward pass at its hook, and is caught there",
    "_Stopped": "stands for a killed process, in a study of resuming",
    "self._made[name]": "a refusal of before, raised again",
    "NotEvaluable(record.reason)": "what the report says of a metric, whatever that is",
    "other processes keep replacing it": "ten times in a row, between two system calls",
    "… has no weights named …": "the weights come from the model whose class is built",
    "At step … of … the learning rate is": "the study takes a number of steps that fits",
    "it is nested too deep": "the end of a refusal that names the file",
    "its header claims … bytes": 'the end of "… is no array of numbers"',
    "the archive is compressed": 'the end of "… is damaged, or holds more than tensors"',
    "the archive unpacks to more than its own size": 'the end of "… is damaged, or holds more than tensors"',
    "the checksum of … in the archive is wrong": 'the end of "… is damaged, or holds more than tensors"',
    "it names …, which is no part of a tensor": 'the end of "… is damaged, or holds more than tensors"',
    "the answer is a …, not text": 'the end of "… does not speak the chat-completions protocol"',
}
"""Beginnings of messages, or what is raised without one, that need no row of their own, and why."""

WORDED_ELSEWHERE = {
    "DamagedArtefact(str(error))": "… is missing. …",
    "EditedCellError(found.why)": "… is not what was computed",
    "DiskFullError(target)": "the disk is full: …. Free some space",
    "DivergedError(_divergence(self.step, terms, self.checkpoint))": "Training diverged at step",
    "DivergedError(_divergence(self.step, {}, self.checkpoint))": "Training diverged at step",
    "NotEvaluable(why_no_letter(splits))": "None of the … letters could be measured on … words",
    "NotEvaluable(str(error))": "… is missing; expected the unpacked folder of RAVEL's data",
}
"""What is raised with a message that another function makes, and that message's row."""

EXPECTS_AN_ERROR = re.compile(r"raises\(|assert_only\(|not_evaluable|returncode|readouterr|Error\b")


class Row(NamedTuple):
    """A row of the page."""

    what: str
    message: str
    remedy: str
    test: str


@cache
def rows() -> tuple[Row, ...]:
    """All rows; messages and tests without the marks of code."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return tuple(
        Row(what, message.strip("`"), remedy, test.strip("`"))
        for what, message, remedy, test in cells
        if message != "message"
    )


def text(node: ast.expr) -> str:
    """The text that an expression makes, with … for what is only known when it runs."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(map(text, parts))
        case ast.FormattedValue(value=value) if isinstance(value, ast.Call):
            return text(value)
        case ast.Call(func=ast.Name("unknown_name"), args=[what, *_]):
            return f"unknown {text(what)} …"
        case ast.Call(func=ast.Name("none_of"), args=[what, *_]):
            return f"None of the … {text(what)} could be measured"
    return "…"


def raised() -> Iterator[tuple[str, str]]:
    """Where something is raised or a command line is refused, and its message; else what is raised."""
    for path, tree in sources():
        for node in ast.walk(tree):
            match node:
                case ast.Raise(exc=ast.expr() as error):
                    pass
                case ast.Call(func=ast.Attribute(value=ast.Name("parser"), attr="error")) as error:
                    pass
                case _:
                    continue
            candidates = [error, *error.args] if isinstance(error, ast.Call) else []
            messages = [message for one in candidates if re.search(r"\w", message := text(one))]
            yield f"{path}:{node.lineno}", messages[0] if messages else ast.unparse(error)


@cache
def sources() -> tuple[tuple[Path, ast.Module], ...]:
    return tuple(
        (path.relative_to(PROJECT), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted((PROJECT / "c2r_core").rglob("*.py"))
    )


@cache
def texts() -> frozenset[str]:
    """Every text in the source of the package."""
    kinds = (ast.Constant, ast.JoinedStr, ast.Call)
    nodes = [node for _, tree in sources() for node in ast.walk(tree) if isinstance(node, kinds)]
    return frozenset(map(text, nodes))


def test_every_error_has_a_row_or_a_reason():
    beginnings = (*(row.message for row in rows()), *NO_ROW, *WORDED_ELSEWHERE)
    without = [f"{where}: {what}" for where, what in raised() if not what.startswith(beginnings)]
    assert not without, "add a row to docs/errors.md:\n" + "\n".join(without)


def test_every_message_of_the_page_is_one_of_the_package():
    unknown = [
        row.message for row in rows() if not any(one.startswith(row.message) for one in texts())
    ]
    assert not unknown, "no text of c2r_core begins so:\n" + "\n".join(unknown)


def test_no_reason_outlives_its_error():
    known = [what for _, what in raised()]
    for beginning in (*NO_ROW, *WORDED_ELSEWHERE):
        assert any(what.startswith(beginning) for what in known), beginning
    assert set(WORDED_ELSEWHERE.values()) <= {row.message for row in rows()}


@cache
def functions_of(file: str) -> dict[str, str]:
    """The source of every function of a file, by name, with what its parameters are."""
    source = (PROJECT / file).read_text(encoding="utf-8")
    return {
        node.name: "\n".join(map(ast.unparse, [node, *node.decorator_list]))
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.message)
def test_a_row_has_a_remedy_and_a_test_that_expects_an_error(row):
    file, _, name = row.test.partition("::")
    assert name in functions_of(file), f"{row.test} does not exist"
    assert EXPECTS_AN_ERROR.search(functions_of(file)[name]), f"{row.test} expects no error"
    assert row.what and row.remedy
