"""Self-attention whose projections are modules of their own, for a while: `unpacked_attention`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["projection_of", "unpacked_attention"]

_INSIDE = "_unpacked"  # the name that the linear module has in an attention's


@contextmanager
def unpacked_attention(model: nn.Module) -> Iterator[None]:
    """Let every `nn.MultiheadAttention` project by linear modules that are called, while the context lasts.

    Its own forward hands the weights to a function, so that no hook sees what goes into a projection. Here the weight
    for queries, keys and values belongs to an ``nn.Linear`` too, and that one and ``out_proj`` are called, with samples
    first. What is attended to is computed by the same function of torch. Of attention to something else than itself,
    of classes derived from it, and where a call would not do what the function does, nothing changes.

    Parameters
    ----------
    model : nn.Module
    """
    plain = [module for module in model.modules() if type(module) is nn.MultiheadAttention and _can_be_called(module)]
    try:
        for module in plain:
            linear = nn.Linear(module.embed_dim, 3 * module.embed_dim, bias=False, device="meta")
            linear.weight, linear.bias = module.in_proj_weight, module.in_proj_bias
            linear.training = module.training
            module._modules[_INSIDE] = linear
            vars(module)["forward"] = _unpacked(module, linear)
        yield
    finally:
        for module in plain:
            vars(module).pop("forward", None)
            module._modules.pop(_INSIDE, None)


def projection_of(module: nn.Module, attribute: str) -> tuple[nn.Module, str]:
    """Return the module that calls a parameter of an unpacked attention, and its name there; of others their own."""
    if attribute in ("in_proj_weight", "in_proj_bias") and _INSIDE in module._modules:
        return module.get_submodule(_INSIDE), attribute.removeprefix("in_proj_")
    return module, attribute


def _can_be_called(module: nn.MultiheadAttention) -> bool:
    """Tell whether projections, if called, do no more than multiply by their weights, which are parameters.

    The function passes over hooks of ``out_proj`` and a forward of its own; pruned weights are no parameters.
    """
    out = module.out_proj
    hooks = (out._forward_pre_hooks, out._forward_hooks, out._backward_pre_hooks, out._backward_hooks)
    linear = getattr(out.forward, "__func__", None) is nn.Linear.forward and not any(hooks)
    packed = module._qkv_same_embed_dim and {"in_proj_weight", "in_proj_bias"} <= module._parameters.keys()
    return linear and packed and "forward" not in vars(module)


def _unpacked(module: nn.MultiheadAttention, linear: nn.Linear) -> Callable[..., Any]:
    packed = module.forward

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not (query is key and key is value and query.dim() == 3):
            return packed(query, key, value, *args, **kwargs)
        return attend(query, *args, **kwargs)

    def attend(
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        first = x if module.batch_first else x.transpose(0, 1)
        query, key, value = linear(first).transpose(0, 1).chunk(3, dim=-1)
        same = torch.eye(module.embed_dim, dtype=x.dtype, device=x.device)  # what is projected already stays as it is
        seen, weights = functional.multi_head_attention_forward(
            query,
            key,
            value,
            embed_dim_to_check=module.embed_dim,
            num_heads=module.num_heads,
            in_proj_weight=None,
            in_proj_bias=None,
            bias_k=module.bias_k,
            bias_v=module.bias_v,
            add_zero_attn=module.add_zero_attn,
            dropout_p=module.dropout,
            out_proj_weight=same,
            out_proj_bias=None,
            training=module.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=same,
            k_proj_weight=same,
            v_proj_weight=same,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        out = module.out_proj(seen.transpose(0, 1))
        return (out if module.batch_first else out.transpose(0, 1)), weights

    return forward
