"""The classifiers of transformers, tiny: small configurations, random weights, and inputs for them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from models import N_LABELS, Inputs, Specimen, run_once
from torch import Generator, nn

MOST_PARAMETERS = 40e6
VOCABULARY, N_TOKENS, END, FIRST_WORD, IMAGE_MARK = 99, 12, 2, 3, 98
IMAGE, WAVE, N_TIMES, N_FRAMES = 64, 4000, 60, 4

# Given to each configuration, and to those inside it, as far as it knows the name and has one number there (or a list
# if this is one).
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "d_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 8),
    **{"num_experts_per_tok": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "n_positions": 64},
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END},
    **{"image_size": 32, "patch_size": 8, "embed_dim": 16},
    **{"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 40]},
}
# Where these do not fit together, by the type of the configuration. None leaves the default.
INSTEAD: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "axk1": {"n_group": 2, "topk_group": 1},
    "bit": {"num_groups": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        }
    },
    "convnext": {"num_hidden_layers": 4, "patch_size": 2},
    "convnextv2": {"num_hidden_layers": 4, "patch_size": 2},
    "cvt": {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "dinat": {"num_heads": [1, 2, 4, 4], "kernel_size": 3, "dilations": [[1], [1], [1, 1], [1]]},
    "donut-swin": {"num_heads": [1, 2, 4, 4], "patch_size": 2, "window_size": 4, "image_size": 64},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "image_size": 64},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_hidden_layers": 4},
    "gptj": {"rotary_dim": 4},
    "hgnet_v2": {"hidden_sizes": None, "depths": None},
    "hiera": {"image_size": [64, 64], "num_heads": [1, 2, 4, 4]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "levit": {
        **{"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
        **{"image_size": 64, "patch_size": None},
    },
    "lilt": {"hidden_size": 96},
    "luke": {"entity_vocab_size": 99, "entity_emb_size": 16},
    "mistral4": {"head_dim": 16},
    "mobilevitv2": {"patch_size": None, "image_size": 64},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 3, "num_cross_attention_heads": 1},
    "pvt": {"num_attention_heads": [1, 2, 4, 4]},
    "pvt_v2": {"num_attention_heads": [1, 2, 4, 4]},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 24]},
    "segformer": {"num_attention_heads": [1, 2, 4, 4], "num_hidden_layers": 4},
    "textnet": {"hidden_sizes": None, "depths": None},
    "shieldgemma2": {
        "yes_token_index": 3,
        "no_token_index": 4,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_MARK,
    },
    "siglip2_vision_model": {"num_patches": 16},
    "swin": {"num_heads": [1, 2, 4, 4], "patch_size": 2, "window_size": 4, "image_size": 64},
    "swinv2": {"num_heads": [1, 2, 4, 4], "patch_size": 2, "window_size": 4, "image_size": 64},
    "t5": {"decoder_start_token_id": 0},
    "timesformer": {"num_frames": 4},
    "videomae": {"num_frames": 4},
    "videoprism_vision_model": {"num_frames": 4, "tubelet_size": [1, 8, 8], "num_spatial_layers": 3},
    "vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "vjepa2": {"frames_per_clip": 4, "crop_size": 32, "num_pooler_layers": 1, "pred_num_hidden_layers": 1},
    "whisper": {"max_source_positions": N_TIMES // 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8, "head_dim": 16, "mamba_dt_rank": 4},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "head_dim": None},
}
# In multi-head latent attention every head has keys of its own.
for latent in ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"):
    INSTEAD[latent] = {"num_key_value_heads": 4, **INSTEAD.get(latent, {})}


@cache
def classes() -> dict[str, str]:
    """Return the name of the class of each model, which is called by kind of input and architecture."""
    from transformers.models.auto import modeling_auto as auto

    tables = {
        "text": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "audio": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "video": auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    }
    found: dict[str, str] = {}
    for kind, table in tables.items():
        for architecture, several in table.items():
            first, *others = [several] if isinstance(several, str) else several
            found[f"{kind}/{architecture}"] = first
            found |= {f"{kind}/{architecture}/{other}": other for other in others}
    return found


def names() -> list[str]:
    """Return every classifier that there is."""
    return list(classes())


def build(name: str) -> Specimen:
    """Build a classifier with a small configuration."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind, architecture, *_ = name.split("/")
    config = small(transformers.CONFIG_MAPPING[architecture])
    config.num_labels = N_LABELS
    make = getattr(transformers, classes()[name])
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in make(config).parameters())
    if n_parameters > MOST_PARAMETERS:
        raise ValueError(f"It cannot be built small: {n_parameters / 1e6:.0f} million parameters.")
    model = make(config)
    discrete = kind == "text" or architecture == "imagegpt"
    source = _tokens(model.main_input_name) if discrete else _values(model, kind, architecture)
    specimen = Specimen(model, source, input_layer_of(model) if discrete else None)
    run_once(specimen)
    return specimen


