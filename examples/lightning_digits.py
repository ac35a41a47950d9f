"""Lightning trains what is advised, and nothing else: ``python examples/lightning_digits.py``."""

import copy

import lightning.pytorch as pl
import torch
from digits import accuracy, digits, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import retrainscope as rs
from retrainscope.export import lightning_callback


class Classifier(pl.LightningModule):
    """A network, trained by cross-entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; the callback has frozen the rest before."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=2e-3)


def main() -> None:
    """Advise, replace the head, train, and see that what is frozen has not moved."""
    model = network()
    known, unknown = digits(range(5), start=300), digits(range(5, 10))
    rec = rs.recommend_layers(model, known, unknown, random_state=0)
    print(rec)

    rs.replace_head(model, 5, head=rec, random_state=0)
    before = copy.deepcopy(model.state_dict())
    (X, y), (X_test, y_test) = unknown, digits(range(5, 10), n=200, test=True)
    trainer = pl.Trainer(
        max_epochs=15,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[lightning_callback(rec, attribute="model")],
    )
    pl.seed_everything(0)
    trainer.fit(Classifier(model), DataLoader(TensorDataset(X, y - 5), batch_size=32, shuffle=True))

    right = accuracy(model, (X_test, y_test - 5))
    print(f"{right:.1%} of the new digits right")
    trained = {name for row in (*rec.table, rec.head) if row.verdict == "retrain" for name in row.parameters}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained
    assert right > 0.9


if __name__ == "__main__":
    main()
