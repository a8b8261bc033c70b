"""`jarm.select`: plain arrays in, a batch with its reasons out.

Imports design and core.
"""
