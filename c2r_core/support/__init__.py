"""The notebooks' support: profiles, sessions with claims and results, the cache, the runner."""

from c2r_core.support.cache import cached
from c2r_core.support.profiles import load_profile
from c2r_core.support.session import start

__all__ = ["cached", "load_profile", "start"]
