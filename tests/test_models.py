import hashlib
import math
import os
import pickle
import urllib.error
import zipfile

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models import densenet121, resnet50

from lib import models
from lib.analysis.inference import stream
from lib.data.batches import Batch
from lib.data.release import CLASSES
from lib.models import ModelError, build_model, layers, load_model, read_weights, weights_digest


@pytest.fixture(scope="module")
def tdensenet():
    return build_model("tdensenet", 15)


@pytest.fixture(scope="module")
def released():
    """A state dict with torchvision's DenseNet121 names and random values."""
    generator = torch.Generator().manual_seed(0)
    state = densenet121(weights=None).state_dict()
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return state | {name: torch.rand(tensor.shape, generator=generator) for name, tensor in floats.items()}


def films(side=64, n=2, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def first_output(model, images, names=()):
    return next(stream(model, [Batch(range(len(images)), images, None)], names))


def same_trunk(model, state, prefix="features."):
    ours = {name: tensor for name, tensor in model.trunk.state_dict().items() if not name.startswith("norm5.")}
    return len(ours) > 100 and all(torch.equal(tensor, state[prefix + name]) for name, tensor in ours.items())


# --- shapes and layers


def test_tdensenet_maps(tdensenet):
    cam, dissection, q = layers("tdensenet")
    assert cam == dissection and q == 0.01
    output = first_output(tdensenet, films(), [cam])
    maps = output.maps[cam]
    assert output.logits.shape == (2, 15) and maps.shape == (2, 512, 8, 8)
    assert (maps >= 0).all() and (maps == 0).float().mean() > 0.1  # after the ReLU
    torch.testing.assert_close(output.logits, tdensenet.head(maps.mean((2, 3))), rtol=1e-4, atol=1e-5)


def test_tdensenet_trunk_has_the_papers_size(tdensenet):
    counts = {name: parameter.numel() for name, parameter in tdensenet.named_parameters()}
    assert sum(n for name, n in counts.items() if name.startswith("trunk.") and ".norm5." not in name) == 1_297_536
    assert counts["trunk.norm5.weight"] == 512 and counts["head.weight"] == 15 * 512


def test_resnet50_maps():
    model = build_model("resnet50", 1)
    cam, dissection, q = layers("resnet50")
    assert (cam, dissection, q) == ("trunk.layer4.2", "trunk.layer3.5", 0.04)
    output = first_output(model, films(), [cam, dissection])
    assert output.logits.shape == (2, 1)
    assert output.maps[cam].shape == (2, 2048, 2, 2) and output.maps[dissection].shape == (2, 1024, 4, 4)
    assert all((maps >= 0).all() for maps in output.maps.values())
    torch.testing.assert_close(output.logits, model.head(output.maps[cam].mean((2, 3))), rtol=1e-4, atol=1e-5)
    ours, theirs = (sum(p.numel() for p in net.parameters()) for net in (model.trunk, resnet50(weights=None)))
    assert ours == theirs - 2048 * 1000 - 1000


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_a_convolutional_timm_model_works_by_its_name(backbone):
    model = build_model(backbone, 3)
    cam, dissection, q = layers(backbone)
    output = first_output(model, films(), [cam])
    assert output.logits.shape == (2, 3) and output.maps[cam].ndim == 4 and cam == dissection and 0 < q < 1
    torch.testing.assert_close(output.logits, model.head(output.maps[cam].mean((2, 3))), rtol=1e-4, atol=1e-5)
    assert build_model(backbone, 3).training  # the probe for the number of channels leaves no trace


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_transformer_is_refused(backbone):
    with pytest.raises(ValueError, match=rf"'{backbone}' gives features of shape .* not maps .*convolutional"):
        build_model(backbone, 3)


@pytest.mark.parametrize(
    ("name", "near"),
    [("densnet121", "densenet121"), ("resnet51", "resnet50"), ("tdensnet", "tdensenet"), ("resnet", "resnet")],
)
def test_an_unknown_backbone_names_near_ones(name, near):
    with pytest.raises(ValueError, match=rf"'{name}' is neither .*tdensenet.* nor a timm model; near it: .*{near}"):
        build_model(name, 3)


# --- random weights


@pytest.mark.parametrize("backbone", ["tdensenet", "mobilenetv3_small_050"])
def test_weights_follow_from_the_seed_alone(backbone):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = build_model(backbone, 2, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    two, other = build_model(backbone, 2, seed=7).state_dict(), build_model(backbone, 2, seed=8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert sum(not torch.equal(one[name], other[name]) for name in one) > 20


# --- weights files


def test_torchvision_file(tdensenet, released, tmp_path):
    torch.save(released, tmp_path / "densenet121.pth")
    model = build_model("tdensenet", 15, str(tmp_path / "densenet121.pth"))
    assert same_trunk(model, released)
    for name in ("trunk.norm5.weight", "head.weight", "head.bias"):  # new, from the seed
        assert torch.equal(model.state_dict()[name], tdensenet.state_dict()[name])


def test_safetensors_file(released, tmp_path):
    save_file(released, tmp_path / "densenet121.safetensors")
    assert same_trunk(build_model("tdensenet", 1, str(tmp_path / "densenet121.safetensors")), released)


def test_wrapped_file_with_the_names_of_2017(released, tmp_path):
    def old(name):
        for part in ("norm", "conv"):
            for k in "12":
                layer = f"denselayer{name.split('denselayer')[-1].split('.')[0]}.{part}"
                name = name.replace(f"{layer}{k}.", f"{layer}.{k}.")
        return name

    # Files of 2017 also lack num_batches_tracked.
    state = {old(name): tensor for name, tensor in released.items() if not name.endswith("num_batches_tracked")}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state and "features.transition1.norm.weight" in state
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "old.pth.tar")
    model = build_model("tdensenet", 1, str(tmp_path / "old.pth.tar"))
    parameters = dict(model.trunk.named_parameters())
    kept = [name for name in parameters if not name.startswith("norm5.")]
    assert kept and all(torch.equal(parameters[name], released["features." + name]) for name in kept)


def test_timm_file_whose_names_begin_like_torchvisions(tmp_path):
    source = build_model("densenet121", 2, seed=1)  # timm's, with a level `features`
    torch.save(source.trunk.state_dict(), tmp_path / "timm.pth")
    model = build_model("densenet121", 3, str(tmp_path / "timm.pth"), seed=2)
    state = source.trunk.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.trunk.state_dict().items())


def test_file_of_a_run(tmp_path):
    source = build_model("tdensenet", 15, seed=1)
    with torch.no_grad():
        source.trunk.norm5.weight.fill_(0.5)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = build_model("tdensenet", 1, str(tmp_path / "model.safetensors"), seed=2)
    assert same_trunk(model, source.trunk.state_dict(), prefix="")
    assert (model.trunk.norm5.weight == 0.5).all() and model.head.weight.shape == (1, 512)


def test_half_precision_file_is_read_as_float32(tmp_path):
    source = build_model("resnet18", 2, seed=1)
    state = source.trunk.half().state_dict()
    assert state["conv1.weight"].dtype == torch.float16
    save_file(state, tmp_path / "half.safetensors")
    model = build_model("resnet18", 2, str(tmp_path / "half.safetensors"))
    assert next(model.parameters()).dtype == torch.float32


def test_another_architecture_is_refused_by_the_tensors_name(released, tmp_path):
    torch.save(released, tmp_path / "densenet121.pth")
    message = "does not hold weights of resnet18: .* tensors are missing, the first is conv1.weight"
    with pytest.raises(RuntimeError, match=f"densenet121.pth {message}"):
        build_model("resnet18", 1, str(tmp_path / "densenet121.pth"))
    wide = dict(released) | {"features.conv0.weight": torch.zeros(64, 1, 7, 7)}
    torch.save(wide, tmp_path / "grey.pth")
    message = r"1 have another shape, the first is conv0.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)"
    with pytest.raises(RuntimeError, match=message):
        build_model("tdensenet", 1, str(tmp_path / "grey.pth"))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize(
    "write", [torch.save, lambda item, path: path.write_bytes(pickle.dumps(item, protocol=2))], ids=["torch", "pickle"]
)
def test_a_hostile_file_is_refused_and_does_not_run(write, tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "weights.pth"
    write({"state_dict": Hostile(ran)}, path)
    with pytest.raises(RuntimeError, match="weights.pth is not a readable weights file: .* could run code") as refusal:
        build_model("tdensenet", 1, str(path))
    assert not ran.exists() and "trust" not in str(refusal.value)
    program = path.read_bytes()
    if write is torch.save:
        with zipfile.ZipFile(path) as archive:
            program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    pickle.loads(program)
    assert ran.exists()  # so the file was armed


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth"])
def test_a_damaged_file_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x10\x00\x00")
    with pytest.raises(RuntimeError, match=f"{name} is not a readable weights file"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"state_dict": torch.zeros(3)}])
