"""From records to the answer: statistics, curves, summaries, tables and figures.

Imports core.
"""
