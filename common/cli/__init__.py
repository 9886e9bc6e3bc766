"""The command line: flags, overrides of config fields, Ctrl-C."""
