"""The command line: one file per command. What a command does is decided in the library."""
