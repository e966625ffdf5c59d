"""Data: what is composed, and loaders of folders on samples of the same layout."""

import ast
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.workloads import registry
from benchmarks.workloads.data import attributes, celeba, docstrings, domains, fashion, images, qm9, rooms, tables
from benchmarks.workloads.data.folders import VARIABLES
from benchmarks.workloads.data.splits import DataMissingError, Part, split
from workloads import samples


def test_a_split_has_every_example_once() -> None:
    part = Part(torch.arange(10), {"a": torch.arange(10) * 2})
    found = split(part, 0, "numbers")
    every = torch.cat([one.inputs for one in (found.train, found.valid, found.test)])  # type: ignore[attr-defined]
    assert sorted(every.tolist()) == list(range(10)) and len(found.test) == len(found.valid) == 2
    assert torch.equal(found.train[slice(0, 3)].labels["a"], 2 * found.train[slice(0, 3)].inputs)
    with pytest.raises(ValueError, match="three parts"):
        split(part[slice(0, 3)], 0, "few")


def test_fashion_pairs_are_of_two_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fashion.VARIABLE, str(samples.fashion(tmp_path)))
    fashion.load.cache_clear()
    images.fashion_pairs.cache_clear()
    try:
        found = images.fashion_pairs(0, size=20)
        pairs = found.train[slice(0, 20)]
        assert pairs.inputs.shape == (20, 1, 36, 36) and len(found.test) == 3 and len(found.valid) == 5
        corners = pairs.inputs[:, 0, [0, -1], [0, -1]] * 255
        assert torch.equal(corners.round().long(), torch.stack(tuple(pairs.labels.values()), 1))
        assert registry.names()[-1] == "fashion" and attributes.single_fashion(0, 20).images.shape == (20, 28, 28)
    finally:
        fashion.load.cache_clear()
        images.fashion_pairs.cache_clear()


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fashion.VARIABLE, str(tmp_path))
    with pytest.raises(DataMissingError, match="dataset-fashion-mnist"):
        registry.build("fashion", 0)
    assert "fashion" not in registry.names()
    for name, variable in VARIABLES.items():
        monkeypatch.delenv(variable, raising=False)
        with pytest.raises(DataMissingError, match=f"--data {name}=FOLDER"):
            registry.build(name, 0)
        monkeypatch.setenv(variable, str(tmp_path))
        with pytest.raises(DataMissingError, match="expected"):
            registry.build(name, 0)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"\0\0\x0d\x01\0\0\0\x01\0"))
    with pytest.raises(ValueError, match="MNIST format"):
        fashion.read_idx(tmp_path / "a.gz")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x05\0"))
    with pytest.raises(ValueError, match="expected \\(5,\\) values, found 1"):
        fashion.read_idx(tmp_path / "b.gz")


def test_celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = celeba.load(samples.celeba(tmp_path))
    assert (len(found.train), len(found.valid), len(found.test)) == (8, 2, 2)
    part = found.train[torch.tensor([3, 0])]
    assert part.inputs.shape == (2, 3, 64, 64) and list(part.labels)[1] == "Attribute_1"
    assert part.inputs[:, 0].mean((1, 2)).tolist() == pytest.approx([60 / 255, 0], abs=0.02)
    assert [float(values[0]) for values in part.labels.values()] == [float((3 + a) % 2 == 0) for a in range(40)]
    monkeypatch.setenv("CELEBA", str(tmp_path))
    workload = registry.build("celeba", 0)
    workload.batch_size = 4
    assert len(workload.objective(workload.batch(0)).losses) == 40
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 7\n")
    with pytest.raises(ValueError, match="0, 1 or 2"):
        celeba.load(tmp_path)


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes"])
def test_rooms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rooms.load(name, samples.rooms(tmp_path, name))
    assert (len(found.train), len(found.valid), len(found.test)) == (5, 1, 3)
    part = found.train[slice(1, 3)]
    assert part.inputs.shape == (2, 3, 8, 12) and part.labels["segments"].dtype == torch.int64
    assert bool((part.labels["segments"][:, :, 0] == -1).all())
    assert part.labels["depth"][:, 0, 0, 0].tolist() == [2.0, 3.0]
    assert float(found.valid[slice(0, 1)].labels["depth"].mean()) == 6.0
    monkeypatch.setenv(VARIABLES[name], str(tmp_path))
    workload = registry.build(name, 0)
    losses = workload.objective(workload.batch(0)).losses
    assert len(losses) == (3 if name == "nyuv2" else 2) and all(bool(loss.isfinite()) for loss in losses.values())


