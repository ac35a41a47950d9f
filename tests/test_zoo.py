"""Architectures of Hugging Face, tiny and random: layers found, every parameter owned once, the model untouched."""

import numpy as np
import pytest
import torch
from helpers import unchanged
from torch import nn

import retrainscope as rs

transformers = pytest.importorskip("transformers", reason="the group test brings it")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TEXT = (
    "albert", "bert", "big_bird", "biogpt", "bloom", "camembert", "convbert", "ctrl", "deberta", "deberta-v2",
    "distilbert", "electra", "ernie", "esm", "falcon", "flaubert", "fnet", "funnel", "gemma", "gemma2", "gpt2",
    "gpt_neox", "gpt_oss", "layoutlm", "llama", "longformer", "megatron-bert", "mistral", "mixtral", "mobilebert",
    "modernbert", "mpnet", "mpt", "nystromformer", "olmo", "openai-gpt", "opt", "persimmon", "phi", "phi3", "qwen2",
    "qwen3", "rembert", "roberta", "roformer", "squeezebert", "stablelm", "starcoder2", "xlm", "xlm-roberta",
)  # fmt: skip
IMAGES = (
    "beit", "dinov2", "dinov2_with_registers", "focalnet", "ijepa", "mobilenet_v2", "pp_lcnet", "poolformer",
    "regnet", "resnet", "vit",
)  # fmt: skip
SOUND = ("hubert", "wav2vec2")
# Given to each configuration as far as it knows the name.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 0, "head_dim": 8},
    **{"num_key_value_heads": 2, "image_size": 32, "patch_size": 8, "embed_dim": 16},
    "attention_window": 4,
    **{"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 40]},
}
N_SAMPLES = 12


def tiny(kind: str, task: str) -> nn.Module:
    """Build the classifier of an architecture with a small configuration and random weights."""
    make = transformers.CONFIG_MAPPING[kind]
    known = {*make().to_dict(), *getattr(make, "attribute_map", {})}
    config = make(**{name: value for name, value in SMALL.items() if name in known}, num_labels=4)
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{task}Classification").from_config(config)


def check(model: nn.Module, data: dict[str, object], input_layer: str | None = None) -> None:
    """Find the layers, measure the spread, and look at what both say and leave behind."""
    with torch.no_grad():  # some set up hooks or attention of their own when they first run
        model.eval()(**{name: value[:2] for name, value in data.items() if name != "labels"})
    model.train()
    with unchanged(model):
        found = rs.find_layers(model, data, input_layer=input_layer)
        spread = rs.ActivationSpread(model, input_layer=input_layer, random_state=0, batch_size=5)
        scores = spread.fit(data).score_layers(data)
    listed = sorted([*found.unused, *(name for names in found.parameters.values() for name in names)])
    assert listed == sorted(name for name, _ in model.named_parameters())
    assert 2 <= len(found.names) <= 24
    assert scores.layers == found.names
    finite = np.isfinite(scores.known)  # a layer that is silent, as random ones can be, has no spread
    assert finite.mean() > 0.8
    np.testing.assert_allclose(scores.values[finite], 0, atol=1e-6)  # the data is compared with itself


@pytest.mark.parametrize("kind", TEXT)
def test_text(kind):
    """A classifier of token ids is measured from its embedding on."""
    model = tiny(kind, "Sequence")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (N_SAMPLES, 12), generator=generator)
    mask = (torch.arange(12) < torch.arange(N_SAMPLES)[:, None] % 4 + 8).long()
    labels = torch.arange(N_SAMPLES) % 3
    embedding = model.get_input_embeddings()
    input_layer = next(name for name, module in model.named_modules() if module is embedding)
    check(model, {"input_ids": ids, "attention_mask": mask, "labels": labels}, input_layer)


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind):
    """A classifier of images is measured from the pixels on."""
    model = tiny(kind, "Image")
    size = model.config.image_size if isinstance(getattr(model.config, "image_size", None), int) else 64
    images = torch.randn(N_SAMPLES, 3, size, size)
    check(model, {"pixel_values": images, "labels": torch.arange(N_SAMPLES) % 3})


@pytest.mark.parametrize("kind", SOUND)
def test_sound(kind):
    """A classifier of sound is measured from the waveform on."""
    check(tiny(kind, "Audio"), {"input_values": torch.randn(N_SAMPLES, 3000), "labels": torch.arange(N_SAMPLES) % 3})
