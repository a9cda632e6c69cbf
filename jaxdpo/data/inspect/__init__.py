"""Looking at preference data: survey, near-duplicates, examples, report, conversion."""
