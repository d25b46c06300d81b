"""Adapters for transformers' captioners and vision towers. None imports transformers: what they need, the model's own classes have."""
