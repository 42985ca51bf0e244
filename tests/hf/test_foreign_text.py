"""Names, licences, links and keys that somebody else chose: cards, exports and command lines bear
them."""

import os
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_dft.hf import companions, directory, links
from megatron_dft.hf.card import model_card
from megatron_dft.hf.secrets import MASK, masked, masked_line, masked_text
from megatron_dft.hf.source import HFCheckpoint

NASTY = [
    "a\nbase_model: evil/model\n---\n# Owned",
    "`code` ``more`` ```",
    "$x$ $$y$$ | <script>alert(1)</script>",
    "[click](javascript:alert(1)) ![x](http://t/x.png) **b** & ~~s~~",
    "key: value # comment",
    "- item",
    "{a: b}",
    "!!python/object/apply:os.system [id]",
    "*alias",
    "'\"",
    "\x1b[31mred\x00\u2028\u202e",
    os.fsdecode(b"latin \xe9"),
    "true",
    "1.0",
    "...",
    "",
]


def checkpoint(path: Path, name="base", revision=None) -> HFCheckpoint:
    return HFCheckpoint(path, name, revision, {}, {})


def front(card: str) -> dict:
    """The YAML head as a hub reads it."""
    assert card.startswith("---\n")
    return yaml.safe_load(card[4:].split("\n---\n", 1)[0])


@pytest.mark.parametrize("text", NASTY)
def test_a_card_holds_any_name(text, tmp_path):
    given = dict(
        parameters={text: text}, data={text: "00"}, metrics={text: 1.5}, command=f"train {text}"
    )
    plain = model_card(checkpoint(tmp_path), objective="dft")
    card = model_card(checkpoint(tmp_path, text, text), objective=text, **given)
    card.encode("utf-8")
    found, expected = front(card), front(plain)
    assert found.keys() == expected.keys() and len(found["tags"]) == 2
    assert isinstance(found["tags"][1], str)
    # One paragraph line, four tables of two columns, one block of code that ends.
    lines = card.split("\n---\n", 1)[1].splitlines()
    opening = next(line for line in lines if line.startswith("```"))
    assert lines[-1] == opening and lines.count(opening) == 2
    lines = lines[: lines.index(opening)]
    assert [line for line in lines if line.startswith("#")] == [
        "# Fine-tuned model",
        *(f"## {t}" for t in ("Settings", "Data (SHA-256)", "Final metrics", "Versions")),
        "## Command",
    ]
    for line in lines:
        if line.startswith("|"):
            assert line.replace("\\\\", "").replace("\\|", "").count("|") == 3
            assert "<" not in line.replace("\\<", "") and "$" not in line.replace("\\$", "")


@pytest.mark.parametrize("text", NASTY[:-1])
def test_a_card_holds_any_licence(text, tmp_path):
    (tmp_path / "README.md").write_bytes(os.fsencode(f"---\nlicense: {text}\n---\n"))
    found = front(model_card(checkpoint(tmp_path), objective="dft"))
    assert set(found) <= {"library_name", "pipeline_tag", "license", "tags"}
    assert isinstance(found.get("license", ""), str)


