"""Numbers that several folders must agree on."""

# A spread below this share of the mean is rounding noise, and a correlation computed from it would be meaningless.
CONSTANT = 1e-13
