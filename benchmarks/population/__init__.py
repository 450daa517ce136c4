"""Does the population gradient help? The study behind docs/population-study.md: ``make bench-population``."""
