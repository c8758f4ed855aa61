"""The report's data agree with the notebooks and with the cells that they were gathered from."""

from __future__ import annotations

import json

import pytest

from c2r_core.artefacts.results import read_json
from c2r_core.experiments.evidence import (
    ARMS,
    arms_table,
    blocks_table,
    claims_table,
    correlation_table,
    failed_claims,
    gather,
    validation_table,
)
from c2r_core.notebook import files as notebook_files
from c2r_core.statistics import rank_correlation, rank_correlation_lead
from conftest import PROJECT

RESULTS = PROJECT / "results"
REPORT = read_json(RESULTS / "report.json")


def test_every_committed_claim_is_in_the_report():
    gathered = {(c["notebook"], c["verdict"], c["text"]) for c in REPORT["claims"]}
    committed = set()
    for path in sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if not path.stem.endswith("_report"):
            for verdict, line in notebook_files.claims(notebook_files.read(path)):
                (text,) = [t for n, v, t in gathered if n == path.stem and line.startswith(t)] or [
                    line
                ]
                committed.add((path.stem, verdict, text))
    assert committed == gathered, "run `make refresh` and `make evidence`"


def test_tables_have_what_the_report_shows():
    arms = arms_table(REPORT)
    assert list(arms.columns) == list(ARMS) and arms.notna().all().all()
    counts = claims_table(REPORT)
    assert counts.to_numpy().sum() == len(REPORT["claims"])
    assert len(failed_claims(REPORT)) == counts["FAILS"].sum()


def test_the_summary_follows_from_the_cells():
    saes = validation_table(RESULTS / "validation")
    assert len(saes) >= 30 and saes.notna().all().all()
    found = correlation_table(read_json(RESULTS / "validation" / "summary.json"))
    found = found.set_index(["saes", "failure", "predictor"])
    for group, members in (("all", saes), ("k = 10", saes[saes["k"] == 10])):
        for failure in ("erasing", "steering"):
            own = rank_correlation(members["consistency"], members[f"{failure} fails"])
            kept = found.loc[(group, failure, "assignment consistency")]
            assert own.mean == pytest.approx(kept["mean"], abs=1e-9)
            lead = rank_correlation_lead(
                members["consistency"], members["absorption"], members[f"{failure} fails"]
            )
            assert lead.mean == pytest.approx(
                found.loc[(group, failure, "absorption")]["lead"], abs=1e-9
            )


def test_blocks():
    blocks = blocks_table(RESULTS / "blocks")
    assert set(blocks["k"]) == {10, 32} and blocks["block"].nunique() >= 5


def test_what_was_not_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"05_llm_sae.json is missing: run `make refresh`"):
        gather(tmp_path, ["05_llm_sae"])
    (tmp_path / "05_llm_sae.json").write_text(json.dumps({"claims": [], "records": {}}))
    with pytest.raises(FileNotFoundError, match="holds no result of 'baseline'"):
        gather(tmp_path, ["05_llm_sae"])


def test_rank_correlations():
    x = list(range(20))
    assert rank_correlation(x, [v**3 for v in x]).mean == pytest.approx(1)
    assert rank_correlation(x, [-v for v in x]).mean == pytest.approx(-1)
    noise = [11, 3, 17, 8, 0, 14, 6, 19, 2, 10, 16, 5, 13, 1, 18, 7, 12, 4, 15, 9]
    weak = rank_correlation(x, noise)
    assert weak.low < 0 < weak.high
    lead = rank_correlation_lead(x, noise, [-v for v in x])
    assert lead.mean == pytest.approx(1 - abs(weak.mean)) and lead.low > 0
    tied = rank_correlation([0, 0, 1, 1, 2], [1, 1, 2, 2, 3])
    assert tied.mean == pytest.approx(1)
    with pytest.raises(ValueError, match="at least five pairs"):
        rank_correlation([1, 2], [1, 2])
    with pytest.raises(ValueError, match="NaN"):
        rank_correlation([1, 2, 3, 4, float("nan")], [1, 2, 3, 4, 5])
