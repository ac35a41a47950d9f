"""Models whose parameters are split among processes, as by torch's ``fully_shard``."""

from typing import Any

from torch import nn

from retrainscope.exceptions import UnsupportedModelError

__all__ = ["check_pieces", "is_sharded", "reshard"]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether the parameters are split by ``fully_shard``: in place, brought together whenever a module runs."""
    return any(map(_is_split, model.modules()))


def reshard(model: nn.Module) -> None:
    """Let every process hold its piece alone again, where modules have been left with whole parameters."""
    for module in model.modules():
        if _is_split(module):
            split: Any = module
            state = split._get_fsdp_state()
            # An error has ended a pass half-way, which torch takes for still going on.
            if state._is_root and state._training_state.name == "FORWARD":
                split.reset_iter_state()
            split.reshard()


def check_pieces(model: nn.Module, *, in_pieces: bool) -> None:
    """Refuse parameters that lie in pieces in several processes, unless ``fully_shard`` ones may be run as they are."""
    split = [module for module in model.modules() if _is_split(module)]
    if in_pieces and split and all(hasattr(module, "reset_iter_state") for module in split):
        return
    # By name, since to import the classes takes long.
    for part in (*model.parameters(), *model.modules()):
        if type(part).__name__ in ("DTensor", "FullyShardedDataParallel"):
            raise UnsupportedModelError(
                f"The model's parameters are split among processes ({type(part).__name__}, as by FSDP), which works "
                "with ActivationSpread and the criteria on features, for fully_shard of torch 2.13 or newer, without "
                "device= and checkpoint=. Else give every process a whole copy: make the model anew and load into it "
                "what torch.distributed.checkpoint.state_dict.get_model_state_dict returns with "
                "StateDictOptions(full_state_dict=True)."
            )


def _is_split(module: nn.Module) -> bool:
    """Tell by name, since to import the class takes long."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
