"""Several methods and seeds in one frame: what to run, running it, and one table and two figures of what came out.

`plan` reads ``compare.yaml``, `runs` runs and collects, `numbers` aggregates over seeds, `facts` says what the rows
share, `text` and `plots` write. No module knows the name of a method.
"""
