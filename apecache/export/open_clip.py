"""Export a run of a timm: and an hf: encoder with linear heads as open_clip's own folder."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.from_transformers import text_prefix
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.snapshot import resolve_folder
from apecache.errors import MissingExtraError, RunError
from apecache.export.affine import affine_of, input_shift, is_affine
from apecache.export.check import ExportedModel
from apecache.export.library_folders import timm_data_config, timm_model_args, write_timm_folder
from apecache.export.whole_model import WholeModel
from apecache.storage.replace import replace_tensors, replace_text

POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler", "max": "max_pooler"}
TEXT_TYPES = ("bert", "roberta", "xlm-roberta")
"""Types of transformers that open_clip builds and whose last layer ends in a norm with a bias."""
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
ELSE = "apecache.open_clip_triple opens every run"


def write_open_clip(model: WholeModel, out: Path, final: Path) -> None:
    """Write a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

    Args:
        model: the run.
        out: where the files are written.
        final: the folder's later name, which the configuration holds where an encoder has no
            name on a hub.

    Raises:
        RunError: heads or encoders that open_clip's own classes cannot express.
        MissingExtraError: open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError("open_clip", "open-clip") from None
    for side in ("image", "text"):
        head = model.head(side)
        if not is_affine(head):
            name = "trained with its encoder" if head is None else f"of kind {head.spec.kind}"
            raise RunError(
                f"the {side} head is {name}; an open_clip folder can hold linear and identity "
                f"heads: {ELSE}"
            )
    _require_encoders(model)
    out.mkdir(parents=True, exist_ok=True)
    image_config = _image_config(model.image.encoder, out, final)
    text_config = _text_config(model.text.encoder, out, final)
    config = {
        "model_cfg": {"embed_dim": model.dim, "vision_cfg": image_config, "text_cfg": text_config},
        "preprocess_cfg": _preprocess_config(model.image.encoder),
    }
    tensors = {
        **_image_tensors(model),
        **_text_tensors(model),
        "logit_scale": torch.tensor(math.log(model.run.scale)),
    }
    replace_tensors(out / WEIGHTS, tensors)
    replace_text(out / CONFIG, json.dumps(config, indent=1))
    del open_clip


def open_open_clip(folder: Path) -> ExportedModel:
    """Open what `write_open_clip` wrote, by open_clip alone."""
    import open_clip

    name = f"local-dir:{folder}"
    loaded, _, preprocess = open_clip.create_model_and_transforms(name)
    loaded.eval()
    tokenizer = open_clip.get_tokenizer(name)

    @torch.no_grad()
    def encode_image(images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in images])
        embedded: Tensor = loaded.encode_image(pixels, normalize=True)
        return embedded

    @torch.no_grad()
    def encode_text(texts: Sequence[str]) -> Tensor:
        embedded: Tensor = loaded.encode_text(tokenizer(list(texts)), normalize=True)
        return embedded

    return ExportedModel(encode_image=encode_image, encode_text=encode_text)


def retarget(folder: Path, scratch: Path, final: Path) -> None:
    """Write the folder's later name where its configuration has the name of the scratch folder."""
    path = folder / CONFIG
    text = path.read_text(encoding="utf-8")
    old_name = json.dumps(str(scratch))[1:-1]
    new_name = json.dumps(str(final))[1:-1]
    replace_text(path, text.replace(old_name, new_name))


