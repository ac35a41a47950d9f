"""LoRA on the layers that are advised, for a text classifier of Hugging Face: ``python examples/peft_text.py``.

Nothing is downloaded: the texts are paragraphs of documentation from installed libraries, and the task is to tell which
library a paragraph is from. A small BERT learns three of them from scratch, and then meets others.
"""

import importlib
import inspect
import re
import string
from collections import Counter

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import retrainscope as rs
from retrainscope.export import lora_config

KNOWN, NOVEL = ("numpy", "sklearn", "torch"), ("pandas", "matplotlib", "scipy", "asyncio", "email", "unittest")
MODULES = {
    "numpy": ("numpy", "numpy.linalg", "numpy.random", "numpy.fft", "numpy.ma"),
    "sklearn": ("sklearn.linear_model", "sklearn.ensemble", "sklearn.metrics", "sklearn.cluster", "sklearn.svm"),
    "torch": ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.utils.data"),
    "pandas": ("pandas", "pandas.api.types", "pandas.tseries.offsets"),
    "matplotlib": (
        "matplotlib.axes",
        "matplotlib.figure",
        "matplotlib.patches",
        "matplotlib.colors",
        "matplotlib.ticker",
    ),
    "asyncio": ("asyncio", "concurrent.futures", "threading", "multiprocessing", "subprocess", "socket", "ssl"),
    "email": ("email.message", "email.header", "http.client", "urllib.request", "smtplib", "ftplib", "mailbox"),
    "unittest": ("unittest", "unittest.mock", "logging", "argparse", "configparser", "pathlib", "decimal"),
    "scipy": ("scipy.stats", "scipy.signal", "scipy.optimize", "scipy.sparse", "scipy.spatial"),
}
N_TOKENS, N_TRAIN, N_FEW = 64, 400, 50

Batch = dict[str, Tensor]


def paragraphs(library: str) -> list[str]:
    """Return paragraphs of at least twelve words, each once; no code, and no name of a library."""
    found: dict[str, None] = {}
    for name in MODULES[library]:
        module = importlib.import_module(name)
        things = [module, *(getattr(module, key, None) for key in sorted(dir(module)) if not key.startswith("_"))]
        methods = [m for thing in things if inspect.isclass(thing) for _, m in sorted(vars(thing).items())]
        for thing in [*things, *methods]:
            text = inspect.getdoc(thing) if callable(thing) or inspect.ismodule(thing) else None
            for part in re.split(r"\n\s*\n", text or ""):
                words = re.sub(r"[^a-z ]+", " ", part.lower()).split()
                if ">>>" not in part and len(words) >= 12:
                    found[" ".join(word for word in words if word not in MODULES)] = None
    return [*found]


def _frequent(counts: Counter[str], n: int) -> list[str]:
    return sorted(counts, key=lambda piece: (-counts[piece], piece))[:n]


def encoded(texts: list[str], tokenizer: Tokenizer) -> Batch:
    """Turn texts into token ids, their positions, and the mask that tells what is padding.

    BERT would number the positions itself, once for all texts; with a row a text the gradients of each text's
    positions can be told apart in one pass for many texts, which makes the advice five times as fast.
    """
    batch = tokenizer.encode_batch(texts)
    ids, mask = (torch.tensor([getattr(one, key) for one in batch]) for key in ("ids", "attention_mask"))
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def fit(model: nn.Module, X: Batch, y: Tensor, *, epochs: int, lr: float) -> None:
    """Train what needs a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(32):
            optimizer.zero_grad()
            model(**{key: value[rows] for key, value in X.items()}, labels=y[rows]).loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, X: Batch, y: Tensor) -> float:
    """Return the share of texts that are classified right."""
    return float((model(**X).logits.argmax(dim=1) == y).float().mean())


def main() -> None:
    """Train, advise, and adapt."""
    texts = {library: paragraphs(library) for library in (*KNOWN, *NOVEL)}
    words = Counter(word for library in KNOWN for text in texts[library][:N_TRAIN] for word in text.split())
    ends = Counter(f"##{word[-n:]}" for word in words for n in (2, 3, 4) if len(word) > n + 2)
    pieces = [*(mark + letter for mark in ("", "##") for letter in string.ascii_lowercase), *_frequent(words, 2500)]
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", *pieces, *_frequent(ends, 500)])
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=N_TOKENS)
    tokenizer.enable_truncation(N_TOKENS)

    def data(libraries: tuple[str, ...], start: int, stop: int) -> tuple[Batch, Tensor]:
        chosen = [texts[library][start::2][:stop] for library in libraries]
        labels = torch.arange(len(libraries)).repeat_interleave(torch.tensor([len(part) for part in chosen]))
        return encoded([text for part in chosen for text in part], tokenizer), labels

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=N_TOKENS, num_labels=len(KNOWN),
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    fit(model, *data(KNOWN, 0, N_TRAIN), epochs=6, lr=1e-3)
    known, novel, test = data(KNOWN, 1, 80), data(NOVEL, 0, N_FEW), data(NOVEL, 1, 200)
    print({library: len(found) for library, found in texts.items()})
    print(f"{accuracy(model, *known):.1%} of the known libraries' texts right")

    rec = rs.recommend_layers(
        model, known, (novel[0], novel[1] + len(KNOWN)), layers=["bert.encoder.layer.*"],
        input_layer="bert.embeddings", random_state=0,
    )  # fmt: skip
    print(rec)

    rs.replace_head(model, len(NOVEL), head=rec, random_state=0)
    rs.freeze_rest(model, rec)  # what PEFT leaves on: dropout in frozen layers
    adapted: nn.Module = model
    if rec.layers:
        adapted = peft.get_peft_model(model, lora_config(rec, model, r=8, lora_alpha=16))
        adapted.print_trainable_parameters()
    else:  # the texts are those of the libraries that are installed, and with others it may be undecided
        print("Nothing is left for LoRA to adapt: the head alone is trained.")
    fit(adapted, *novel, epochs=15, lr=2e-3)
    right = accuracy(adapted, *test)
    print(f"{right:.1%} of the novel libraries' texts right")

    rows = [row for row in (*rec.table, rec.head) if row.verdict == "retrain"]
    owners = {name.rpartition(".")[0] for row in rows for name in row.parameters}  # BERT's pooler counts with its head
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(any(f".{owner}." in f".{name}" for owner in owners) for name in trained)
    assert right > (0.35 if rec.layers else 0.2)  # by chance a sixth


if __name__ == "__main__":
    main()
