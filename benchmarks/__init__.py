"""One module per speed claim of jarm, each beside what one would use instead."""
