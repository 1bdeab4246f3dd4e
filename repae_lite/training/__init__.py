"""A run that is never lost: configuration, build, loop, folder, log, collapse guard."""