def test_a_file_without_named_tensors(content, tmp_path):
    torch.save(content, tmp_path / "list.pth")
    with pytest.raises(RuntimeError, match="list.pth holds no dictionary of tensors"):
        read_weights(tmp_path / "list.pth")


def test_no_such_file_or_a_misspelt_init():
    with pytest.raises(RuntimeError, match="no weights file at imagnet: init takes imagenet, scratch"):
        build_model("resnet18", 1, "imagnet")


@pytest.mark.parametrize("backbone", ["tdensenet", "resnet50"])
def test_imagenet_weights_that_cannot_be_downloaded(backbone, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    message = "could not be downloaded .*not known.*set init to that local file.*init: scratch"
    with pytest.raises(RuntimeError, match=f"ImageNet weights of {backbone} {message}"):
        build_model(backbone, 15, "imagenet")


def test_timm_weights_that_cannot_be_downloaded(monkeypatch):
    import timm.models._builder as builder
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("check your connection")

    monkeypatch.setattr(builder, "load_state_dict_from_hf", unreachable)
    message = "ImageNet weights of resnet18 could not be downloaded .*connection.*local file.*init: scratch"
    with pytest.raises(RuntimeError, match=message):
        build_model("resnet18", 15, "imagenet")


# --- finished runs


def test_a_finished_run_comes_back_as_it_was(tdensenet, tmp_path):
    save_file(tdensenet.state_dict(), tmp_path / "model.safetensors", metadata={"run": "x"})
    model = load_model(tmp_path / "model.safetensors", "tdensenet", 15)
    assert not model.training
    assert all(torch.equal(tensor, tdensenet.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(first_output(model, films()).logits, first_output(tdensenet, films()).logits)


def test_a_run_of_another_kind_is_refused(tdensenet, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tdensenet.state_dict(), path)
    message = r"2 tensors differ, the first is head.bias \(file: \(15,\), model: \(1,\)\)"
    with pytest.raises(RuntimeError, match=f"not a tdensenet with 1 outputs: {message}"):
        load_model(path, "tdensenet", 1)
    with pytest.raises(RuntimeError, match=r"not a resnet18 with 15 outputs: .* \(file: .*, model: .*\)"):
        load_model(path, "resnet18", 15)
    with pytest.raises(RuntimeError, match="no weights file at .*other.safetensors"):
        load_model(tmp_path / "other.safetensors", "tdensenet", 15)


# ---- the backbones of Nam & Lee, and the small ones


@pytest.mark.parametrize("backbone", ["vgg16", "densenet121"])
def test_torchvision_backbones_are_torchvisions(backbone):
    """Torchvision's own features, given the trunk's weights, give what the trunk gives."""
    import torchvision

    with torch.device("meta"):  # VGG16's dense layers take seconds to draw
        theirs = getattr(torchvision.models, backbone)(weights=None).eval()
    model = models.build_model(backbone, 2).eval()
    theirs.features.to_empty(device="cpu").load_state_dict(model.trunk.state_dict())
    films = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.features(films).relu() if backbone == "densenet121" else theirs.features[:30](films)
        assert torch.equal(model.trunk(films), expected)
    assert {"trunk.relu5", "trunk.29"} & set(models.layers(backbone))


def test_a_densenet_keeps_its_own_last_norm(tmp_path):
    source = models.build_model("densenet121", 3, seed=1)
    with torch.no_grad():
        source.trunk.norm5.bias.fill_(0.7)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert models.build_model("densenet121", 5, init=str(tmp_path / "w.pth")).trunk.norm5.bias.eq(0.7).all()


def test_the_small_transformer_says_what_it_takes():
    model = models.build_model("small_transformer", 10).eval()
    tokens = {}
    model.trunk.norm.register_forward_hook(lambda module, inputs, output: tokens.update(out=output))
    films = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(films)
        assert torch.allclose(logits, model.head(tokens["out"].mean(1)), atol=1e-5)
        with pytest.raises(ValueError, match="image_size: 32"):
            model(torch.rand(1, 3, 48, 48))
    with pytest.raises(ValueError, match="init: scratch"):
        models.build_model("small_cnn", 10, init="imagenet")


# ---- CheXNet


def chexnet_file(path, change=None):
    """A checkpoint as arnoweng/CheXNet stores it: DataParallel, layer names of 2017, 14 classes, a sigmoid without
    weights."""
    source = models.build_model("densenet121", 14, seed=3)
    state = {}
    for name, tensor in source.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        name = name.replace("trunk.", "features.").replace("head.", "classifier.0.")
        if "denselayer" in name:
            for part in ("norm1", "norm2", "conv1", "conv2"):
                name = name.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.")
        state["module.densenet121." + name] = tensor
    torch.save({"epoch": 7, "best_loss": 0.1, "state_dict": change(state) if change else state}, path)
    return source.eval()


def test_chexnet_loads_as_the_public_checkpoint_is_stored(tmp_path):
    source = chexnet_file(tmp_path / "model.pth.tar")
    loaded = models.load_chexnet(tmp_path / "model.pth.tar")
    films = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(films), source(films))
    assert not loaded.training and len(models.CHEXNET_CLASSES) == 14 == len(set(models.CHEXNET_CLASSES))
    assert sorted(models.CHEXNET_CLASSES) == [name for name in CLASSES if name != "No Finding"]


def test_a_chexnet_file_of_other_shapes_is_refused(tmp_path):
    def fewer(state):
        name = "module.densenet121.classifier.0.weight"
        return {**state, name: state[name][:8]}

    chexnet_file(tmp_path / "m.pth.tar", fewer)
    with pytest.raises(RuntimeError, match=r"head.weight \(file: \(8, 1024\), model: \(14, 1024\)\)"):
        models.load_chexnet(tmp_path / "m.pth.tar")
    chexnet_file(tmp_path / "m.pth.tar", lambda state: dict(list(state.items())[5:]))
    with pytest.raises(RuntimeError, match="5 tensors differ"):
        models.load_chexnet(tmp_path / "m.pth.tar")


def test_both_sides_of_a_logit(tmp_path):
    model = models.select_output(models.build_model("small_cnn", 4).eval(), 2)
    films = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = model(films), models.both_sides(model)(films)
    assert one.shape == (2, 1) and torch.allclose(two, torch.cat([one, -one], 1), atol=1e-6)
    with pytest.raises(ValueError, match="4 outputs"):
        models.both_sides(models.build_model("small_cnn", 4))


def test_a_hostile_chexnet_checkpoint_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    with open(tmp_path / "model.pth.tar", "wb") as file:
        pickle.dump({"state_dict": {}, "extra": Hostile()}, file)
    with pytest.raises(RuntimeError, match="not a readable weights file"):
        models.load_chexnet(tmp_path / "model.pth.tar")
    assert not (tmp_path / "ran").exists()


# --- weights that would be cast or carried along without a word


BAD = {
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "int64": lambda tensor: tensor.to(torch.int64),
    "NaN": lambda tensor: tensor.index_fill(0, torch.tensor([1]), math.nan),
    "infinity": lambda tensor: tensor.double() + 1e300,  # finite, but not as float32
    "sparse": lambda tensor: tensor.to_sparse(),
    "not whole": lambda tensor: torch.zeros(()).expand(tensor.shape),
}


@pytest.mark.parametrize("fault", BAD)
def test_weights_that_are_no_numbers_are_refused_by_the_tensors_name(fault, tmp_path):
    state = build_model("small_cnn", 2).state_dict()
    torch.save(state | {"trunk.3.weight": BAD[fault](state["trunk.3.weight"])}, tmp_path / "bad.pth")
    for load in (
        lambda: build_model("small_cnn", 2, str(tmp_path / "bad.pth")),
        lambda: load_model(tmp_path / "bad.pth", "small_cnn", 2),
    ):
        with pytest.raises(ModelError, match=f"bad.pth: tensor .*3.weight .*{fault}"):
            load()


def test_double_and_half_precision_are_cast(tmp_path):
    state = build_model("small_cnn", 2, seed=1).state_dict()
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        torch.save({name: tensor.to(kind) for name, tensor in state.items()} | {3: "x"}, tmp_path / "cast.pth")
        model = build_model("small_cnn", 2, str(tmp_path / "cast.pth"))
        assert all(tensor.dtype == state[name].dtype for name, tensor in model.state_dict().items())
        torch.testing.assert_close(model.trunk[0].weight, state["trunk.0.weight"], rtol=0.01, atol=1e-4)


def test_the_digest_of_weights_is_of_the_tensors(tmp_path):
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "c": torch.zeros(0, 2, dtype=torch.bfloat16)}
    expected = hashlib.sha256()
    for name in "abc":
        expected.update(repr((name, str(state[name].dtype), tuple(state[name].shape))).encode())
        expected.update(
            state[name].float().numpy().tobytes() if name == "b" else b"\3" + bytes(7) if name == "a" else b""
        )
    assert weights_digest(state) == expected.hexdigest()[:16]
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors", metadata={"x": "y"})
    turned = {"b": state["b"].T.contiguous().T} | {name: state[name] for name in "ca"}
    others = [read_weights(tmp_path / name) for name in ("a.pth", "a.safetensors")] + [turned]
    assert [weights_digest(other) for other in others] == [weights_digest(state)] * 3
    flipped = state["b"].clone()
    flipped.view(torch.int32)[1, 1] ^= 1
    changed = [{"b": flipped}, {"b": state["b"].reshape(3, 2)}, {"b": state["b"].view(torch.int32)}, {"d": state["b"]}]
    assert len({weights_digest(state | change) for change in changed} | {weights_digest(state)}) == 5


def test_a_program_in_the_cache_of_imagenet_weights_does_not_run(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "hub" / "checkpoints" / torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.url.split("/")[-1]
    for write in (
        lambda: torch.save({"x": Evil()}, path),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"PK"),
    ):
        write()
        with pytest.raises(ModelError, match="of tdensenet .*damaged copy in .*hub/checkpoints") as error:
            build_model("tdensenet", 1, "imagenet")
        assert "weights_only" not in str(error.value) and not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match="^small_cnn has no ImageNet weights: set init: scratch"):
        build_model("small_cnn", 1, "imagenet")
