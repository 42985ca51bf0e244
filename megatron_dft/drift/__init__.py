"""Checkpoints compared: norms, sparsity, layers, retention, and the report.

Offline, on files (no Megatron):
    command → compare (blocks; checkpoint: safetensors_reader, torch_dist_reader; pair; names)
            → moments, histogram, spectrum, support, principal (one tensor) → group, summary
            → report (drift_sections: conclusions, plots, where_plots, style, page)
    scoring, sampling (a base model on text) → retention, diagnosis and their reports

In training, on live shards (torch and process groups; Megatron in one module):
    training.UpdateTracker        update norms against the starting weights
    anchor.L2SP                   ½λ‖θ − θ₀‖² in the optimizer's step
    target.TargetController       an anchor's coefficient that holds a measured value
    megatron_parameters           who counts which element of a Megatron model
"""
