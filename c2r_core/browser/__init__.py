"""A trained SAE as pages to look at: `c2r browse SAE --out FOLDER`, or `browse(...)`; open its index.html.

The pages need no server and no network. Each latent has its strongest, middle and nearly missed contexts, its
histogram, what it promotes and suppresses, and its neighbours. Each first letter has its words under their
carriers, in every SAE side by side, with the exceptions in red. In a notebook, `show(FOLDER, latent=7)` shows
one of these latents, and `show(FOLDER, letter="A")` a letter.
"""

from __future__ import annotations

from c2r_core.errors import needs_extra

needs_extra("evaluate", "pandas", "pydantic", "scipy", "sklearn")

from c2r_core.browser.inline import show, show_carriers, show_contexts
from c2r_core.browser.pages import browse

__all__ = ["browse", "show", "show_carriers", "show_contexts"]
