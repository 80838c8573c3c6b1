"""The door to a model: the Hub, its cache and bad checkpoints, each in its own process or folder."""

import pickle
import shutil

import pytest
import torch
from families import CONFIGS, byte_tokenizer, open_family, random_model, save
from loopback_hub import point, serve
from safetensors.torch import load_file, save_file

from llm_analysis.core import InputError, WorldError
from llm_analysis.lm.model import fingerprint, load, load_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint") / "llama")


def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_hub_then_cache_then_nothing(checkpoint, tmp_path, monkeypatch):
    "Online the revision is resolved to a commit; offline the cache serves the same model; elsewhere there is none"
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "t5")
    pickled = copy(checkpoint, tmp_path)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with serve({"org/good": checkpoint, "org/t5": tmp_path / "t5", "org/pickled": pickled}) as hub:
        point(monkeypatch, hub.address, tmp_path / "home")
        lm = load("org/good", device="cpu")
        commit = hub.repo("org/good", "model").head
        assert (lm.name, lm.revision, lm.fingerprint) == ("org/good", commit, fingerprint(checkpoint))
        for name, revision, error, words in (
            ("org/t5", None, InputError, "model type 't5'"),
            ("org/pickled", None, WorldError, "pickles are not read"),
            (
                "org/absent",
                None,
                InputError,
                "expected a model on the Hub; got 'org/absent' at None, no such repository",
            ),
            ("org/good", "v9", InputError, "no such revision"),
        ):
            with pytest.raises(error, match=words):
                load(name, revision=revision, device="cpu")
        fetched = [a.path for a in hub.log if a.kind == "resolve" and a.method == "GET"]
        assert fetched and not [f for f in fetched if f.endswith(".bin") or "org/t5" in f and "safetensors" in f]
    for offline in (False, True):
        point(monkeypatch, "http://127.0.0.1:9", tmp_path / "home", offline)
        again = load("org/good", device="cpu")
        assert (again.revision, again.fingerprint) == (commit, lm.fingerprint)
        point(monkeypatch, "http://127.0.0.1:9", tmp_path / "elsewhere", offline)
        with pytest.raises(WorldError, match="got 'org/good', not a folder here, not in the Hub's cache"):
            load("org/good", device="cpu")


def test_a_tokenizer_comes_without_weights(checkpoint, tmp_path, monkeypatch):
    with serve({"org/good": checkpoint}) as hub:
        point(monkeypatch, hub.address, tmp_path / "home")
        alone = load_tokenizer("org/good")
        assert (alone.name, alone.revision) == ("org/good", hub.repo("org/good", "model").head)
        assert not [a.path for a in hub.log if a.kind == "resolve" and "safetensors" in a.path]
    point(monkeypatch, "http://127.0.0.1:9", tmp_path / "home", offline=True)
    assert load_tokenizer("org/good").fingerprint == alone.fingerprint == load_tokenizer(checkpoint).fingerprint
    with pytest.raises(WorldError, match="got 'org/other', not a folder here, not in the Hub's cache"):
        load_tokenizer("org/other")
    folder = copy(checkpoint, tmp_path)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    assert load_tokenizer(folder).fingerprint != alone.fingerprint


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_passes_the_door_and_keeps_its_weights(family):
    lm, fresh = open_family(family), random_model(family)
    assert lm.dtype == torch.float32 and not lm.model.training
    assert lm.vocab == fresh.get_output_embeddings().weight.shape[0]
    assert (lm.max_len is None) == (family in ("bloom", "mamba"))
    stored = lm.model.state_dict()
    assert all(torch.equal(w, stored[name]) for name, w in fresh.state_dict().items())


