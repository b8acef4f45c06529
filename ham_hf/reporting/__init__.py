"""Results of a run: the report (`report`, built and written by `run_report`), and its figures, card and page."""
