"""What a trained SAE is worth."""

from c2r_core.errors import needs_extra

needs_extra("evaluate", "scipy", "sklearn")