@pytest.mark.parametrize("size", [0, 4, 8, 60, -1])
def test_damaged_weights(checkpoint, tmp_path, size):
    file = copy(checkpoint, tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(WorldError, match=r"^expected a whole model.safetensors in copy; got \d+ bytes[^\n]*$"):
        load(tmp_path / "copy", device="cpu")
    file.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(WorldError, match="a whole model.safetensors"):
        load(tmp_path / "copy", device="cpu")


def test_missing_shard_and_damaged_index(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WorldError, match="expected model.safetensors in copy; got no such file"):
        load(folder)
    random_model("llama").save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert load(folder, device="cpu").fingerprint != fingerprint(checkpoint)
    shard = next(folder.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(WorldError, match=f"expected {shard.name} in copy"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(WorldError, match="a readable model.safetensors.index.json"):
        load(folder)
    assert weights


def test_holes_and_shapes_are_named(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    hole = "model.layers.1.mlp.up_proj.weight"
    for change, words in (({}, "1 missing"), ({hole: weights[hole][:, :-1].contiguous()}, "1 of another shape")):
        rest = {k: v for k, v in weights.items() if k != hole} | change
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WorldError, match=f"{words}: {hole}; the library would fill"):
            load(folder, device="cpu")


def test_a_pickle_is_never_opened(checkpoint, tmp_path):
    "A pickle that would leave a file behind if it were read"
    folder, trap = copy(checkpoint, tmp_path), tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(trap), "w"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WorldError, match="could run code"):
        load(folder, device="cpu")
    assert not trap.exists()


def test_code_in_a_checkpoint_is_never_run(checkpoint, tmp_path):
    folder, trap = copy(checkpoint, tmp_path), tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    with pytest.raises(InputError, match="its own code, which is never run"):
        load(folder, device="cpu")
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt"])
def test_no_tokenizer(checkpoint, tmp_path, kind):
    "For some types the library would answer with an empty tokenizer"
    folder = tmp_path / "bare"
    if kind == "bert":
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "bert", "is_decoder": true}')
    else:
        random_model(kind).save_pretrained(folder)
    with pytest.raises(WorldError, match="expected a tokenizer in bare; got none"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(name="no/such/place"), "a folder that exists, a Hub id or tiny"),
        (dict(name=""), "a folder that exists, a Hub id or tiny"),
        (dict(name="bad id!"), "check the spelling"),
        (dict(device="cuda:7"), "a device cuda:7"),
        (dict(device="tpu"), "device auto, cpu"),
        (dict(dtype="int4"), "dtype auto or one of"),
        (dict(revision="main"), "no revision for a folder"),
    ],
)
def test_wrong_arguments(checkpoint, asked, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=words):
        load(**(dict(name=str(checkpoint)) | asked))


def test_a_file_and_a_damaged_config(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    with pytest.raises(InputError, match="a model's folder; got the file config.json"):
        load(folder / "config.json")
    for text in ("", "[1]", '{"model_type": "llama", "hidden_size": "wide"}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(WorldError, match=r"^expected a (readable|usable) config.json in copy[^\n]*$"):
            load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WorldError, match="expected config.json in copy"):
        load(folder)


def test_fingerprint_is_content_alone(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    name = fingerprint(checkpoint)
    assert fingerprint(folder) == name
    (folder / "README.md").write_text("a card says nothing about the function")
    assert fingerprint(folder) == name
    byte_tokenizer().save_pretrained(folder)
    assert fingerprint(folder) == name
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(words.replace('"</s>"', '"</t>"', 1))
    assert fingerprint(folder) != name
    shutil.copy(checkpoint / "tokenizer.json", folder)
    weights = load_file(checkpoint / "model.safetensors")
    key = "model.norm.weight"
    weights[key] = weights[key].clone()
    weights[key][3] = torch.nextafter(weights[key][3], torch.tensor(9.0))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != name


def test_half_precision_widens_on_a_cpu_unless_asked(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    random_model("llama").bfloat16().save_pretrained(folder)
    assert load(folder, device="cpu").dtype == torch.float32
    half = load(folder, device="cpu", dtype="bfloat16")
    assert half.dtype == next(half.model.parameters()).dtype == torch.bfloat16
    assert half.fingerprint == load(folder, device="cpu").fingerprint


def test_the_stored_format_is_read_from_the_weights(checkpoint, tmp_path):
    "A configuration that says another one, or none, does not decide"
    folder = copy(checkpoint, tmp_path)
    weights = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lm = load(folder, device="cpu")
    assert lm.dtype == next(lm.model.parameters()).dtype == torch.float64
