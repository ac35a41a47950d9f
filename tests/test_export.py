"""The advice in other tools: each trains what is advised, and leaves everything else bit for bit as it was."""

import importlib
import pickle
import re
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from advised import BlockNet, advise, assert_trained_by, changed, contents, labelled, owned, trainable
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, MissingExtraError, UnsupportedModelError
from retrainscope.export import (
    finetuning_schedule,
    lightning_callback,
    lora_config,
    parameter_patterns,
    skorch_freezer,
    timm_frozen,
)

# Of what these libraries use, and, by Lightning, of the number of workers and that modules are in evaluation mode.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
warns = pytest.mark.filterwarnings("ignore::UserWarning")

ADVICE = [(("blocks.1",), "retrain"), (("blocks.0", "blocks.2"), "keep"), ((), "retrain")]
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def block_net(layers: tuple[str, ...] = ("blocks.1",), head: str = "retrain") -> tuple[nn.Module, rs.Recommendation]:
    """Return the network in training mode, and advice to retrain these of its layers."""
    model = BlockNet()
    return model, advise(model, labelled()[0], layers, BLOCKS, head=head)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*labelled()), batch_size=8)


def test_patterns_fit_what_is_advised_and_nothing_else():
    """A module all of whose parameters are trained is one pattern; of others each parameter is named."""
    model, rec = block_net(("blocks.1", "blocks.2"))
    assert parameter_patterns(rec) == ["blocks.1.*", "blocks.2.*", "head.*"]
    names = {name for name, _ in model.named_parameters()}
    fit = {name for name in names for pattern in parameter_patterns(rec) if fnmatch(name, pattern)}
    assert fit == owned(rec)[0]


def test_patterns_of_a_part():
    """A parameter beside others that stay is named in full, and what means something in a pattern is quoted."""
    _, rec = block_net()
    table = (replace(rec.table[0], parameters=("a.b[0].weight", "c.d.weight")), replace(rec.table[1]))
    table = (table[0], replace(table[1], parameters=("a.b[0].bias",)))
    rec = replace(rec, layers=("blocks.0",), table=table, head=replace(rec.head, verdict="keep"))
    assert parameter_patterns(rec) == ["a.b[[]0].weight", "c.*"]
    assert fnmatch("a.b[0].weight", parameter_patterns(rec)[0])


def test_patterns_of_everything():
    """Where all is trained, one pattern fits all."""
    _, rec = block_net(tuple(BLOCKS))
    assert parameter_patterns(rec) == ["*"]


def lightning_module(package: str, model: nn.Module, attribute: str = "model") -> nn.Module:
    """Return a LightningModule that holds the model, trains it with all of its parameters, and validates it."""
    pl = importlib.import_module(package)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            setattr(self, attribute, model)

        def forward(self, x):
            return getattr(self, attribute)(x)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)

    return Module()


def lightning_trainer(package: str, folder: Path, **options: object) -> object:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = sys.modules[package].Trainer
    return trainer(accelerator="cpu", max_epochs=2, default_root_dir=folder, **quiet, **options)


@warns
@pytest.mark.parametrize(("layers", "head"), ADVICE)
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning(package, layers, head, tmp_path, monkeypatch):
    """After epochs with validation between them, only what is advised has changed, in whichever package."""
    model, rec = block_net(layers, head)
    module = lightning_module(package, model)
    if package != "lightning.pytorch":
        for name in ("lightning.pytorch", "lightning.pytorch.callbacks"):
            monkeypatch.setitem(sys.modules, name, None)
    callback = lightning_callback(rec, attribute="model")
    assert isinstance(callback, sys.modules[package].callbacks.BaseFinetuning)
    trainer = lightning_trainer(package, tmp_path, callbacks=[callback], enable_checkpointing=False)
    before = contents(model)
    trainer.fit(module, loader(), loader())
    assert_trained_by(rec, model, before)
    rs.unfreeze(model)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


