"""The loop as pure functions: init, ask, tell and run.

Imports acquisition, reward, design, evaluation and core.
"""
