"""Export encoders with their heads as ONNX, in the layout that transformers.js reads.

`onnx/vision_model.onnx`: `pixel_values` float32 [n, 3, height, width] -> `image_embeds`.
`onnx/text_model.onnx`: `input_ids` and `attention_mask` int64 [n, length] -> `text_embeds`.
Embeddings are L2-normalized.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.from_transformers import text_prefix
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.preprocess import TensorPreprocess, timm_tensor_form
from apecache.encoders.preprocess_transformers import resize_options
from apecache.encoders.snapshot import resolve_folder
from apecache.export.check import ExportedModel
from apecache.export.onnx_graph import (
    GRAPH_SUFFIXES,
    GraphDtype,
    export_graph,
    quantize_graph,
    require_loadable,
    require_onnx,
)
from apecache.export.whole_model import WholeModel
from apecache.storage.replace import replace_text

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers of the interpolations."""
DESCRIPTION = "apecache.json"


class _TextGraph(nn.Module):
    """Take the mask as a graph gives it."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded: Tensor = self.text(input_ids, attention_mask)
        return embedded


def write_onnx_model(model: WholeModel, out: Path, dtype: GraphDtype = "float32") -> None:
    """Write both graphs and what prepares their inputs.

    Args:
        model: the run, on the CPU.
        out: the folder.
        dtype: of the weights in the files.

    Raises:
        MissingExtraError: a package of the extra `onnx` is not installed.
    """
    require_onnx(runs=True)
    # transformers.js looks for graphs in a folder of this name.
    graphs = out / "onnx"
    graphs.mkdir(parents=True, exist_ok=True)
    _write_graph(graphs, "vision_model", dtype, lambda path: _export_image(model, path))
    _write_graph(graphs, "text_model", dtype, lambda path: _export_text(model, path))
    _write_json(out / "config.json", _model_config(model))
    preprocessing = _preprocessing(model.image.encoder)
    if preprocessing is not None:
        _write_json(out / "preprocessor_config.json", preprocessing)
    has_tokenizer = _save_tokenizer(model.text.encoder, out)
    description = {
        "dim": model.dim,
        "scale": model.run.scale,
        "dtype": dtype,
        "image_size": list(model.image.encoder.input_shape[1:]),
        "max_tokens": model.text.encoder.max_tokens,
        "padded_length": model.text.encoder.length,
        "pad_id": model.text.encoder.pad_id,
        "text_prefix": text_prefix_of(model.text.encoder),
        "tokenizer": "tokenizer.json" if has_tokenizer else str(model.text.encoder.spec.library),
        "image_encoder": model.image.encoder.spec.library,
        "text_encoder": model.text.encoder.spec.library,
    }
    _write_json(out / DESCRIPTION, description)


def open_onnx_model(folder: Path, model: WholeModel) -> ExportedModel:
    """Open both graphs by onnxruntime; pixels and ids are those of the run's own encoders."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Errors only.
    options.log_severity_level = 3

    def session(name: str) -> Any:
        # A graph of another dtype has a suffix.
        (path,) = (folder / "onnx").glob(f"{name}*.onnx")
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    vision = session("vision_model")
    text = session("text_model")

    def encode_image(images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([model.image.encoder.preprocess(image) for image in images])
        (embedded,) = vision.run(["image_embeds"], {"pixel_values": pixels.numpy()})
        return torch.from_numpy(embedded)

    def encode_text(texts: Sequence[str]) -> Tensor:
        encoder = model.text.encoder
        ids, mask = encoder.pad(encoder.tokenize(texts).ids)
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        # The exporter leaves out a mask that the model does not use.
        names = {node.name for node in text.get_inputs()}
        used = {name: value for name, value in inputs.items() if name in names}
        (embedded,) = text.run(["text_embeds"], used)
        return torch.from_numpy(embedded)

    return ExportedModel(encode_image=encode_image, encode_text=encode_text)


def text_prefix_of(encoder: TextEncoder) -> str:
    """Return what stands before every text; empty without it."""
    spec = encoder.spec
    if spec.prefix is not None:
        return spec.prefix
    if spec.library == "hf":
        return text_prefix(spec)
    module: LibraryModel = encoder.module
    return getattr(module, "prompts", {}).get(getattr(module, "default_prompt_name", None)) or ""


def _write_graph(folder: Path, name: str, dtype: GraphDtype, export: Any) -> None:
    """Write a graph in float32, and in its place the one of another dtype."""
    float32_graph = folder / f"{name}.onnx"
    export(float32_graph)
    if dtype == "float32":
        return
    converted = folder / f"{name}{GRAPH_SUFFIXES[dtype]}.onnx"
    # The converters take a graph in float32.
    quantize_graph(float32_graph, converted, dtype)
    float32_graph.unlink()
    require_loadable(converted, dtype)


def _export_image(model: WholeModel, path: Path) -> None:
    # Three images: an axis of size 1 would be taken as fixed.
    pixels = torch.zeros(3, *model.image.encoder.input_shape)
    export_graph(
        model.image,
        inputs=[pixels],
        input_names=["pixel_values"],
        output_name="image_embeds",
        dynamic_axes=[(0,)],
        path=path,
    )


def _export_text(model: WholeModel, path: Path) -> None:
    encoder = model.text.encoder
    # Three texts of different lengths, so that both axes are free and the mask is used.
    ids, mask = encoder.pad(encoder.tokenize(["a b", "a", "a b c"]).ids)
    # A model that sees its padding has one length.
    free = (0,) if encoder.length else (0, 1)
    export_graph(
        _TextGraph(model.text),
        inputs=[ids, mask],
        input_names=["input_ids", "attention_mask"],
        output_name="text_embeds",
        dynamic_axes=[free, free],
        path=path,
    )


def _model_config(model: WholeModel) -> dict[str, Any]:
    """Return the config.json by which transformers.js chooses CLIP's two towers."""
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": model.dim,
        "logit_scale_init_value": math.log(model.run.scale),
        "text_config": {"model_type": "clip_text_model", "projection_dim": model.dim},
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": model.dim,
            "image_size": model.image.encoder.input_shape[1],
        },
    }