@warns
def test_lightning_goes_on_from_a_checkpoint(tmp_path):
    """A training that goes on from its checkpoint, with a callback that was pickled, is frozen as before."""
    model, rec = block_net()
    module = lightning_module("lightning.pytorch", model)
    callback = pickle.loads(pickle.dumps(lightning_callback(rec, attribute="model")))
    trainer = lightning_trainer("lightning.pytorch", tmp_path, callbacks=[callback])
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model, _ = block_net()
    module = lightning_module("lightning.pytorch", model)
    callback = lightning_callback(rec, attribute="model")
    trainer = lightning_trainer("lightning.pytorch", tmp_path, callbacks=[callback], enable_checkpointing=False)
    trainer.fit_loop.max_epochs = 4
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    trainer.fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    parameters, buffers = owned(rec)
    assert trainable(model) == parameters
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, loaded[f"model.{name}"])}
    assert parameters <= moved <= parameters | buffers | {"blocks.1.norm.num_batches_tracked"}


@warns
def test_lightning_without_an_attribute(tmp_path):
    """The model may be the LightningModule itself, and one that lacks the attribute or parameters is refused."""
    model, _ = block_net()
    del model.spare
    module = lightning_module("lightning.pytorch", model)
    rec = advise(module, labelled()[0], ("model.blocks.1",), [f"model.{name}" for name in BLOCKS])
    before = contents(module)

    def fit(callback):
        trainer = lightning_trainer("lightning.pytorch", tmp_path, callbacks=[callback], enable_checkpointing=False)
        trainer.fit(module, loader())

    fit(lightning_callback(rec))
    assert_trained_by(rec, module, before)
    with pytest.raises(LayerNotFoundError, match=r"no attribute named 'modle'. Did you mean 'model"):
        fit(lightning_callback(rec, attribute="modle"))
    with pytest.raises(LayerNotFoundError, match=r"another model.*'model\.blocks\.1'"):
        fit(lightning_callback(rec, attribute="model"))


@pytest.mark.parametrize(("layers", "head"), ADVICE)
def test_skorch(layers, head):
    """Skorch trains what is advised, also after the net was pickled."""
    import skorch

    model, rec = block_net(layers, head)
    net = skorch.NeuralNetClassifier(
        model,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=0.05,
        optimizer__weight_decay=0.1,
        max_epochs=2,
        train_split=skorch.dataset.ValidSplit(2),
        callbacks=[("freeze", skorch_freezer(rec))],
        verbose=0,
    )
    before = contents(model)
    net.fit(*labelled())
    assert_trained_by(rec, net.module_, before)
    twin = pickle.loads(pickle.dumps(net))
    before = contents(twin.module_)
    twin.partial_fit(*labelled())
    assert_trained_by(rec, twin.module_, before)


@warns
@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(("layers", "head"), ADVICE)
def test_finetuning_scheduler(layers, head, as_file, tmp_path):
    """The real scheduler reads the schedule, trains what is advised, and with freeze_rest nothing else changes."""
    import finetuning_scheduler as fts

    model, rec = block_net(layers, head)
    module = lightning_module("lightning.pytorch", model)
    schedule = finetuning_schedule(rec, tmp_path / "schedule.yaml", attribute="model")
    assert schedule == {0: {"params": [f"model.{name}" for name in rs_names(rec)]}}
    rs.freeze_rest(model, rec)
    given = str(tmp_path / "schedule.yaml") if as_file else schedule
    callback = fts.FinetuningScheduler(ft_schedule=given, logging_level=40)
    trainer = lightning_trainer("lightning.pytorch", tmp_path, callbacks=[callback])
    before = contents(model)
    trainer.fit(module, loader(), loader())
    assert_trained_by(rec, model, before)


def rs_names(rec: rs.Recommendation) -> list[str]:
    rows = [row for row in (*rec.table, rec.head) if row.verdict == "retrain"]
    return [name for row in rows for name in row.parameters]


