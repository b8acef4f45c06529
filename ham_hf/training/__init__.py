"""The training loop on accelerate, and all that a run needs to work unattended.

`trainer` is the loop and `train_step` one update of it. Around the update: `method_state`, `weight_perturbation`,
`averaging`, `optimization`, `sharding`. Around the loop: `data_order`, `validation`, `log`;
`checkpoint` and `resume`; `launch`, `stopping` and `environment` of a process; `run_folder`.
"""
