"""One file a study: its runs and its tables."""

from c2r_core.errors import needs_extra

needs_extra("evaluate", "pandas", "scipy", "sklearn")
