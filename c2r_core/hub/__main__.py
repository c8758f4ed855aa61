"""`c2r push SAE REPO` and `c2r pull REPO[@REVISION] FOLDER`: an SAE to and from the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys

from c2r_core.hub.card import model_card
from c2r_core.hub.transfer import REPORT, pull, push

LOGIN = (
    "Log in first with `hf auth login`: tokens are huggingface_hub's business, and no option here."
)


def main(arguments: list[str]) -> int:
    """Run `push` or `pull`, the first argument; returns the exit status, 2 if nothing was moved."""
    name, *rest = arguments
    try:
        return _push(rest) if name == "push" else _pull(rest)
    except (ValueError, OSError) as error:
        print(f"c2r {name}: {error}", file=sys.stderr)
        return 2


def _push(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="c2r push",
        description="Put a saved SAE in a repository of the Hugging Face hub, with a model card made from "
        "what is recorded. A new repository is private.",
        epilog=LOGIN,
    )
    parser.add_argument("path", metavar="SAE", help="folder of an SAE of this package")
    parser.add_argument("repo", metavar="REPO", help="owner/name; made if it is not there")
    parser.add_argument(
        "--report", help=f"a report of `c2r evaluate` on it; default: SAE/{REPORT}, if there is one"
    )
    parser.add_argument("--license", help="the hub's short name of a licence, such as mit")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that have other contents there"
    )
    parser.add_argument("--card", action="store_true", help="print the card only; nothing is sent")
    given = parser.parse_args(arguments)
    same = {"report": given.report, "license": given.license}
    if given.card:
        print(model_card(given.path, given.repo, **same), end="")
        return 0
    done = push(given.path, given.repo, public=given.public, overwrite=given.overwrite, **same)
    said = f"new or changed: {', '.join(done.files)}" if done.files else "all was there already"
    print(f"{done.url} ({'private' if done.private else 'public'}), commit {done.commit}: {said}")
    return 0


def _pull(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="c2r pull",
        description="Fetch an SAE of this package or of SAELens from the Hugging Face hub. Only safetensors "
        "and JSON are fetched.",
        epilog=LOGIN,
    )
    parser.add_argument(
        "repo", metavar="REPO[@REVISION]", help="owner/name, or owner/name/folder/in/it"
    )
    parser.add_argument("folder", metavar="FOLDER", help="new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    given = parser.parse_args(arguments)
    commit = pull(given.repo, given.folder, overwrite=given.overwrite)
    print(f"{given.folder}: commit {commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
