"""Everything a person types: the `daae` program and its sub-commands."""
