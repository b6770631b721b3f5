"""Train a small GPT to write constitutions, with ``cuflash.attention_vjp`` (see transformer.py).

    python examples/gpt.py            # a minute or two on a CPU; on a GPU a larger model, with attention in bfloat16
    python examples/gpt.py --quick    # seconds

The model reads the founding documents of the United States and guesses each letter from those before it. Every tenth
sentence is held out. In the end it writes a new amendment: exit code 1 if it has learnt no more than how often each
letter occurs.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transformer import GPT, Array, cross_entropy, xp

TEXT = Path(__file__).parent / "data" / "founding_documents.tsv"
PROMPT = "Amendment XXVIII:"


class Size(NamedTuple):
    """Of the model, and of its training."""

    num_layers: int
    num_heads: int
    width: int
    seqlen: int
    batch: int
    steps: int
    rate: float


QUICK = Size(num_layers=2, num_heads=2, width=32, seqlen=32, batch=8, steps=150, rate=1e-2)
CPU = Size(num_layers=3, num_heads=3, width=96, seqlen=64, batch=16, steps=800, rate=8e-3)
GPU = Size(num_layers=6, num_heads=4, width=256, seqlen=256, batch=32, steps=300, rate=4e-3)


class AdamW:
    """Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101, updating weights in place."""

    def __init__(self, weights: list[Array], decay: float = 0.3) -> None:
        self.weights, self.decay, self.step = weights, decay, 0
        self.moments = [(xp.zeros_like(w), xp.zeros_like(w)) for w in weights]

    def update(self, gradients: list[Array], rate: float) -> None:
        """Take one step."""
        self.step += 1
        for w, g, (first, second) in zip(self.weights, gradients, self.moments, strict=True):
            first += 0.1 * (g - first)
            second += 0.01 * (g * g - second)
            mean, square = first / (1 - 0.9**self.step), second / (1 - 0.99**self.step)
            w -= rate * (mean / (xp.sqrt(square) + 1e-8) + self.decay * w)


def read_text() -> tuple[str, str]:
    """Read what to learn from and, held out, every tenth sentence."""
    lines = [line.replace("\t", ": ") + "\n" for line in TEXT.read_text().splitlines()]
    return "".join(line for i, line in enumerate(lines) if i % 10), "".join(lines[::10])


def cut(text: Array, starts: Array, seqlen: int) -> tuple[Array, Array]:
    """Cut sequences (batch, seqlen) out of a text, and what a model should guess: the same, one letter later."""
    windows = xp.asarray(text[starts[:, None] + np.arange(seqlen + 1)])
    return windows[:, :-1], windows[:, 1:]


def train(
    model: GPT, learnt: Array, held_out: Array, size: Size, rng: np.random.Generator
) -> tuple[list[float], dict[int, float]]:
    """Give the loss of each step and, for some steps, the loss on the text that is held out."""
    adam, start = AdamW(model.weights), time.perf_counter()
    test_tokens, test_targets = cut(held_out, np.arange(0, len(held_out) - size.seqlen, size.seqlen), size.seqlen)
    losses, test_losses = [], {}
    for step in range(size.steps + 1):
        tokens, targets = cut(learnt, rng.integers(len(learnt) - size.seqlen, size=size.batch), size.seqlen)
        logits, model_vjp = model(tokens)
        loss, loss_vjp = cross_entropy(logits, targets)
        losses.append(loss)  # an array: float(loss) would wait for the GPU in every step
        if step % max(1, size.steps // 10) == 0 or step == size.steps:
            test_losses[step] = float(cross_entropy(model(test_tokens)[0], test_targets)[0])
            seconds = time.perf_counter() - start
            print(f"step {step:4}  loss {float(loss):.3f}  held out {test_losses[step]:.3f}  {seconds:5.1f} s")
        rate = size.rate * min(1, (step + 1) / 20) * (1 - step / (size.steps + 1))
        # Gradients of the sum of the losses, not of their mean: in float16 they would vanish. Adam takes any factor.
        adam.update(model_vjp(loss_vjp(targets.size)), rate)
    return [float(loss) for loss in losses], test_losses


def write(model: GPT, text: list[int], length: int, seqlen: int, rng: np.random.Generator) -> list[int]:
    """Continue a text by letters from softmax(logits / 0.7); the largest logit after Gumbel noise is such a letter."""
    for _ in range(length):
        logits, _ = model(xp.asarray([text[-seqlen:]]))
        noise = xp.asarray(rng.gumbel(size=logits.shape[-1]))
        text = [*text, int((logits[0, -1] / 0.7 + noise).argmax())]
    return text


def draw(losses: list[float], test_losses: dict[int, float], frequencies_loss: float, path: Path) -> None:
    """Draw the losses over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(losses, color="#2b5fd1", alpha=0.5, label="training")
    axes.plot(*zip(*test_losses.items(), strict=True), color="#d1702b", marker="o", label="held out")
    axes.axhline(frequencies_loss, color="#9a9a9a", linestyle="--", label="letter frequencies alone")
    axes.set(xlabel="step", ylabel="loss, nats per letter", title="A GPT with cuflash.attention_vjp")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def default_dtype() -> str:
    """Name the type of attention: half precision on a GPU, bfloat16 if it can be had."""
    if xp is np:
        return "float32"
    has_bfloat16 = int(xp.cuda.Device().compute_capability) >= 80 and importlib.util.find_spec("ml_dtypes")
    return "bfloat16" if has_bfloat16 else "float16"


