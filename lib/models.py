"""The classifiers: a convolutional trunk, global average pooling, one linear layer. Which layer each lens reads.

To add a backbone of its own kind, add one branch to `_trunk`; any convolutional timm model already works by its name.
"""

import difflib
import pickle
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn


class Classifier(nn.Module):
    """`trunk` maps films (B, 3, S, S) to feature maps (B, F, h, w); their spatial mean goes through the linear `head` to M logits.

    With this head CAM and the gradient methods are closed forms of (feature maps, head.weight).
    """

    def __init__(self, trunk, n_features, n_outputs):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(n_features, n_outputs)

    def forward(self, films):
        """Logits (B, M) of films (B, 3, S, S), float32, normalised with ImageNet's mean and standard deviation."""
        return self.head(self.trunk(films).mean((2, 3)))


# Module read by CAM, module read by dissection, and dissection's q. T-DenseNet's last ReLU is a module of its own, so that a hook
# sees the rectified maps: torchvision's norm5 is a plain BatchNorm whose ReLU lives in forward.
LAYERS = {
    "tdensenet": ("trunk.relu5", "trunk.relu5", 0.01),
    "resnet50": ("trunk.layer4.2", "trunk.layer3.5", 0.04),
}


def layers(backbone):
    """(CAM layer, dissection layer, q) of a backbone; for a timm model its last maps, and q = 0.01."""
    return LAYERS.get(backbone, ("trunk", "trunk", 0.01))


def build_model(backbone, n_outputs, init="scratch", seed=0):
    """Make a classifier with initial weights.

    Parameters
    ----------
    backbone : str
        'tdensenet' (DenseNet121 cut after its second dense block), 'resnet50', or the timm name of a convolutional model.
    n_outputs : int
        Logits M.
    init : str
        'scratch', 'imagenet', or the path of a weights file: safetensors or a torch file, with the names of torchvision (timm for a
        timm backbone) or of a run of this project. The head is always new, drawn from `seed`.
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
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would reseed GPUs too, which fork_rng([]) does not put back
        trunk, n_features = _trunk(backbone, pretrained=init == "imagenet")
        model = Classifier(trunk, n_features, n_outputs)
    if init not in ("scratch", "imagenet"):
        _load_trunk(model.trunk, init, backbone)
    return model


def _trunk(backbone, pretrained):
    try:
        if backbone == "resnet50":
            from torchvision.models import ResNet50_Weights, resnet50
            # Residual branches that start at zero let a net this deep learn from its first steps; pretrained weights overwrite them.
            network = resnet50(weights=ResNet50_Weights.IMAGENET1K_V2 if pretrained else None, zero_init_residual=True)
            return nn.Sequential(OrderedDict(list(network.named_children())[:-2])), 2048
        if backbone == "tdensenet":
            from torchvision.models import DenseNet121_Weights, densenet121
            features = densenet121(weights=DenseNet121_Weights.IMAGENET1K_V1 if pretrained else None).features
            stages = OrderedDict(list(features.named_children())[:7])
            stages["norm5"], stages["relu5"] = nn.BatchNorm2d(512), nn.ReLU()
            return nn.Sequential(stages), 512

        import timm
        if not timm.is_model(backbone):
            near = difflib.get_close_matches(backbone, [*LAYERS, *timm.list_models()], n=5)
            raise ValueError(f"backbone {backbone!r} is neither one of {sorted(LAYERS)} nor a timm model" + (f"; near it: {', '.join(near)}" if near else ""))
        network = timm.create_model(backbone, pretrained=pretrained, num_classes=0, global_pool="")
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"the ImageNet weights of {backbone} could not be downloaded ({error}). Either download them elsewhere and set init to that "
            "local file (.pth or .safetensors), or set init: scratch to train from random weights") from error
    with torch.no_grad():
        maps = network.eval()(torch.zeros(1, 3, 224, 224))
    if maps.ndim != 4 or getattr(network, "output_fmt", "NCHW") != "NCHW":  # windowed transformers put the channels last
        raise ValueError(f"backbone {backbone!r} gives features of shape {tuple(maps.shape)}, not maps (1, F, h, w): choose a convolutional model")
    return network.train(), maps.shape[1]


def _load_trunk(trunk, path, backbone):
    if not Path(path).is_file():
        raise RuntimeError(f"no weights file at {path}: init takes imagenet, scratch, or the path of a file")
    state = read_weights(path)
    if any(name.startswith("trunk.") for name in state):
        state = {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")}
    wanted = trunk.state_dict()
    # torchvision's DenseNet has a level `features` that our trunk lacks; some timm trunks have it too.
    state = {name if name in wanted else _modern_name(name.removeprefix("features.")): tensor for name, tensor in state.items()}
    # A truncated DenseNet has a new final norm: the released one belongs to 1024 channels and is left out, as in the paper.
    new = {name for name in wanted if name.startswith("norm5.")} if backbone == "tdensenet" else set()
    missing = [name for name in wanted if name not in state and name not in new and not name.endswith("num_batches_tracked")]
    other = [f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}" for name, tensor in wanted.items()
             if name in state and state[name].shape != tensor.shape and name not in new]
    if missing or other:
        raise RuntimeError(f"{path} does not hold weights of {backbone}: " + "; ".join(
            ([f"{len(missing)} tensors are missing, the first is {missing[0]}"] if missing else [])
            + ([f"{len(other)} have another shape, the first is {other[0]}"] if other else [])))
    trunk.load_state_dict({name: state[name] for name, tensor in wanted.items()
                           if name in state and state[name].shape == tensor.shape}, strict=False)


def _modern_name(name):
    """DenseNet files of 2017 call `norm1` `norm.1` and so on inside a dense layer."""
    for part in ("norm", "relu", "conv"):
        for k in ("1", "2"):
            name = name.replace(f".{part}.{k}.", f".{part}{k}.")
    return name


def read_weights(path):
    """Tensors of a weights file, by name: safetensors, or a torch file read as weights only (a pickled program is refused).

    Raises
    ------
    RuntimeError
        No such file, not a weights file, or one that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise RuntimeError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text advises to trust the file
        raise RuntimeError(f"{path} is not a readable weights file: it is damaged, or holds more than tensors, which could run code. "
                           "Save model.state_dict() and nothing else") from None
    except Exception as error:  # safetensors and pickle raise types of their own
        raise RuntimeError(f"{path} is not a readable weights file ({type(error).__name__}: {error})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise RuntimeError(f"{path} holds no dictionary of tensors: save model.state_dict()")
    return {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}


def load_model(path, backbone, n_outputs):
    """The classifier of a finished run, in evaluation mode.

    Raises
    ------
    RuntimeError
        The file is missing, unreadable, or of another architecture or number of outputs; the message names both.
    """
    state = read_weights(path)
    model = build_model(backbone, n_outputs)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise RuntimeError(f"{path} is not a {backbone} with {n_outputs} outputs: {len(differing)} tensors differ, the first is {name} "
                           f"(file: {found.get(name, 'absent')}, model: {wanted.get(name, 'absent')})")
    model.load_state_dict(state)
    return model.eval()
