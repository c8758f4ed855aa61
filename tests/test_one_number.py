"""One SAE has one number: in a notebook's table, in the command's report, in the report of all evidence."""

from __future__ import annotations

import pytest

from c2r_core.artefacts.cells import read_or_compute
from c2r_core.artefacts.profiles import FIRST_SEED, load_profile
from c2r_core.artefacts.results import plain
from c2r_core.evaluate.__main__ import main
from c2r_core.evaluate.report import read_report
from c2r_core.experiments import cells, language_model
from c2r_core.experiments.evidence import ROWS, Evidence
from c2r_core.saes import save_sae

SMOKE = load_profile("smoke")
ARM = "baseline"
ONLY_WITH_A_STORE = {"fvu_on_training_documents"}
"""Fields that the command leaves null, since it has no activations of training documents."""


@pytest.fixture(scope="module")
def values():
    """What the cells of one arm hold, as a notebook reads them."""
    of_arm = [c for c in cells("language_model", SMOKE) if c.name.startswith(f"{ARM}-seed")]
    return {cell.name: read_or_compute(cell) for cell in of_arm}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `c2r evaluate` writes about the same SAE, from its folder."""
    folder = tmp_path_factory.mktemp("one")
    lm = SMOKE.language_model
    arm, store = language_model.standard_arms(lm)[ARM], language_model.training_store(lm)
    save_sae(language_model.trained(arm, store, FIRST_SEED), folder / "sae")
    out = folder / "report.json"
    main([str(folder / "sae"), "--profile", "smoke", "--out", str(out)])
    return read_report(out)


def test_every_metric_of_the_cells_is_what_the_command_writes(values, report):
    found = {name: record for value in values.values() for name, record in value.items()}
    assert len(found) > 8, "the arm's metrics"
    for name, record in found.items():
        written = plain(report.metrics[name])
        assert written["status"] == record["status"], name
        for field, value in record.get("values", {}).items():
            if field not in ONLY_WITH_A_STORE:
                assert written["values"][field] == value, f"{name}.{field}"


def test_tables_of_notebooks_and_the_report_print_the_same_digits(values, report):
    columns = {title: path for title, path in ROWS.items() if path.split(".")[0] in report.metrics}
    printed = language_model.metric_table(values, columns, [ARM]).iloc[0]
    arms = Evidence(SMOKE, {"language_model": values}, {"language_model": {}}).arms()[ARM]
    compared = 0
    for title, path in columns.items():
        metric, *inner = path.split(".")
        if metric in report.not_evaluable:
            continue
        number = report[metric]
        for key in inner:
            number = number[key] if isinstance(number, dict) else getattr(number, key)
        if number is not None:
            assert printed[title] == arms[title] == number, title
            compared += 1
    assert compared > 5