def test_huggingface_trainer(tmp_path):
    """With freeze_rest, Hugging Face's Trainer, which calls model.train(), trains what is advised alone."""
    import transformers

    model = tiny_bert()
    rec = advise(model, token_data(), ("bert.encoder.layer.1",), BERT)
    rs.freeze_rest(model, rec)
    ids, labels = token_data()["input_ids"], torch.arange(12) % 3
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        **{"output_dir": str(tmp_path), "num_train_epochs": 1, "per_device_train_batch_size": 4, "use_cpu": True},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.01},
        weight_decay=0.1,
    )
    before = contents(model)
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert_trained_by(rec, model, before)


def tiny_bert(n_layers: int = 3) -> nn.Module:
    """Return a classifier of three classes with dropout."""
    import transformers

    config = transformers.BertConfig(
        **{"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": n_layers, "num_attention_heads": 2},
        **{"intermediate_size": 12, "max_position_embeddings": 12, "num_labels": 3},
    )
    return transformers.BertForSequenceClassification(config)


def token_data() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 20, (12, 6)), "attention_mask": torch.ones(12, 6, dtype=torch.long)}


class Kinds(nn.Module):
    """Modules of many kinds, one parameter beside them, and two modules that are named alike."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.place = nn.Parameter(torch.randn(6, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, groups=8))
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.weighted = weight_norm(nn.Linear(8, 8))
        self.inner = nn.ModuleDict({"norm": nn.Linear(8, 8)})
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits."""
        x = self.table(ids) + self.place
        x = self.attention(x, x, x)[0]
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = self.norm(self.inner["norm"](self.weighted(self.recurrent(x)[0])))
        return self.head(x.mean(dim=1))


def numbered() -> nn.Sequential:
    """Return layers whose numbers are the ends of others, and the head "14"."""
    modules: list[nn.Module] = [nn.Linear(4, 4) for _ in range(14)]
    modules[3] = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return nn.Sequential(*modules, nn.Linear(4, 3))


