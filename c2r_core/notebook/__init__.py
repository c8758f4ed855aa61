"""What notebooks need: a session with claims and results, figures, and the runner."""

from c2r_core.errors import needs_extra

needs_extra("notebooks", "matplotlib", "nbformat", "papermill", "seaborn")

from c2r_core.notebook.session import start

__all__ = ["start"]
