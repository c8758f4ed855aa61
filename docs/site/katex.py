"""KaTeX's style sheet and fonts: fetched once from npm's registry, checked, kept in the environment.

`python docs/site/katex.py` does it (`make docs`). The scripts come with sphinxcontrib-katex, which leaves
these two to another host; with a copy of them the site's pages ask none.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import tarfile
import urllib.request
from pathlib import Path

from sphinxcontrib.katex import katex_version

from c2r_core.artefacts.files import whole_folder

VERSION = "0.16.22"
URL = f"https://registry.npmjs.org/katex/-/katex-{VERSION}.tgz"
SHA512 = "XCHRdUw4lf3SKBaJe4EvgqIuWwkPSo9XoeO8GjQW94Bp7TWv9hNhzZjZ+OH9yf1UmLygb7DIT5GSFQiyt16zYg=="
"""In base64, as the registry states it."""

FOLDER = Path(sys.prefix) / "share" / f"katex-{VERSION}"


def fetch() -> Path:
    """The folder with KaTeX's style sheet and fonts (0.3 MB); returns at once where it is there.

    OSError if the registry cannot be reached. RuntimeError if the SHA-512 is not the expected one, or the
    scripts are of another version.
    """
    if katex_version != VERSION:
        raise RuntimeError(
            f"sphinxcontrib-katex brings KaTeX {katex_version}, and docs/site/katex.py the style sheet of "
            f"{VERSION}: give it that version and its SHA-512."
        )
    if FOLDER.is_dir():
        return FOLDER
    with urllib.request.urlopen(URL, timeout=60) as answer:
        archive = answer.read()
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != SHA512:
        raise RuntimeError(
            f"{URL} has SHA-512 {found}, expected {SHA512}: the download is damaged or is not the "
            "release that this site was made with. Run make docs again."
        )
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(FOLDER) as part, tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            name = member.name.removeprefix("package/dist/")
            if name == "katex.min.css" or name.startswith("fonts/") and name.endswith(".woff2"):
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(files.extractfile(member).read())
    return FOLDER


if __name__ == "__main__":
    fetch()
