"""Numbers that several folders must agree on."""

# Below this share of the mean a spread is rounding noise, and a correlation of it would mean nothing.
CONSTANT = 1e-13
