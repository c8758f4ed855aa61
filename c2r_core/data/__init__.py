"""From text or toy features to activations; knows nothing of SAEs."""
