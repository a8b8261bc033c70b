"""What each command of `jarm` does with its options and prints.

Imports studies, runs, report, embedding, testing, acquisition and data.
"""
