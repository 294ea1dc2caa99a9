"""Export a run as a sentence-transformers folder: both sides, or the text side alone.

All modules are the library's own: per side encoder, pooling and the head, then normalization. A
router sends texts and images to their side.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.from_transformers import text_prefix
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.preprocess_transformers import resize_options
from apecache.encoders.snapshot import resolve_folder
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.weight_files import TRANSFORMERS_WEIGHTS
from apecache.errors import MissingExtraError, RunError
from apecache.export.check import ExportedModel
from apecache.export.head_chain import head_modules
from apecache.export.library_folders import write_timm_folder
from apecache.export.whole_model import WholeModel

TEXT_POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "last": "lasttoken"}
"""Poolings that sentence-transformers has, and their names there."""
PROMPT_NAMES = ("query", "document")
"""One prompt under both: `encode_query` and `encode_document` would put nothing before a text."""
# Where nothing is said, the library asks whether it may run a repository's code.
NO_CODE = {"trust_remote_code": False}


def write_sentence_transformers(model: WholeModel, out: Path, text_only: bool = False) -> None:
    """Write a folder whose `SentenceTransformer(folder).encode` gives the run's embeddings.

    Args:
        model: the run.
        out: the folder.
        text_only: leave the image side out.

    Raises:
        RunError: a head or encoder that the library's own modules cannot express.
        MissingExtraError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Router
    except ImportError:
        raise MissingExtraError("sentence_transformers", "sentence-transformers") from None
    text_encoder = model.text.encoder
    text_head = head_modules(model.head("text"), "text")
    text_side = [*_text_modules(text_encoder), *text_head]
    if text_only:
        modules = [*text_side, Normalize()]
        _assemble(SentenceTransformer, modules, text_encoder).save(
            str(out),
            create_model_card=False,
        )
        return
    # Heads first: they are refused before an encoder is loaded a second time.
    image_head = head_modules(model.head("image"), "image")
    # The folder of a timm encoder is read while the modules are made.
    with TemporaryDirectory() as staging:
        image_side = [*_image_modules(model.image.encoder, Path(staging)), *image_head]
        routes: dict[str, Any] = {"text": text_side, "image": image_side}
        router: Any = Router(routes, default_route="text")
        modules = [router, Normalize()]
        _assemble(SentenceTransformer, modules, text_encoder).save(
            str(out),
            create_model_card=False,
        )
        _write_timm_config(model.image.encoder, out)
    _write_modalities(out)


def _write_modalities(out: Path) -> None:
    """Name both modalities at the top of the folder, where mteb looks for them on a hub.

    sentence-transformers reads this file in the folders of the sides alone.
    """
    sides = {}
    for path in sorted(out.glob("*/sentence_bert_config.json")):
        sides.update(json.loads(path.read_text(encoding="utf-8"))["modality_config"])
    content = json.dumps({"modality_config": sides}, indent=4)
    (out / "sentence_bert_config.json").write_text(content + "\n", encoding="utf-8")


def _write_timm_config(encoder: ImageEncoder, out: Path) -> None:
    """Put timm's own config beside the weights: transformers' copy lacks the class names."""
    if encoder.spec.library != "timm":
        return
    for folder in out.glob("*/image_0_Transformer"):
        write_timm_folder(encoder, folder, loader="transformers")


