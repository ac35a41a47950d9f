"""Models whose parameters are split among processes, as by torch's ``fully_shard``."""

from torch import nn

from retrainscope.exceptions import UnsupportedModelError

__all__ = ["check_pieces", "is_sharded", "reshard"]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether the parameters are split by ``fully_shard``: in place, brought together whenever a module runs."""
    return any(callable(getattr(type(module), "reshard", None)) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Let every process hold its piece alone again, where modules have been left with whole parameters."""
    for module in model.modules():
        if callable(getattr(type(module), "reshard", None)):
            module.reshard()  # type: ignore[operator]


def check_pieces(model: nn.Module, *, in_pieces: bool) -> None:
    """Refuse parameters that lie in pieces in several processes, unless ``fully_shard`` ones may be run as they are."""
    if in_pieces and is_sharded(model):
        return
    # By name, since to import the classes takes long.
    for part in (*model.parameters(), *model.modules()):
        if type(part).__name__ in ("DTensor", "FullyShardedDataParallel"):
            raise UnsupportedModelError(
                f"The model's parameters are split among processes ({type(part).__name__}, as by FSDP), which works "
                "with ActivationSpread and the criteria on features, for fully_shard and without device=. Else give "
                "every process a whole copy: make the model anew and load into it what torch.distributed.checkpoint."
                "state_dict.get_model_state_dict returns with StateDictOptions(full_state_dict=True)."
            )
