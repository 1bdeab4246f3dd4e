"""The command line, `repae <command>`: one file per command, its flags beside its function."""
