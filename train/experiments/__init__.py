"""Experiments, one file each. The docstring of a file has the command, the time and the result.

`catalogue` finds the files.
"""