def open_sentence_transformers(folder: Path, text_only: bool = False) -> ExportedModel:
    """Open what `write_sentence_transformers` wrote, by the library alone."""
    from sentence_transformers import SentenceTransformer

    loaded: Any = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)

    def encode(inputs: Sequence[Any]) -> Tensor:
        encoded: Tensor = loaded.encode(
            list(inputs),
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return encoded

    def encode_image(images: Sequence[Image.Image]) -> Tensor:
        return encode(images)

    def encode_text(texts: Sequence[str]) -> Tensor:
        return encode(texts)

    return ExportedModel(
        encode_image=None if text_only else encode_image,
        encode_text=encode_text,
    )


def _assemble(library: Any, modules: list[nn.Module], encoder: TextEncoder) -> LibraryModel:
    prefix = _prefix(encoder)
    prompts: dict[str, Any] = {}
    if prefix:
        prompts = {
            "prompts": dict.fromkeys(PROMPT_NAMES, prefix),
            "default_prompt_name": PROMPT_NAMES[0],
        }
    return library(modules=modules, device="cpu", **prompts)


def _prefix(encoder: TextEncoder) -> str:
    """Return what stands before every text; empty without it."""
    spec = encoder.spec
    if spec.prefix is not None:
        return spec.prefix
    if spec.library == "hf":
        return text_prefix(spec)
    module: LibraryModel = encoder.module
    return getattr(module, "prompts", {}).get(getattr(module, "default_prompt_name", None)) or ""


def _text_modules(encoder: TextEncoder) -> list[nn.Module]:
    """Return the encoder and its pooling as modules of the library."""
    spec = encoder.spec
    if spec.library == "st":
        module: LibraryModel = encoder.module
        module.max_seq_length = encoder.max_tokens
        return list(module)
    if spec.library != "hf" or spec.layer is not None:
        raise _unfit(spec, "hf: encoders with mean, cls, max, last or their own pooling, and st:")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    # The pooling `default` is resolved by the encoder, and only its fingerprint has the result.
    described = encoder.fingerprint.fields["inputs"]
    is_projected = described["pooling"] == "default"
    pooling = TEXT_POOLINGS.get(described["pooling"])
    if not is_projected and pooling is None:
        raise _unfit(spec, "hf: encoders with mean, cls, max, last or their own pooling, and st:")
    transformer: Any = Transformer(
        str(resolve_folder(spec, TRANSFORMERS_WEIGHTS)),
        max_seq_length=encoder.max_tokens,
        do_lower_case=bool(described.get("lower_case")),
        model_kwargs={**NO_CODE, "torch_dtype": torch.float32},
        processor_kwargs=dict(NO_CODE),
        config_kwargs=dict(NO_CODE),
        **(_own_output("text", "get_text_features", "pooler_output") if is_projected else {}),
    )
    return [transformer] if is_projected else [transformer, Pooling(encoder.dim, pooling)]


def _image_modules(encoder: ImageEncoder, staging: Path) -> list[nn.Module]:
    """Return the encoder and its pooling as modules of the library."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    spec = encoder.spec
    if spec.library not in ("timm", "hf") or spec.layer is not None:
        raise _unfit(spec, "timm: and hf: encoders with their own pooling, cls, or mean")
    pooling = encoder.fingerprint.fields["inputs"]["pooling"]
    if pooling in ("model", "default"):
        method, output = _own_image_output(encoder)
        options = _own_output("image", method, output)
        poolings: list[nn.Module] = []
    elif pooling in ("cls", "mean"):
        options = {
            "modality_config": {
                "image": {"method": "forward", "method_output_name": "last_hidden_state"},
            },
            "module_output_name": "token_embeddings",
        }
        poolings = [Pooling(encoder.dim, pooling)]
    else:
        raise _unfit(spec, "timm: and hf: encoders with their own pooling, cls, or mean")
    if spec.library == "timm":
        write_timm_folder(encoder, staging, loader="transformers")
        folder = staging
    else:
        folder = resolve_folder(spec, TRANSFORMERS_WEIGHTS)
    transformer: Any = Transformer(
        str(folder),
        model_kwargs={**NO_CODE, "torch_dtype": torch.float32},
        processor_kwargs=dict(NO_CODE),
        config_kwargs=dict(NO_CODE),
        **options,
    )
    # A run at another resolution has its own size of pixels, which the saved processor must have.
    if spec.library == "hf":
        processor = getattr(transformer.processor, "image_processor", transformer.processor)
        for name, value in resize_options(processor, spec).items():
            setattr(processor, name, value)
    return [transformer, *poolings]


def _own_image_output(encoder: ImageEncoder) -> tuple[str, str]:
    """Return the method of the model and the output that hold its own pooled features."""
    config = getattr(encoder.module, "config", None)
    is_projected = type(encoder.module).__name__.endswith("WithProjection")
    if config is not None and is_projected:
        return "get_image_features", "pooler_output"
    return "forward", "pooler_output"


def _own_output(modality: str, method: str, output: str) -> dict[str, Any]:
    return {
        "modality_config": {modality: {"method": method, "method_output_name": output}},
        "module_output_name": "sentence_embedding",
    }


def _unfit(spec: EncoderSpec, fitting: str) -> RunError:
    return RunError(
        f"{spec.modality} encoder {spec} with pooling {spec.pooling}, layer {spec.layer}: a "
        f"sentence-transformers folder can hold {fitting} encoders; export with --to onnx"
    )