def test_qm9(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector, properties = qm9.read_xyz(samples.qm9(tmp_path) / "dsgdb9nsd_000003.xyz")
    assert vector[:5].tolist() == [2, 0, 0, 1, 0] and properties == {p: 2.0 + k for k, p in enumerate(qm9.PROPERTIES)}
    charges = np.array([8.0, 1.0, 1.0])
    positions = np.array([atom[1:] for atom in samples.WATER])
    apart = [np.linalg.norm(positions[i] - positions[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    matrix = np.diag(0.5 * charges**2.4)
    for (i, j), r in zip(((0, 1), (0, 2), (1, 2)), apart, strict=True):
        matrix[i, j] = matrix[j, i] = charges[i] * charges[j] / r
    expected = sorted(np.linalg.eigvalsh(matrix), key=abs, reverse=True)
    np.testing.assert_allclose(vector[5:8], expected, rtol=1e-12)
    assert not vector[8:].any()
    monkeypatch.setenv("QM9", str(tmp_path))
    workload = registry.build("qm9", 0)
    assert len(workload.objective(workload.batch(0)).losses) == 11
    (tmp_path / "dsgdb9nsd_000001.xyz").write_text("3\ngdb 1\n")
    with pytest.raises(ValueError, match=r"xyz format|properties"):
        qm9.load(tmp_path, 0)


def test_qm9_as_a_table(tmp_path: Path) -> None:
    found = qm9.load(samples.qm9_table(tmp_path), 0)
    assert found.train[slice(0, 1)].inputs.shape == (1, len(qm9.CHARACTERS))
    (tmp_path / "qm9.csv").write_text("smiles,mu\nC,1\n")
    with pytest.raises(ValueError, match="missing"):
        qm9.load(tmp_path, 0)


def test_attributes_are_binary_and_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fashion.VARIABLE, str(tmp_path))
    attributes.load.cache_clear()
    found = attributes.load(0)
    labels = torch.stack(tuple(found.train[slice(None)].labels.values()))
    assert len(labels) == 40 and set(labels.unique().tolist()) == {0.0, 1.0}
    assert len({tuple(row.tolist()) for row in labels}) == 40 and 0.05 < float(labels.mean(1).min())
    few = attributes.load(0, 3).train[slice(0, 1)].labels
    assert [name.split()[0] for name in few] == ["class", "in", "centre"]
    with pytest.raises(ValueError, match="2 to 40"):
        attributes.load(0, 41)


def test_docstrings_carry_labels_of_their_code() -> None:
    found = docstrings.load(0)
    part = found.train[slice(None)]
    assert part.inputs.shape[1] == docstrings.LENGTH and int(part.inputs.max()) < docstrings.WORDS
    for task, classes in docstrings.TASKS.items():
        counts = part.labels[task].bincount(minlength=classes)
        assert len(counts) == classes and int(counts.min()) > 0.02 * len(part.inputs), task
    source = 'class A:\n    """one two three four five"""\n    def f(self):\n        """a b c d e"""\n        raise X\n'
    texts = docstrings._documented(ast.parse(source), 3)
    assert [text.labels for text in texts] == [(3, 1, 1, 0), (3, 1, 2, 0)]


def test_domains_and_tables() -> None:
    found = domains.load(0).train[slice(0, 20)]
    assert found.inputs.shape == (20, 4, 64) and list(found.labels) == list(domains.DOMAINS)
    assert float(found.inputs[:, 1].mean()) > 0.5 > float(found.inputs[:, 0].mean())
    patients = tables.diabetes(0)
    everyone = patients.train[slice(None)]
    assert everyone.inputs.shape[1] == 9 and float(everyone.labels["progression"].mean()) == pytest.approx(0, abs=1e-5)
    assert set(everyone.labels["sex"].tolist()) == {0.0, 1.0}
