"""Hub data sets of the benchmark part ``quality``, as local files with the same columns."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quality import decisions, hub, images, training
from extras import needs


def folder(path: Path, columns: Mapping[str, Any]) -> str:
    datasets = needs("datasets")
    path.mkdir()
    datasets.Dataset.from_dict(dict(columns)).to_parquet(path / "train.parquet")
    return str(path)


def test_gsm8k_and_metamathqa(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", {"question": ["1+1?", "2+2?"], "answer": ["#### 2", "#### 4"]})
    second = folder(tmp_path / "b", {"query": ["3+3?"], "response": ["6"], "type": ["GSM"]})
    texts = hub.generation_texts([(first, None, "train"), (second, None, "train")])
    assert texts == ["1+1?\n#### 2\n", "3+3?\n6\n"]


def test_glue(tmp_path: Path) -> None:
    columns = {"sentence": ["good", "bad", "?"], "label": [1, 0, -1], "idx": [0, 1, 2]}
    one = folder(tmp_path / "sst2", columns)
    assert hub.labelled_sentences((one, None, "train")) == [("good", 1), ("bad", 0)]
    columns = {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}
    two = folder(tmp_path / "mrpc", columns)
    assert hub.labelled_sentences((two, None, "train")) == [("a [SEP] b", 1)]


def test_images(tmp_path: Path) -> None:
    datasets, pillow = needs("datasets"), needs("PIL.Image")
    (tmp_path / "cifar").mkdir()
    pictures = [pillow.new("RGB", (32, 32), colour) for colour in ("black", "red")]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [3, 5]}, features=features)
    rows.to_parquet(tmp_path / "cifar" / "train.parquet")
    images, labels = hub.labelled_images((str(tmp_path / "cifar"), None, "train"))
    assert images.shape == (2, 3, 16, 16)
    assert labels.tolist() == [3, 5]
    assert images[1].mean((1, 2)).tolist() == [1.0, -1.0, -1.0]


def test_trajectories(tmp_path: Path) -> None:
    def episodes(shift: float) -> dict[str, Any]:
        steps = torch.arange(10.0)
        one = {
            "observations": torch.stack([steps + shift, -steps, steps.cos()], 1).tolist(),
            "actions": torch.stack([steps.sin(), steps.cos()], 1).tolist(),
            "rewards": steps.tolist(),
            "dones": [False] * 10,
        }
        return {key: [value] * 2 for key, value in one.items()}

    sources = [folder(tmp_path / n, episodes(s)) for n, s in (("old", 0.0), ("new", 3.0))]
    old, new = hub.trajectories(tuple((s, None, "train") for s in sources), steps=4)  # type: ignore[arg-type]
    assert {key: tuple(value.shape) for key, value in old.items()} == {
        "states": (4, 4, 3),
        "actions": (4, 4, 2),
        "rewards": (4, 4, 1),
    }
    assert old["states"].mean((0, 1)).abs().max() < 1e-5
    assert new["states"].mean((0, 1))[0] > 0.5


def test_error_names_unknown_columns(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", {"prompt": ["a"]})
    with pytest.raises(ValueError, match=r"the columns \['prompt'\], but needs one of"):
        hub.generation_texts([(path, None, "train")])


def test_domain_from_hub_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"states": 11, "actions": 3, "rewards": 1}
        return {k: torch.rand(30, 20, n, generator=generator) for k, n in shapes.items()}

    pixels = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(hub, "labelled_images", lambda: (pixels, torch.arange(200) % 4))
    monkeypatch.setattr(hub, "trajectories", lambda: (batch(0), batch(1)))
    monkeypatch.setitem(images.PRETRAINING, "steps", 2)
    monkeypatch.setitem(decisions.PRETRAINING, "steps", 2)
    for module in (images, decisions):
        found = module.build("hub")
        recipe = dataclasses.replace(found.recipe, steps=2, every=1, batch=4, calibration=2)
        found = dataclasses.replace(found, recipe=recipe)
        assert training.fine_tune(found, "eva", 1e-3, 0, found.test)["loss"] > 0
