"""REAL inside other people's training code: the loss on plain tensors, and reward files for a stock OpenRLHF."""