def _preprocessing(encoder: ImageEncoder) -> dict[str, Any] | None:
    """Return a preprocessor_config.json; None where the steps do not fit its layout."""
    spec = encoder.spec
    if spec.library == "hf":
        from transformers import AutoImageProcessor

        processor: Any = AutoImageProcessor.from_pretrained(
            str(resolve_folder(spec)),
            trust_remote_code=False,
        )
        settings: dict[str, Any] = json.loads(processor.to_json_string())
        return {**settings, **resize_options(processor, spec)}
    steps = _steps_of(encoder)
    if steps is None:
        return None
    height, width = steps.crop
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": steps.edge},
        # 3 is bicubic, which CLIP's own preprocessing takes.
        "resample": RESAMPLE.get(steps.interpolation, 3),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(steps.mean),
        "image_std": list(steps.std),
    }


def _steps_of(encoder: ImageEncoder) -> TensorPreprocess | None:
    """Return resize, crop and normalization of a timm or open_clip encoder."""
    if encoder.spec.library == "timm":
        from apecache.export.library_folders import timm_data_config

        return timm_tensor_form(timm_data_config(encoder))
    from apecache.encoders.from_open_clip import read_tensor_form

    return read_tensor_form(encoder.fingerprint.fields["inputs"]["config"])


def _save_tokenizer(encoder: TextEncoder, out: Path) -> bool:
    """Write tokenizer.json and its settings; open_clip's own tokenizer has none."""
    spec = encoder.spec
    if spec.library == "open_clip":
        return False
    from transformers import AutoTokenizer

    folder = resolve_folder(spec, modules=("[0-9]*_*/*",) if spec.library == "st" else ())
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    # transformers.js truncates by this number.
    tokenizer.model_max_length = encoder.max_tokens
    if encoder.fingerprint.fields["inputs"].get("lower_case"):
        from tokenizers import normalizers

        old = tokenizer.backend_tokenizer.normalizer
        steps = [normalizers.Lowercase()] if old is None else [normalizers.Lowercase(), old]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.save_pretrained(out)
    return True


def _write_json(path: Path, value: dict[str, Any]) -> None:
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))
