"""Several methods and seeds side by side: run them or read them, and write tables, figures and a leaderboard."""
