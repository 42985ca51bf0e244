"""Resuming Megatron's distributed optimizer where Adam is torch's (no transformer-engine, no apex).

megatron-core 0.19.2, core/optimizer/distrib_optimizer.py, three faults:

- `state_dict`, which loading calls on the fresh optimizer, asserts that Adam has counted its steps:
  no run with --use-distributed-optimizer could be resumed.
- `load_state_dict` gives all parameters one and the same tensor to count in, so a step after the
  resume would count once for each parameter, and then copies the fresh optimizer's 0 over it (or
  fails, as --dist-ckpt-optim-fully-reshardable stores none): a wrong bias correction, without a
  word. The true count lies in the parameter groups.
- In fp32 it copies into views of the parameters themselves, which autograd refuses.
"""

import torch

from megatron_dft.compat import adam_count
from megatron_dft.compat.hooks import wrap


def install() -> None:
    """Mend them; where transformer-engine or apex brings the optimizer, its count alone."""
    from megatron.core.optimizer import distrib_optimizer

    adam_count.install()
    if distrib_optimizer.HAVE_APEX_OR_TE:
        adam_count.install_for_shards()
        return

    def describing(original):
        def state_dict(self):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    state = self.optimizer.state[parameter]
                    if not state:
                        for key in self.optimizer_state_keys:
                            state[key] = torch.zeros_like(parameter.data)
                        state["step"] = torch.tensor(0.0)
            return original(self)

        return state_dict

    def loading(original):
        def load_state_dict(self, state):
            with torch.no_grad():
                original(self, state)
            counts = {float(group["step"]) for group in state["optimizer"]["param_groups"]}
            assert len(counts) == 1, f"parameter groups at different steps: {counts}"
            count = counts.pop()
            for entry in self.optimizer.state.values():
                entry["step"] = torch.tensor(count)

        return load_state_dict

    def copying(original):
        def _set_main_param_and_optimizer_states(self, parameter, tensors):
            # A step that is no tensor is passed over: load_state_dict above sets it.
            original(self, parameter, {**tensors, "step": None})

        return _set_main_param_and_optimizer_states

    owner = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
    wrap(f"{owner}._set_main_param_and_optimizer_states", copying)
    wrap(f"{owner}.state_dict", describing)
    wrap(f"{owner}.load_state_dict", loading)
