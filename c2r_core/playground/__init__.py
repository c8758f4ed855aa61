"""The playground, one page with sliders: `c2r playground --out FILE`, then open the file in a browser.

It needs no server and no network. Sliders for C²R's strength and exponent, the hierarchy and the cosine of
the true features show what small SAEs on toy features have learnt. All of it was measured before, by the
study `playground`. Without JavaScript a table shows some of its points.
"""

from __future__ import annotations

from c2r_core.errors import needs_extra

needs_extra("evaluate", "pandas", "pydantic", "scipy", "sklearn")

from c2r_core.playground.page import write_page

__all__ = ["write_page"]
