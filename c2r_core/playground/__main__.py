"""Write the playground: one page with sliders over small SAEs that were trained before."""

from __future__ import annotations

import argparse
import sys

from c2r_core.artefacts.profiles import load_profile, profile_names
from c2r_core.playground.page import write_page


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 if there is nothing to show."""
    parser = argparse.ArgumentParser(prog="c2r playground", description=__doc__)
    parser.add_argument("--out", default="playground.html", metavar="FILE", help="the page")
    parser.add_argument("--profile", default="default", help=", ".join(profile_names()))
    given = parser.parse_args(arguments)
    try:
        print(write_page(given.out, load_profile(given.profile)))
    except (ValueError, OSError) as error:
        print(f"No playground: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