def small(make: Any) -> Any:
    """Return a configuration with the small settings that it knows, also in those inside it."""
    default = make()
    known = {*default.to_dict(), *getattr(make, "attribute_map", {})}
    settings = {
        name: value
        for name, value in SMALL.items()
        if name in known and isinstance(getattr(default, name, None), list | tuple) == isinstance(value, list)
    }
    parts = {name: getattr(default, name, None) for name in getattr(make, "sub_configs", {})}
    settings |= {name: small(type(part)) for name, part in parts.items() if part is not None}
    settings |= INSTEAD.get(make.model_type, {})
    return make(**{name: value for name, value in settings.items() if value is not None})


def _tokens(key: str) -> Callable[[int, Generator], Inputs]:
    def samples(n: int, generator: Generator) -> Inputs:
        ids = torch.randint(FIRST_WORD, VOCABULARY, (n, N_TOKENS), generator=generator)
        ids[:, -1] = END  # some sum up what they read at the end mark
        return {key: ids, "attention_mask": torch.ones_like(ids)}

    return samples


def _values(model: nn.Module, kind: str, architecture: str) -> Callable[[int, Generator], Inputs]:
    """Return a source of images, sounds or films, with what else the model wants to know of each."""
    config, beside = model.config, dict[str, list[Any]]()
    key = "pixel_values" if kind == "image" else model.main_input_name
    side = _side(config)
    shapes: dict[str, tuple[int, ...]] = {
        "image": (3, side, side),
        "audio": (WAVE,),
        "video": (N_FRAMES, 3, side, side),
        "audio-spectrogram-transformer": (64, 32),  # times, frequencies
        "wav2vec2-bert": (N_TIMES, 160),
        "whisper": (80, N_TIMES),
        "siglip2": (16, 3 * 8 * 8),  # patches, pixels of each
    }
    if architecture == "siglip2":
        beside = {"pixel_attention_mask": [1] * 16, "spatial_shapes": [4, 4]}
    elif architecture == "shieldgemma2":
        ids = [1, *[IMAGE_MARK] * 4, 5, 6, END]
        beside = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0, 1, 1, 1, 1, 0, 0, 0]}
    shape = shapes.get(architecture, shapes[kind])

    def samples(n: int, generator: Generator) -> Inputs:
        values = torch.randn(n, *shape, generator=generator)
        return {key: values, **{name: torch.tensor(one).repeat(n, 1) for name, one in beside.items()}}

    return samples


def _side(config: Any) -> int:
    """Return the size of the images that a model was made for, or one that all others take."""
    sizes = (getattr(part, "image_size", None) for part in (config, getattr(config, "vision_config", None)))
    size = next((size for size in sizes if size is not None), IMAGE)
    return size if isinstance(size, int) else size[0]


def input_layer_of(model: nn.Module) -> str:
    """Return the name of the embedding of the tokens that runs, which is the encoder's where there are two."""
    part = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    modules = {module: name for name, module in model.named_modules()}
    embeddings = [module for module in modules if isinstance(module, nn.Embedding)]
    try:
        found = part.get_input_embeddings()
    except NotImplementedError:
        found = None
    return modules[found if found in modules else embeddings[0]]
