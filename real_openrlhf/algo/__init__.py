"""The REAL algorithm. Torch only: usable in any trainer that has logits and sampled ids."""
