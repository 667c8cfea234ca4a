"""Configuration: schema, presets, command line, checks, plan, and the adapter to OpenRLHF's arguments."""
