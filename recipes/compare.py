"""Compare training methods: run methods x seeds, or take runs that exist, and write one table.

    python recipes/compare.py --config recipes/digits/compare.yaml

`--help` shows the options; docs/evaluation.md explains them.
"""

from __future__ import annotations

from ham_hf.commands.compare import main

if __name__ == "__main__":
    main()
