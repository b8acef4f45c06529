"""Push the output folder of a finished run to the Hub, again if a push has failed; or repair an older export.

    python recipes/push.py outputs/cifar10-ham --hub_model_id me/robust-cifar10
    python recipes/push.py outputs/cifar10-ham --repair
    python recipes/push.py me/robust-cifar10 --repair

--repair brings what an earlier version wrote into today's form, which transformers loads too: config.json names the
number of classes once, and a network for gray images gets a second form in rgb/. The weights stay as they are. A
folder is repaired in place (and pushed then, if --hub_model_id is given), a repository on the Hub with one commit.
"""

from __future__ import annotations

from ham_hf.commands.push import main

if __name__ == "__main__":
    main()
