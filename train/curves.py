"""The loss of a training run as a picture."""

from pathlib import Path
from typing import Any

SMOOTH = 20  # steps over which the line in front is averaged


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """Writes a picture of what the Trainer has logged: loss and learning rate by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in history if "loss" in row]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    wide = max(1, min(SMOOTH, len(losses) // 5))
    smooth = [sum(losses[max(0, i - wide + 1) : i + 1]) / min(i + 1, wide) for i in range(len(losses))]
    figure, plot = pyplot.subplots(figsize=(7, 4))
    plot.plot(steps, losses, color="#56B4E9", lw=0.8, label="loss")
    plot.plot(steps, smooth, color="#0072B2", lw=2, label=f"mean of {wide}")
    plot.set_xlabel("step")
    plot.set_ylabel("loss a token of the answers")
    plot.grid(alpha=0.25)
    rate = plot.twinx()
    rate.plot(steps, [row["learning_rate"] for row in rows], color="grey", ls=":", lw=1)
    rate.set_ylabel("learning rate")
    plot.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
