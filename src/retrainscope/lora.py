"""The advice as a configuration of PEFT: `lora_config`."""

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from retrainscope.advice import Recommendation
from retrainscope.exceptions import InvalidDataError, MissingExtraError, UnsupportedModelError
from retrainscope.finetuning import rows_to_train, tensors_to_train

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["lora_config"]

# What PEFT names the modules that it adds: a name to save that one of them ends with would fit it too.
_PEFT_NAMES = ("base_layer", "default", "lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B")


def lora_config(rec: Recommendation, model: nn.Module, **options: Any) -> "LoraConfig":
    """Return a configuration of PEFT that adapts the advised layers by LoRA, and nothing else.

    Linear, convolutional and embedding modules that an advised layer owns get adapters; their biases stay. The head is
    trained whole (``modules_to_save``) where it is to be retrained, and so is what LoRA cannot adapt: normalisation,
    recurrent modules, convolutions in groups, reparametrised modules; and ``nn.MultiheadAttention``, since PEFT adds
    its adapter to the frozen weights in every forward pass and takes it away again, which rounds them. PEFT can do so
    only with whole modules, and with all whose names end alike: what that rules out stays frozen, with a warning.

    PEFT does not keep the statistics of frozen batch normalisation and dropout still: call `freeze_rest` on the model
    before ``peft.get_peft_model``.

    Parameters
    ----------
    rec : Recommendation
    model : nn.Module
        The model itself, before ``peft.get_peft_model``.
    **options
        Of ``peft.LoraConfig``, such as ``r`` and ``lora_alpha``. With ``task_type="SEQ_CLS"`` PEFT trains the
        classifier also where the advice keeps it.

    Returns
    -------
    peft.LoraConfig
        ``target_modules`` are full names; of blocks of one list, the names in a block, with ``layers_pattern`` and
        ``layers_to_transform``; or a regular expression, where PEFT would take other modules by these.

    Raises
    ------
    InvalidDataError
        If names are given instead of advice, or nothing is to be trained, or nothing that LoRA can adapt.
    LayerNotFoundError
        If the model lacks parameters of the advice.
    UnsupportedModelError
        If the head is to be retrained, and other modules have names that end with its name.
    MissingExtraError
        If peft is not installed.

    Warns
    -----
    UserWarning
        If something stays frozen that is to be trained: a parameter that lies in no module of its own (a position
        embedding), or a module to train whole with a name that others end with.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> from retrainscope.export import lora_config
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> X, y = torch.randn(90, 4), torch.arange(90) % 3
    >>> X[:, 0] += 3.0 * y
    >>> rec = rs.recommend_layers(model, (X, y), (X.roll(1, dims=1), y + 3), random_state=0)
    >>> rec.layers, rec.head.name
    (('0',), '2')
    >>> config = lora_config(rec, model, r=4)
    >>> config.target_modules, config.modules_to_save
    ({'0'}, ['2'])

    docs/export.md trains with it.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists
    except ImportError as error:
        raise MissingExtraError.for_package("peft", "peft") from error
    rows_to_train(rec)
    adapted, whole, left = _modules_of(rec, model)
    if not adapted:
        raise InvalidDataError(
            f"LoRA can adapt nothing of what is to be trained ({', '.join([*whole, *left])}). Use "
            "retrainscope.freeze_rest(model, rec) instead."
        )
    if left:
        warnings.warn(
            f"These are to be trained, but stay frozen, since PEFT cannot train them alone: {', '.join(left)}. "
            "retrainscope.freeze_rest(model, rec) trains all that is advised, without LoRA.",
            UserWarning,
            stacklevel=2,
        )
    names = [name for name, _ in model.named_modules()]
    exact = {"target_modules": "|".join(re.escape(name) for name in adapted)}
    for choice in (_as_blocks(adapted), {"target_modules": adapted}, exact):
        config = LoraConfig(**choice, modules_to_save=whole or None, **options)
        if {name for name in names if check_target_module_exists(config, name)} == set(adapted):
            break
    return config


def _modules_of(rec: Recommendation, model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Return the modules that get adapters, those that are trained whole, and modules and parameters that cannot be."""
    found = tensors_to_train(model, rec)
    trained = {id(tensor) for tensors in found.values() for tensor in tensors.values()}
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted: list[str] = []
    whole: list[str] = []
    left: list[str] = []
    for layer, tensors in found.items():
        is_head = layer == rec.head.name
        # What is around others first: an attention's linear module goes with it.
        places = sorted(dict.fromkeys(map(_module_of, tensors)), key=lambda place: place.count("."))
        if is_head and _all_in(modules[layer], trained):
            places.insert(0, layer)
        for place in places:
            module = modules[place]
            if _is_inside(place, [*adapted, *whole, *left]):
                continue
            if not is_head and _takes_adapter(module):
                adapted.append(place)
            elif ((is_head and place == layer) or _is_one(module)) and _all_in(module, trained):
                clashes = _named_alike(place, model)
                if clashes and is_head:
                    raise UnsupportedModelError(
                        f"PEFT would not only train the head {place!r}, but all modules whose names end like that: "
                        f"{', '.join(clashes)}. Give the head a name of its own, or use "
                        "retrainscope.freeze_rest(model, rec) instead."
                    )
                (left if clashes else whole).append(place)
            else:
                left += [key for key, _ in module.named_parameters(place, recurse=False) if key in tensors]
    return adapted, whole, left


def _module_of(tensor: str) -> str:
    return tensor.split(".parametrizations.")[0] if ".parametrizations." in tensor else tensor.rpartition(".")[0]


def _is_inside(place: str, modules: Iterable[str]) -> bool:
    return any(f"{place}.".startswith(f"{module}.") for module in modules)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _all_in(module: nn.Module, trained: set[int]) -> bool:
    return all(id(tensor) in trained for tensor in (list(module.parameters()) or module.buffers()))


def _is_one(module: nn.Module) -> bool:
    """Tell whether a module has its tensors for itself, and not beside modules that have others."""
    inside = [child for name, child in module.named_children() if name != "parametrizations"]
    attention = isinstance(module, nn.MultiheadAttention)  # it does not call what is in it
    return attention or not any(_tensors(child) for child in inside)


def _takes_adapter(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # PEFT depends on it

    if is_parametrized(module):
        return False
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _named_alike(place: str, model: nn.Module) -> list[str]:
    """Return what PEFT would train too if it is told to train a module: what has a name that ends like that."""
    others = [name for name, module in model.named_modules() if name != place and _tensors(module)]
    return [name for name in (*others, *_PEFT_NAMES) if name.endswith(place)]


def _as_blocks(adapted: Iterable[str]) -> dict[str, Any]:
    """Return how PEFT names modules in blocks of a list; of no use where they are not all in blocks of one."""
    parts = [re.match(r"(?:.*?\.)?([^.]+)\.(\d+)\.(.+)", name) for name in adapted]
    blocks = [part.groups() for part in parts if part is not None]
    return {
        "target_modules": sorted({name for _, _, name in blocks}),
        "layers_to_transform": sorted({int(number) for _, number, _ in blocks}),
        "layers_pattern": sorted({pattern for pattern, _, _ in blocks}),
    }
