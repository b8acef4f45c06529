"""What a run came to: the report (`report`, made and written by `run_report`), and figures, card and page of it."""