def _require_encoders(model: WholeModel) -> None:
    image, text = model.image.encoder, model.text.encoder
    if image.spec.library != "timm" or image.spec.pooling != "default" or image.spec.layer:
        raise RunError(
            f"image encoder {image.spec}: an open_clip folder can hold timm: encoders with their "
            f"own pooling; {ELSE}"
        )
    config = timm_data_config(image)
    # open_clip resizes the short side to the size that it crops, so nothing is cropped away there.
    edge = math.floor(config["input_size"][1] / config["crop_pct"])
    is_plain = config["crop_mode"] == "center" and edge == config["input_size"][1]
    if not is_plain:
        raise RunError(
            f"image encoder {image.spec} resizes to {edge} px and crops {config['input_size'][1]}; "
            f"open_clip's configuration knows no such crop: {ELSE}"
        )
    module: LibraryModel = text.module
    model_type = getattr(getattr(module, "config", None), "model_type", text.spec.library)
    pooling = text.fingerprint.fields["inputs"].get("pooling")
    is_known = text.spec.library == "hf" and model_type in TEXT_TYPES and pooling in POOLERS
    if not is_known or text.spec.layer is not None:
        raise RunError(
            f"text encoder {text.spec} ({model_type}) with pooling {pooling}: an open_clip folder "
            f"can hold hf: encoders of {', '.join(TEXT_TYPES)} with mean, cls or max pooling; "
            f"{ELSE}"
        )
    if text_prefix(text.spec):
        raise RunError(
            f"text encoder {text.spec} puts {text_prefix(text.spec)!r} before every text, which "
            f"open_clip's configuration cannot say: {ELSE}"
        )


def _image_config(encoder: ImageEncoder, out: Path, final: Path) -> dict[str, Any]:
    module: LibraryModel = encoder.module
    name = str(module.default_cfg.get("architecture") or "")
    if timm_model_args(encoder):
        # Only a folder can give timm the arguments of an architecture.
        write_timm_folder(encoder, out / "image", loader="open_clip")
        name = f"local-dir:{final / 'image'}"
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_proj_bias": True,
        "image_size": encoder.input_shape[1],
    }


def _text_config(encoder: TextEncoder, out: Path, final: Path) -> dict[str, Any]:
    module: LibraryModel = encoder.module
    name = encoder.spec.name
    if encoder.spec.folder is not None:
        module.config.save_pretrained(out / "text")
        name = str(final / "text")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(resolve_folder(encoder.spec)),
        trust_remote_code=False,
    )
    tokenizer.save_pretrained(out)
    return {
        "hf_model_name": name,
        "hf_tokenizer_name": name,
        "hf_model_pretrained": False,
        "hf_pooler_type": POOLERS[encoder.fingerprint.fields["inputs"]["pooling"]],
        "hf_proj_type": "linear",
        "context_length": encoder.max_tokens,
    }


def _preprocess_config(encoder: ImageEncoder) -> dict[str, Any]:
    config = timm_data_config(encoder)
    return {
        "size": encoder.input_shape[1],
        "mode": "RGB",
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
        "resize_mode": "shortest",
    }


def _image_tensors(model: WholeModel) -> dict[str, Tensor]:
    head = model.head("image")
    assert head is not None
    weight, bias = affine_of(head)
    # open_clip's projection of images has a bias, so that side needs no shift.
    trunk = model.image.encoder.module.state_dict()
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in trunk.items()}
    tensors["visual.head.proj.weight"] = weight.float()
    tensors["visual.head.proj.bias"] = bias.float()
    return tensors


def _text_tensors(model: WholeModel) -> dict[str, Tensor]:
    """Return the text tower; its projection has no bias, so the last norm takes it up."""
    head = model.head("text")
    assert head is not None
    weight, bias = affine_of(head)
    module: LibraryModel = model.text.encoder.module
    tower = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    last = module.config.num_hidden_layers - 1
    name = f"encoder.layer.{last}.output.LayerNorm.bias"
    shift = input_shift(weight, bias, "open_clip's text projection")
    tower[name] = (tower[name].double() + shift).to(tower[name].dtype)
    tensors = {f"text.transformer.{name}": tensor for name, tensor in tower.items()}
    # open_clip builds the model without its pooler, and refuses weights that it does not know.
    tensors = {name: tensor for name, tensor in tensors.items() if ".pooler." not in name}
    tensors["text.proj.weight"] = weight.float()
    return tensors
