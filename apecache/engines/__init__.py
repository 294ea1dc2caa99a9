"""Where work runs that one process is too few for."""
