"""Many runs as few compiled programs, recorded on disk.

Imports loop, acquisition, reward, evaluation, data and core.
"""