def apart(peft_model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the modules that have adapters and those that PEFT trains whole, by the names they had."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    inside = dict(peft_model.base_model.model.named_modules())
    adapted = {name for name, module in inside.items() if isinstance(module, BaseTunerLayer)}
    return adapted, {name for name, module in inside.items() if isinstance(module, ModulesToSaveWrapper)}


BERT = [f"bert.encoder.layer.{n}" for n in range(3)]
LINEAR = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
LINEAR += ("intermediate.dense", "output.dense")
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
KINDS = ["table", "attention", "mix.0", "mix.1", "recurrent", "weighted", "inner.norm"]


def case(name: str) -> tuple[nn.Module, object, rs.Recommendation, set[str], set[str]]:
    """Return a model, data, advice, and what is to be adapted and what to be trained whole."""
    if name.startswith("blocks"):
        model, rec = block_net(*((("blocks.1",), "retrain") if name == "blocks" else (("blocks.0",), "keep")))
        n = 1 if name == "blocks" else 0
        return model, labelled()[0], rec, {f"blocks.{n}.fc"}, {f"blocks.{n}.norm", *(["head"] if n else [])}
    if name == "bert":
        model, data = tiny_bert(), token_data()
        rec = advise(model, data, (BERT[0], BERT[2]), ["bert.embeddings", *BERT])
        adapted = {f"{BERT[n]}.{part}" for n in (0, 2) for part in LINEAR}
        return (
            model,
            data,
            rec,
            adapted,
            {"bert.pooler.dense", "classifier", *(f"{BERT[n]}.{part}" for n in (0, 2) for part in NORMS)},
        )
    if name.startswith("numbered"):
        model, data = numbered(), labelled()[0]
        layers = ("5", "12") if name == "numbered" else ("4", "3.2", "13")
        rec = advise(model, data, layers, [*(str(n) for n in range(14) if n != 3), "3.0", "3.2", "3.4"])
        return model, data, rec, set(layers), {"14"}
    model, data = Kinds(), token_data()["input_ids"]
    rec = advise(model, data, tuple(KINDS), KINDS)
    whole = {"attention", "mix.1", "recurrent", "weighted", "head"}
    return model, data, rec, {"table", "mix.0", "inner.norm"}, whole


@pytest.mark.parametrize("name", ["blocks", "blocks without the head", "bert", "numbered", "numbered alike", "kinds"])
@pytest.mark.filterwarnings("ignore:These are to be trained:UserWarning", "ignore:.*find a config file:UserWarning")
def test_peft(name, tmp_path):
    """Exactly the modules that LoRA can adapt get adapters, others are trained whole, and nothing of the base moves."""
    import peft

    model, data, rec, adapted, whole = case(name)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rs.freeze_rest(model, rec)
    before = contents(model)
    tuned = peft.get_peft_model(model, lora_config(rec, model, r=2))
    assert apart(tuned) == (adapted, whole)
    places = [f"base_model.model.{place}." for place in sorted(adapted | whole)]
    assert all(key.startswith(tuple(places)) for key in trainable(tuned))
    assert all(any(key.startswith(place) for key in trainable(tuned)) for place in places)
    train(tuned, data)
    assert changed(before) == set()
    kept = {id(tensor) for tensor in (*tuned.parameters(), *tuned.buffers())}
    assert kept >= {id(tensor) for tensor, _ in before.values()}

    tuned.save_pretrained(tmp_path)
    fresh = type(model)(model.config) if name == "bert" else case(name)[0]
    fresh.load_state_dict(weights)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(logits(again.eval(), data), logits(tuned.eval(), data))


def train(model: nn.Module, data: object) -> None:
    """Train as a user does, in training mode and with weight decay."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    model.train()
    for _ in range(3):
        loss = logits(model, data).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def logits(model: nn.Module, data: object) -> Tensor:
    return model(**data).logits if isinstance(data, dict) else model(data)


def test_peft_of_blocks_is_short():
    """Blocks of one list are named by what is in a block and by their numbers, and others in full."""
    model, _, rec, _, _ = case("bert")
    config = lora_config(rec, model)
    assert config.target_modules == set(LINEAR)
    assert (config.layers_to_transform, config.layers_pattern) == ([0, 2], ["layer"])
    model, _, rec, adapted, _ = case("numbered")
    config = lora_config(rec, model, lora_alpha=3)
    assert config.target_modules == adapted
    assert (config.layers_to_transform, config.lora_alpha) == (None, 3)


def test_peft_tells_what_it_leaves():
    """A parameter beside others and a module whose name others end with stay frozen, and a warning names them."""
    model, _, rec, _, _ = case("kinds")
    with pytest.warns(UserWarning, match=r"stay frozen, since PEFT cannot train them alone: place, norm\. "):
        lora_config(rec, model)


def test_peft_refuses_what_it_cannot_train():
    """Advice that leaves nothing to adapt, and a head whose name others end with, are errors."""
    model, rec = block_net(())
    with pytest.raises(
        InvalidDataError, match=r"LoRA can adapt nothing of what is to be trained \(head\).*freeze_rest"
    ):
        lora_config(rec, model)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 3))
    rec = advise(model, labelled()[0], ("0",), ["0", "1.0", "1.2"])
    with pytest.raises(UnsupportedModelError, match=r"not only train the head '2', but all .* end like that: 1\.2\. "):
        lora_config(rec, model)


def test_timm_names_the_largest_frozen_modules():
    """Named are the largest modules with nothing to train; other ones than whole modules are refused."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    names = ["0.0", "0.1", "2"]
    rec = advise(model, labelled()[0], ("2",), names)
    assert timm_frozen(rec, model) == ["0"]
    rec = advise(model, labelled()[0], ("0.1",), names, head="keep")
    assert timm_frozen(rec, model) == ["0.0", "2", "3"]
    rec = advise(model, labelled()[0], tuple(names), names)
    with pytest.raises(InvalidDataError, match="Everything is to be trained"):
        timm_frozen(rec, model)
    model, rec = block_net()
    with pytest.raises(UnsupportedModelError, match=r"'spare' is to be frozen in one that is trained.*freeze_rest"):
        timm_frozen(rec, model)
    del model.spare
    with pytest.raises(UnsupportedModelError, match=r"statistics of 'blocks\.0\.norm' \(BatchNorm1d\).*freeze_rest"):
        timm_frozen(rec, model)


EXPORTERS = {
    "patterns": lambda rec, model: parameter_patterns(rec),
    "lightning": lambda rec, model: lightning_callback(rec),
    "skorch": lambda rec, model: skorch_freezer(rec),
    "schedule": lambda rec, model: finetuning_schedule(rec),
    "peft": lora_config,
    "timm": timm_frozen,
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("head", "reason"), [("keep", "Nothing is to be trained: no layer with"), ("undecided", "The advice is undecided")]
)
def test_nothing_to_train(exporter, head, reason):
    """Advice that trains nothing is refused at once, and where it is undecided the message says that."""
    model, rec = block_net((), head)
    with pytest.raises(InvalidDataError, match=rf"{reason}.*train_only\(model, "):
        EXPORTERS[exporter](rec, model)


@pytest.mark.parametrize("exporter", [exporter for exporter in EXPORTERS if exporter != "timm"])
@pytest.mark.parametrize("names", [["blocks.1"], "blocks.1"])
def test_names_instead_of_advice(exporter, names):
    """What an exporter needs is told by advice alone; names are refused with where they can be given."""
    with pytest.raises(InvalidDataError, match=rf"a Recommendation, .* Got {type(names).__name__} instead\. Names are"):
        EXPORTERS[exporter](names, BlockNet())


@pytest.mark.parametrize("exporter", ["peft", "timm"])
def test_advice_for_another_model(exporter):
    """Advice for another model is refused with the layers that do not fit."""
    _, rec = block_net()
    with pytest.raises(LayerNotFoundError, match=r"for another model: it names the layers? 'blocks\.1'"):
        EXPORTERS[exporter](rec, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))


