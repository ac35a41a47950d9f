"""Is the advice right? Retrain by every choice of layers and see: ``python examples/compare_with_sweep.py``."""

from digits import digits, network

import retrainscope as rs


def main() -> None:
    """Print the forecast, then what came out."""
    model = network()
    known, unknown = digits(range(5), start=300), digits(range(5, 10))
    rec = rs.recommend_layers(model, known, unknown, random_state=0)
    print(f"{rec.forecast}\n\n{rec.summary()}\n")

    options = {"steps": 100, "learning_rates": (1e-3, 3e-3), "n_seeds": 2, "random_state": 0}
    sweep = rec.verify(model, known, unknown, test=digits(range(5, 10), n=200, test=True), **options)
    print(sweep)

    regret, low, high = sweep.regret(sweep.advised)
    print(f"The advice leaves {100 * regret:.1f} points [{100 * low:.1f}, {100 * high:.1f}] lying: {sweep.advised}.")
    assert regret < 0.03
    assert regret < sweep.regret("head")[0]


if __name__ == "__main__":
    main()
