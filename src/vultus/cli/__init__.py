"""The command line: `main` finds the command, and each command has a file with its options.

What a command does is decided in the library, so that Python and the command line give the same results.
"""
