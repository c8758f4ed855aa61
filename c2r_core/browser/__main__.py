"""Write an SAE's latents as pages: `c2r browse SAE --out FOLDER`, then open FOLDER/index.html."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from c2r_core.browser.pages import browse
from c2r_core.evaluate.options import OF_ITS_RECORD, add_reading_options, inputs_to_look_at


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 if there is nothing to look at."""
    parser = argparse.ArgumentParser(prog="c2r browse", description=__doc__)
    parser.add_argument("path", metavar="SAE", help="folder of an SAE, as `c2r evaluate` takes it")
    parser.add_argument("--against", metavar="SAE", help="a second one, shown beside it")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the pages go")
    add_reading_options(parser, OF_ITS_RECORD)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    try:
        inputs, read = inputs_to_look_at(given, device=given.device, against=given.against)
        print(read)
        saes = {Path(given.path).resolve().name: inputs.sae}
        if given.against is not None:
            name = Path(given.against).resolve().name
            saes[name if name not in saes else f"{name} (2)"] = inputs.against
        print(browse(inputs, saes, given.out))
    except (ValueError, OSError) as error:
        print(f"Nothing to look at: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
