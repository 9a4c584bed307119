"""The k-nearest-neighbour probe against written-out forms, and where its rows come from."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
from data.triplets import Triplets


@pytest.fixture
def embeddings():
    """60 unit rows around 5 directions, and their classes with some wrong."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 8, generator=generator)
    labels = torch.randint(5, (60,), generator=generator)
    rows = centres[labels] + 1.5 * torch.randn(60, 8, generator=generator)
    return F.normalize(rows, dim=1), labels.numpy()


@pytest.mark.parametrize("k", [1, 7, 20])
def test_the_probe_is_a_vote_of_the_nearest_others(embeddings, k):
    images, labels = embeddings
    cosines = images.double().numpy() @ images.double().numpy().T
    expected = []
    for i in range(60):
        others = sorted((j for j in range(60) if j != i), key=lambda j: -cosines[i, j])[:k]
        votes = [0.0] * 5
        for j in others:
            votes[labels[j]] += math.exp(cosines[i, j] / 0.07)
        expected.append(votes.index(max(votes)) == labels[i])
    assert 0.2 < np.mean(expected) < 0.95  # else it would say nothing
    assert evaluate.knn_probe(images, labels, k).tolist() == expected


def test_the_probe_is_that_of_scikit_learn(embeddings):
    neighbors = pytest.importorskip("sklearn.neighbors", reason="the oracle")
    images, labels = embeddings[0].double().numpy(), embeddings[1]
    expected = []
    for i in range(60):
        others = np.arange(60) != i
        probe = neighbors.KNeighborsClassifier(
            20, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
        probe.fit(images[others], labels[others])
        expected.append(probe.predict(images[i:i + 1])[0] == labels[i])
    assert evaluate.knn_probe(embeddings[0], labels).tolist() == expected


def test_batches_of_rows_do_not_show(embeddings):
    """3,000 images are three batches; each copy's nearest are the other copies of itself."""
    images, labels = embeddings
    assert evaluate.knn_probe(images.repeat(50, 1), np.tile(labels, 50)).all()


def test_nobody_votes_for_itself_in_any_batch_of_rows():
    """1,100 images are two batches; each is the only one of its class."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(1100, 8, generator=generator), dim=1)
    assert not evaluate.knn_probe(images, np.arange(1100), k=1).any()


def test_fewer_images_than_neighbours_all_vote(embeddings):
    images, labels = embeddings
    few = evaluate.knn_probe(images[:6], labels[:6], k=20)
    assert few.tolist() == evaluate.knn_probe(images[:6], labels[:6], k=5).tolist()


def test_each_distinct_image_of_judgements_is_embedded_once(toy_world):
    """Sets of judgements name the same pictures again and again."""
    test = Triplets(toy_world / "nights", "test")
    test.index = np.concatenate([test.index, test.index[::-1]])
    test.labels = np.concatenate([test.labels, test.labels[::-1]])
    seen = []

    def encode(pixels):
        seen.append(len(pixels))
        return pixels.mean((2, 3))
    sides = evaluate.embed_triplets(encode, test, 8, "cpu", batch_size=7)
    assert sum(seen) == len(test.files) and max(seen) == 7
    assert len(sides[0]) == len(test.labels)
    assert torch.equal(sides[1][0], sides[1][-1])
