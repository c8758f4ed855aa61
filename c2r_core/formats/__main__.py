"""`c2r export SAE FOLDER --format sae_lens`: an SAE in the format of another library."""

from __future__ import annotations

import argparse
import sys

from c2r_core.formats import open_sae
from c2r_core.formats.export import WRITTEN, export_sae


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 if nothing was written."""
    parser = argparse.ArgumentParser(
        prog="c2r export",
        description="Write an SAE of any format that `c2r evaluate` reads in that of another library.",
    )
    parser.add_argument("path", metavar="SAE", help="folder of an SAE")
    parser.add_argument("folder", metavar="FOLDER", help="new or empty")
    parser.add_argument("--format", required=True, choices=WRITTEN)
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    given = parser.parse_args(arguments)
    try:
        opened = open_sae(given.path)
        export_sae(
            opened.sae,
            given.folder,
            given.format,
            stated=opened.stated,
            overwrite=given.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"Nothing written: {error}", file=sys.stderr)
        return 2
    print(f"{given.folder}: {opened.architecture} in the format of {given.format}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
