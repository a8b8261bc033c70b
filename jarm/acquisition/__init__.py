"""The acquisition rules, one module per family, and the table of them.

Imports design and core.
"""
