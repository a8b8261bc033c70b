"""One question per module, one command each: compare, sweep, plan, bench.

Imports runs, report, loop, acquisition, design, evaluation, data and core.
"""
