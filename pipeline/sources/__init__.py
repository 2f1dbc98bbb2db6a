"""Where pictures come from: folders, archives and tables, each listed in a stable order and read inside a worker."""