@pytest.mark.parametrize(
    ("exporter", "modules"),
    [
        (
            "lightning",
            ["lightning.pytorch", "lightning.pytorch.callbacks", "pytorch_lightning", "pytorch_lightning.callbacks"],
        ),
        ("skorch", ["skorch", "skorch.callbacks"]),
        ("peft", ["peft", "peft.tuners.tuners_utils"]),
    ],
)
def test_a_library_that_is_missing(exporter, modules, monkeypatch):
    """Without the library, the message names it and the extra that brings it."""
    model, rec = block_net()
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"{exporter} is needed.*pip install 'retrainscope\[{exporter}\]'"):
        EXPORTERS[exporter](rec, model)


PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
SET_UP, *SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@warns
@pytest.mark.parametrize(
    "tool", ["lightning_callback", "lora_config", "transformers", "skorch", "finetuning_scheduler"]
)
def test_the_page_runs(tool, tmp_path, monkeypatch):
    """The example for each tool runs after the lines at the top of the page, and trains the advised layers."""
    monkeypatch.chdir(tmp_path)
    snippet = next(code for code in SNIPPETS if tool in code)
    names: dict[str, object] = {}
    exec(compile(SET_UP, "docs/export.md", "exec"), names)
    model, rec = names["model"], names["rec"]
    assert (rec.layers, rec.head.verdict) == (("0",), "retrain")
    exec(compile(snippet, "docs/export.md", "exec"), names)
    model = names.get("adapted", model)  # PEFT's is a copy
    assert any(not parameter.requires_grad for parameter in model.parameters())
    if tool != "lora_config":
        assert trainable(model) == owned(rec)[0]
