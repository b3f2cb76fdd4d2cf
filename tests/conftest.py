"""What the tests share: a made-up haystack and the data folder made from it."""
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import prepare_babilong as babilong  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; runs only with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: python -m pytest -m slow"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own: the reader's out/ and data/ are not seen or changed."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def haystack(tmp_path_factory):
    """A text file of 2,000 sentences over a small vocabulary."""
    rng, words = random.Random(0), []
    for _ in range(300):
        words.append("".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))))
    text = " ".join(" ".join(rng.choices(words, k=rng.randint(8, 16))).capitalize() + "." for _ in range(2000))
    path = tmp_path_factory.mktemp("haystack") / "haystack.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, haystack):
    path = tmp_path_factory.mktemp("data") / "babilong"
    babilong.write_data(path, background=[str(haystack)], vocab_size=700, eval_stories=40)
    return path


@pytest.fixture(scope="session")
def data(data_dir):
    return babilong.load_data(data_dir, block_size=32)[1]


@pytest.fixture(scope="session")
def encoding(data):
    return data.encoding
