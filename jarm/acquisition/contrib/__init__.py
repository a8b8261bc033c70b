"""Rules that do not meet the inclusion criteria of docs/rules.md: kept, tested and marked, by family as the others."""
