"""The work of `daae convert`, `daae verify` and `daae inflate`: stores are made and mended here."""
