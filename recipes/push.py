"""Push the output folder of a finished run to the Hub, again if a push has failed; or repair an older export.

    python recipes/push.py outputs/digits-ham --hub_model_id me/robust-digits

`--help` shows the options; docs/evaluation.md explains them.
"""

from __future__ import annotations

from ham_hf.commands.push import main

if __name__ == "__main__":
    main()
