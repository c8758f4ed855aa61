"""The notebooks' support: profiles, sessions with claims and results, the cache, the runner."""

from c2r_core.errors import needs_extra

needs_extra("notebooks", "matplotlib", "nbformat", "papermill", "seaborn")

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.profiles import load_profile
from c2r_core.notebook.session import start

__all__ = ["cached", "load_profile", "start"]