@pytest.mark.parametrize(
    "text, expected",
    [
        (b"---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        (b"\xef\xbb\xbf---\r\nlicense: 'llama3.1'\r\n---\r\n", "llama3.1"),
        ("---\nauthor: Rémi\nlicense: mit # sic\n---\n".encode("latin-1"), "mit"),
        (b"# no head\nlicense: evil\n", None),
        (b"---\nlicense:\n- mit\n---\n", None),
    ],
)
def test_the_licence_of_the_base(text, expected, tmp_path):
    (tmp_path / "README.md").write_bytes(text)
    assert front(model_card(checkpoint(tmp_path), objective="dft")).get("license") == expected


def test_an_unreadable_readme_costs_no_card(tmp_path):
    (tmp_path / "README.md").mkdir()
    assert "license" not in front(model_card(checkpoint(tmp_path), objective="dft"))


@pytest.fixture
def model(tmp_path):
    """A model directory and a key beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "key").write_text("secret")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "config.json", "merges.txt"])
def test_a_link_out_of_the_model_is_refused_before_anything_is_written(name, model, tmp_path):
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../key")
    with pytest.raises(ValueError, match=f"{name} is a link to .*key, outside the model"):
        directory.start(checkpoint(model), tmp_path / "out", overwrite=False)
    with pytest.raises(ValueError, match="outside the model"):
        links.copy(model, model / name, tmp_path / "copied")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "key"}


def test_a_directory_of_templates_is_no_way_out_either(model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/secret.jinja").write_text("secret")
    (model / "additional_chat_templates").symlink_to("../home")
    with pytest.raises(ValueError, match="outside the model"):
        directory.start(checkpoint(model), tmp_path / "out", overwrite=False)


def test_links_inside_the_model_and_the_cache_of_the_hub_work(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots/c0ffee"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "tokenizer.json", "LICENSE")):
        (repository / f"blobs/{number}").write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        staging = directory.start(checkpoint(path), tmp_path / "out", overwrite=False)
        for file in companions.copied_files(checkpoint(path)):
            links.copy(path, file, staging / file.name)
        assert (staging / "NOTICE").read_text() == "LICENSE"
        assert not any(file.is_symlink() for file in staging.iterdir())


def test_an_output_that_is_a_link_is_followed_and_stays_one(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")  # not there yet
    for text in ("one", "two"):
        out = directory.target(tmp_path / "out")
        staging = directory.start(checkpoint(model), out, overwrite=True)
        (staging / "who").write_text(text)
        directory.publish(staging, out)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "out/who").read_text() == text
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_the_two_renames_heals(renames, model, tmp_path, monkeypatch):
    """Where the file system cannot exchange: the old export comes back, or the new one stays."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "who").write_text("old")
    staging = directory.start(checkpoint(model), out, overwrite=True)
    (staging / "who").write_text("new")
    monkeypatch.setattr(directory, "_exchange", lambda a, b: False)
    rename, calls = os.rename, []

    def dying(a, b):
        rename(a, b)
        calls.append(b)
        if len(calls) == renames:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            directory.publish(staging, out)
    assert out.exists() == (renames == 2)
    # The next one is told that there is something to overwrite, and may.
    with pytest.raises(ValueError, match="--overwrite"):
        directory.start(checkpoint(model), out, overwrite=False)
    assert (out / "who").read_text() == ("old" if renames == 1 else "new")
    staging = directory.start(checkpoint(model), out, overwrite=True)
    (staging / "who").write_text("newest")
    directory.publish(staging, out)
    assert (out / "who").read_text() == "newest"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "key", "out"}


PLANTED = [
    ["--wandb-api-key", "planted"],
    ["--wandb-api-key=planted"],
    ["--hf-token", "-----BEGIN PRIVATE KEY-----\nplanted\n-----END PRIVATE KEY-----"],
    ["--hub-password", "planted", "planted"],
    ["WANDB_API_KEY=planted", "python"],
    ["GITHUB_PAT=planted"],
    ["SLURM_JWT=planted"],
    ["--proxy", "http://planted:planted@proxy:3128"],
    ["--train-data", "https://host/x?X-Amz-Signature=planted&y=1"],
    ["--note", "hf_planted0planted0planted0"],
    ["--note", "sk-planted0planted0planted0"],
    ["--note", "github_pat_planted0planted0planted0"],
    ["--note", "eyJhbGciOiJI.planted.planted"],
    ["--note", "x\n-----BEGIN RSA PRIVATE KEY-----\nplanted\n"],
]


@pytest.mark.parametrize("words", PLANTED, ids=lambda w: w[0])
def test_a_key_is_masked(words):
    line = masked_line(["train", *words, "--lr", "1e-5"])
    assert "planted" not in line and MASK in line
    assert line.startswith("train ") and line.endswith(" --lr 1e-5")


def test_what_is_no_key_stays():
    words = shlex.split(
        "-m megatron_dft.train --tokenizer-model t.model --max-tokens 5 --score-segment-tokens 9 "
        "--train-data 'a b.jsonl' --json-keys text --skip-bos-token --lr 1e-5 --kv-channels 64"
    )
    assert masked(words) == words and shlex.split(masked_line(words)) == words
    assert masked_text("https://host/path?rows=5 sha 0123456789abcdef") in (
        "https://host/path?rows=5 sha 0123456789abcdef"
    )
