"""The `spikescale` command: one module per sub-command, imported only when it is the one called."""
