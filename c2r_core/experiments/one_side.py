"""What one version of the code says of some cells, for `c2r same`, which runs this file with either version.

    python -c "…this file…" about|values FILE PROFILE DEVICE STUDY/CELL …

It is run as it stands here also with the code of years ago, so it takes little from the package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from c2r_core.artefacts.cells import Cell, compute
from c2r_core.artefacts.fingerprints import PACKAGE, fingerprints
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import STUDIES, cells


def about(profile: str, device: str, names: list[str]) -> dict[str, Any]:
    """What the named cells depend on; the hash of every module that a cell of any study depends on."""
    made = _all_cells(profile, device, STUDIES)
    entries = {entry for cell in made.values() for entry in cell.modules}
    return {
        "package": str(PACKAGE),
        "cells": {name: made[name].about() for name in names if name in made},
        "modules": fingerprints(entries),
    }


def values(profile: str, device: str, names: list[str]) -> dict[str, Any]:
    """The values of the named cells, computed now."""
    found = {}
    made = _all_cells(profile, device, dict.fromkeys(name.partition("/")[0] for name in names))
    for name in names:
        print(f"  {name}", flush=True)
        found[name] = compute(made[name])
    return found


def _all_cells(profile: str, device: str, studies: dict[str, Any]) -> dict[str, Cell]:
    loaded = load_profile(profile)
    made = (cell for study in studies for cell in cells(study, loaded, device=device))
    return {f"{cell.study}/{cell.name}": cell for cell in made}


if __name__ == "__main__":
    asked, file, profile_, device_, *names_ = sys.argv[1:]
    answer = {"about": about, "values": values}[asked](profile_, device_, names_)
    Path(file).write_text(json.dumps(answer), encoding="utf-8")
