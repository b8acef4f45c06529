"""The training loop on accelerate, and all that a run needs in order to be left alone.

`trainer` is the loop and `train_step` one update of it. Around the update: `method_state`, `weight_perturbation`,
`averaging`, `optimization`, `sharding`. Around the loop: `data_order`, `held_out`, `update_size`, `runlog`,
`trackers`; `checkpoint`, `saving` and `resuming`; `launching` and `stopping` of a process; `output_folder` and
`run_lock`.
"""
