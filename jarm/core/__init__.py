"""The contract and what every room shares: records, array types, linear algebra, files, messages.

Imports no other room.
"""
