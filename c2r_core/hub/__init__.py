"""SAEs on the Hugging Face hub: a model card from what is recorded, `push` and `pull`.

    push("my_sae", "me/my-sae")  # private, unless public=True
    pull("me/my-sae", "my_copy")

Who you are is known to huggingface_hub alone (`hf auth login`, or HF_TOKEN): no token is an argument of
anything here, so none gets into a file or a message.
"""

from c2r_core.errors import needs_extra

needs_extra("lm", "huggingface_hub")

from c2r_core.hub.card import model_card
from c2r_core.hub.transfer import pull, push

__all__ = ["model_card", "pull", "push"]
