"""The sections of the page that `daae report` writes."""