def main() -> int:
    """Train, draw and write; 1 if the model knows no more than how often each letter occurs."""
    parser = argparse.ArgumentParser(description="Train a small GPT on the founding documents of the United States.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--steps", type=int, help="of training; default: what suits the model")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same model (default: 0)")
    dtypes = "float16", "bfloat16", "float32"
    parser.add_argument("--dtype", choices=dtypes, default=default_dtype(), help="of attention (default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("build/gpt_loss.png"), help="file for the curve of the loss")
    arguments = parser.parse_args()
    if arguments.dtype == "bfloat16":
        import ml_dtypes  # noqa: F401, from here on NumPy knows the name
    size = QUICK if arguments.quick else CPU if xp is np else GPU
    if arguments.steps is not None:
        size = size._replace(steps=arguments.steps)
    if size.steps < 0:
        parser.error(f"--steps must be 0 or more, not {size.steps}")

    texts = read_text()
    alphabet = sorted(set("".join(texts)))
    learnt, held_out = (np.array([alphabet.index(letter) for letter in text]) for text in texts)
    frequencies = np.bincount(learnt, minlength=len(alphabet)) + 1
    frequencies_loss = -float(np.log(frequencies / frequencies.sum())[held_out].mean())

    rng = np.random.default_rng(arguments.seed)
    sizes = {"num_layers": size.num_layers, "num_heads": size.num_heads, "width": size.width}
    model = GPT(rng, num_letters=len(alphabet), dtype=np.dtype(arguments.dtype), **sizes)
    print(f"{sum(w.size for w in model.weights)} weights, {len(learnt)} letters to learn from,", end=" ")
    print(f"{xp.__name__}, attention in {arguments.dtype}.")
    losses, test_losses = train(model, learnt, held_out, size, rng)
    print(f"Held out, from letter frequencies alone: {frequencies_loss:.3f}")
    if importlib.util.find_spec("matplotlib"):
        draw(losses, test_losses, frequencies_loss, arguments.plot)
        print(f"The curve: {arguments.plot}")

    prompt = [alphabet.index(letter) for letter in PROMPT]
    written = write(model, prompt, 100 if arguments.quick else 400, size.seqlen, rng)
    print("\n" + "".join(alphabet[letter] for letter in written))
    return 0 if test_losses[size.steps] < frequencies_loss else 1


if __name__ == "__main__":
    sys.exit(main())
