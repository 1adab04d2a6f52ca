"""The classifiers: a convolutional trunk, global average pooling, one linear layer. Which layer each lens reads.

To add a backbone of its own kind, add a function and its line in `BACKBONES`; any convolutional timm model already
works by its name.
"""

import difflib
import hashlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn


class ModelError(RuntimeError, ValueError):
    """A backbone that does not exist, or weights that cannot be had or do not fit; the message says what to do."""


class Classifier(nn.Module):
    """`trunk` maps films (B, 3, S, S) to feature maps (B, F, h, w); their spatial mean goes through the linear `head`
    to M logits.

    With this head CAM and the gradient methods are closed forms of (feature maps, head.weight).
    """

    def __init__(self, trunk: nn.Module, n_features: int, n_outputs: int):
        super().__init__()
        self.trunk = trunk
        self.pool = nn.AdaptiveAvgPool2d(1)  # a module: relevance is propagated through modules
        self.head = nn.Linear(n_features, n_outputs)

    def forward(self, films: torch.Tensor) -> torch.Tensor:
        """Logits (B, M) of films (B, 3, S, S), float32, normalised with ImageNet's mean and standard deviation."""
        return self.head(self.pool(self.trunk(films)).flatten(1))


class SmallTransformer(nn.Module):
    """Two blocks of self-attention on 8 x 8 patches of a 32 px film; `norm` gives tokens (B, 64, 64), `maps` the same
    as (B, 64, 8, 8)."""

    def __init__(self, width: int = 64, grid: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, grid * grid, width) * 0.02)
        options = {"dropout": 0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.maps = nn.Unflatten(2, (grid, grid))

    def forward(self, films: torch.Tensor) -> torch.Tensor:
        """Feature maps (B, 64, 8, 8) of films (B, 3, 32, 32); ValueError for films of another size."""
        tokens = self.patches(films).flatten(2).transpose(1, 2)
        if tokens.shape[1] != self.positions.shape[1]:
            raise ModelError(
                f"small_transformer takes films of 32 x 32 px, these are {tuple(films.shape[2:])}: set image_size: 32"
            )
        tokens = tokens + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.maps(self.norm(tokens).transpose(1, 2))


# ---- the backbones: functions of the name of torchvision's weights, or None, to (trunk, number of feature maps)


def _resnet50(weights):
    from torchvision.models import resnet50

    # Residual branches that start at zero let a net this deep learn from its first steps; pretrained weights overwrite
    # them.
    network = resnet50(weights=weights, zero_init_residual=True)
    return nn.Sequential(OrderedDict(list(network.named_children())[:-2])), 2048


def _densenet121(weights, stages=None):
    from torchvision.models import densenet121

    # Its last ReLU is a module of its own, so that a hook sees the rectified maps: torchvision's norm5 is a plain
    # BatchNorm whose ReLU lives in forward.
    trunk = OrderedDict(list(densenet121(weights=weights).features.named_children())[:stages])
    if stages:  # 7: up to the second dense block
        trunk["norm5"] = nn.BatchNorm2d(512)
    trunk["relu5"] = nn.ReLU()
    return nn.Sequential(trunk), trunk["norm5"].num_features


def _vgg16(weights):
    from torchvision.models import vgg16

    return vgg16(weights=weights).features[:30], 512


def _small_cnn(weights):
    stages = []
    for wide, width, stride in ((3, 32, 2), (32, 64, 2), (64, 64, 1)):
        stages += [nn.Conv2d(wide, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stages), 64


# The function, torchvision's ImageNet weights, the module read by CAM, the module read by dissection, dissection's q.
BACKBONES = {
    "tdensenet": (lambda weights: _densenet121(weights, stages=7), "IMAGENET1K_V1", "trunk.relu5", "trunk.relu5", 0.01),
    "resnet50": (_resnet50, "IMAGENET1K_V2", "trunk.layer4.2", "trunk.layer3.5", 0.04),
    "densenet121": (_densenet121, "IMAGENET1K_V1", "trunk.relu5", "trunk.relu5", 0.04),
    "vgg16": (_vgg16, "IMAGENET1K_V1", "trunk.29", "trunk.29", 0.04),
    "small_cnn": (_small_cnn, None, "trunk.8", "trunk.8", 0.04),
    "small_transformer": (lambda weights: (SmallTransformer(), 64), None, "trunk.maps", "trunk.maps", 0.04),
}
# The order of the public CheXNet checkpoint's outputs, which is not alphabetical.
CHEXNET_CLASSES = tuple(
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation Edema Emphysema "
    "Fibrosis Pleural_Thickening Hernia".split()
)


def layers(backbone: str) -> tuple[str, str, float]:
    """(CAM layer, dissection layer, q) of a backbone; for a timm model its last maps, and q = 0.01."""
    return BACKBONES[backbone][2:] if backbone in BACKBONES else ("trunk", "trunk", 0.01)


def build_model(backbone: str, n_outputs: int, init: str = "scratch", seed: int = 0) -> Classifier:
    """Make a classifier with initial weights.

    Parameters
    ----------
    backbone : str
        'tdensenet' (DenseNet121 cut after its second dense block), 'resnet50', 'densenet121', 'vgg16' (its
        convolutions; pooling and one linear layer replace the three dense ones, as Zhou et al. do for CAM), 'small_cnn'
        and 'small_transformer' (for films of 32 px, such as digits), or the timm name of a convolutional model.
    n_outputs : int
        Logits M.
    init : str
        'scratch', 'imagenet', or the path of a weights file: safetensors or a torch file, with the names of torchvision
        (timm for a timm backbone) or of a run of this project. The head is always new, drawn from `seed`.
    seed : int
        Of every random weight; the caller's random state is left as it was.

    Returns
    -------
    Classifier
        On the CPU, float32.

    Raises
    ------
    ValueError
        Unknown backbone, or one whose features are not maps.
    RuntimeError
        ImageNet weights that cannot be downloaded, or a file that does not fit; the message says what to do.
    """
    with torch.random.fork_rng(devices=[]):
        # The CPU's alone: torch.manual_seed would reseed GPUs too, which fork_rng([]) does not put back.
        torch.default_generator.manual_seed(seed)
        trunk, n_features = _trunk(backbone, pretrained=init == "imagenet")
        model = Classifier(trunk, n_features, n_outputs)
    if init not in ("scratch", "imagenet"):
        _load_trunk(model.trunk, init, backbone)
    return model


def check_backbone(backbone: str) -> None:
    """ValueError where there is no such backbone; it names near ones."""
    if backbone not in BACKBONES:
        import timm

        if not timm.is_model(backbone):
            near = difflib.get_close_matches(backbone, dict.fromkeys([*BACKBONES, *timm.list_models()]), n=5)
            raise ModelError(
                f"backbone {backbone!r} is neither one of {sorted(BACKBONES)} nor a timm model"
                + (f"; near it: {', '.join(near)}" if near else "")
            )


def _trunk(backbone: str, pretrained: bool) -> tuple[nn.Module, int]:
    check_backbone(backbone)
    if pretrained:  # else torchvision runs what a file in the cache says
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        if backbone in BACKBONES:
            make, weights, *_ = BACKBONES[backbone]
            if pretrained and not weights:
                raise ModelError(f"{backbone} has no ImageNet weights: set init: scratch")
            return make(weights if pretrained else None)

        import timm

        network = timm.create_model(backbone, pretrained=pretrained, num_classes=0, global_pool="")
    except Exception as error:  # of torch, safetensors and the network
        if not pretrained or isinstance(error, ModelError):
            raise
        why = "more than tensors" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
        raise ModelError(
            f"the ImageNet weights of {backbone} could not be downloaded or read ({type(error).__name__}: {why}). "
            f"Delete a damaged copy in {torch.hub.get_dir()}/checkpoints, or download them elsewhere and set init to "
            "that local file (.pth or .safetensors), or set init: scratch to train from random weights"
        ) from error
    try:
        with torch.no_grad():
            maps = network.eval()(torch.zeros(1, 3, 224, 224))
    except Exception as error:  # of the network: what films it takes
        raise ModelError(f"backbone {backbone!r} takes no films of 224 px ({error}): choose another") from error
    # Windowed transformers put the channels last.
    if maps.ndim != 4 or getattr(network, "output_fmt", "NCHW") != "NCHW":
        raise ModelError(
            f"backbone {backbone!r} gives features of shape {tuple(maps.shape)}, not maps (1, F, h, w): choose a "
            "convolutional model"
        )
    return network.train(), maps.shape[1]


def _load_trunk(trunk: nn.Module, path: str, backbone: str) -> None:
    if not Path(path).is_file():
        raise ModelError(f"no weights file at {path}: init takes imagenet, scratch, or the path of a file")
    state = read_weights(path)
    if any(name.startswith("trunk.") for name in state):
        state = {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")}
    wanted = trunk.state_dict()
    # torchvision's DenseNet has a level `features` that our trunk lacks; some timm trunks have it too.
    ours = {name: name if name in wanted else _modern_name(name.removeprefix("features.")) for name in state}
    state = {ours[name]: tensor for name, tensor in state.items()}
    # A truncated DenseNet has a new final norm: the released one belongs to 1024 channels and is left out, as in the
    # paper.
    new = {name for name in wanted if name.startswith("norm5.") and backbone == "tdensenet"}
    fits = {name for name in wanted if name in state and state[name].shape == wanted[name].shape}
    needed = [name for name in wanted if name not in new and not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in state]
    other = [name for name in wanted if name in state and name not in fits | new]
    faults = [f"{len(missing)} tensors are missing, the first is {missing[0]}"] if missing else []
    if other:
        shapes = f"{tuple(state[other[0]].shape)} instead of {tuple(wanted[other[0]].shape)}"
        faults += [f"{len(other)} have another shape, the first is {other[0]} {shapes}"]
    if faults:
        raise ModelError(f"{path} does not hold weights of {backbone}: {'; '.join(faults)}")
    _require_numbers(wanted, {name: state[name] for name in fits}, path)
    trunk.load_state_dict({name: state[name] for name in fits}, strict=False)


def _modern_name(name: str) -> str:
    """DenseNet files of 2017 call `norm1` `norm.1` and so on inside a dense layer."""
    for part in ("norm", "relu", "conv"):
        for k in ("1", "2"):
            name = name.replace(f".{part}.{k}.", f".{part}{k}.")
    return name


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a weights file, by name: safetensors, or a torch file read as weights only (a pickled program is
    refused).

    Raises
    ------
    RuntimeError
        No such file, not a weights file, or one that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text advises to trust the file
        raise ModelError(
            f"{path} is not a readable weights file: it is damaged, or holds more than tensors, which could run code. "
            "Save model.state_dict() and nothing else"
        ) from None
    except Exception as error:  # safetensors and pickle raise types of their own
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(f"{path} is not a readable weights file ({why}): put a whole copy in its place") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds no dictionary of tensors: save model.state_dict()")
    state = {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor) and isinstance(name, str)}
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ModelError(f"{path}: tensor {name} is sparse, quantized or not whole: save plain tensors")
    return state


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The first 16 digits of the SHA-256 of tensors on the CPU: names, types, shapes and bits, whatever file they lie
    in."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def load_model(path: str | Path, backbone: str, n_outputs: int) -> Classifier:
    """The classifier of a finished run, in evaluation mode.

    Raises
    ------
    RuntimeError
        The file is missing, unreadable, or of another architecture or number of outputs; the message names both.
    """
    state = read_weights(path)
    model = build_model(backbone, n_outputs)
    _require_same(model.state_dict(), state, path, f"a {backbone} with {n_outputs} outputs")
    model.load_state_dict(state)
    return model.eval()


def load_chexnet(path: str | Path) -> Classifier:
    """The public CheXNet checkpoint as a `Classifier`: DenseNet121, 14 logits in the order of `CHEXNET_CLASSES`, in
    evaluation mode.

    The file holds a DataParallel module with layer names of 2017 and a sigmoid after its last layer, which has no
    weights. Our outputs are the logits before it.

    Parameters
    ----------
    path : path-like
        model.pth.tar of arnoweng/CheXNet, or the same tensors as safetensors. It is read as weights only.

    Raises
    ------
    RuntimeError
        The file is missing, unreadable, would run code, or holds other tensors; the message names the first that
        differs.
    """
    state = {}
    for name, tensor in read_weights(path).items():
        name = _modern_name(name.removeprefix("module.").removeprefix("densenet121."))
        name = name.replace("classifier.0.", "head.").replace("classifier.", "head.")
        state["trunk." + name.removeprefix("features.") if name.startswith("features.") else name] = tensor
    model = build_model("densenet121", len(CHEXNET_CLASSES))
    # Files of 2017 lack the counters of batches that today's batch norms keep; evaluation does not read them.
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    _require_same(wanted, state, path, "a CheXNet checkpoint (DenseNet121 with 14 outputs)")
    model.load_state_dict(state, strict=False)
    return model.eval()


def select_output(model: Classifier, output: int) -> Classifier:
    """The same classifier with one of its logits alone. It shares the trunk."""
    return _with_head(model, model.head.weight[[output]], model.head.bias[[output]])


def both_sides(model: Classifier) -> Classifier:
    """A classifier of one logit f as one of two, (f, -f): what speaks for the finding, and what against it. It shares
    the trunk. ValueError where the model has more logits than one."""
    weight, bias = model.head.weight, model.head.bias
    if len(weight) != 1:
        raise ValueError(f"the model has {len(weight)} outputs: only a single logit has two sides")
    return _with_head(model, torch.cat([weight, -weight]), torch.cat([bias, -bias]))


def _with_head(model: Classifier, weight: torch.Tensor, bias: torch.Tensor) -> Classifier:
    other = Classifier(model.trunk, weight.shape[1], len(weight)).to(weight.device)
    other.head.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return other.train(model.training)


def _require_same(wanted: Mapping, state: Mapping, path: str | Path, what: str) -> None:
    shapes, found = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (wanted, state))
    differing = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ModelError(
            f"{path} is not {what}: {len(differing)} tensors differ, the first is {name} "
            f"(file: {found.get(name, 'absent')}, model: {shapes.get(name, 'absent')})"
        )
    _require_numbers(wanted, state, path)


def _require_numbers(wanted, state, path):
    """Refuse what a copy into the model would cast or carry along without a word: `state` has its names and shapes."""
    for name, tensor in state.items():
        if wanted[name].is_floating_point() and not tensor.is_floating_point():
            raise ModelError(f"{path}: tensor {name} is {tensor.dtype}, not of floating point: save it as float32")
        if not tensor.to(wanted[name].dtype).isfinite().all():
            raise ModelError(f"{path}: tensor {name} holds NaN or infinity: take weights from before they diverged")
