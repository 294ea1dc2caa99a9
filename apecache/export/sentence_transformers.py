"""Export the text side of a run as a sentence-transformers folder.

Its modules are encoder, pooling, the head as one Dense layer, and normalization.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apecache.encoders.encoder import TextEncoder
from apecache.encoders.from_transformers import text_prefix
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.load import load_text_encoder
from apecache.encoders.snapshot import resolve_folder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.encoders.weight_files import TRANSFORMERS_WEIGHTS
from apecache.errors import MissingExtraError, RunError
from apecache.heads.fold import fold_linear
from apecache.heads.head import Head
from apecache.heads.pooled import PooledHead
from apecache.runs.heads import TrainedHeads
from apecache.storage.replace import apply_umask

POOLINGS = ("default", "mean", "cls", "max", "last")
LIBRARY_POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "last": "lasttoken"}
"""Poolings that sentence-transformers has under the same names; `default` resolves to one of
them."""


def export_sentence_transformers(
    heads: TrainedHeads,
    out: Path,
    text: EncoderSpec | None = None,
) -> list[str]:
    """Write a folder whose `SentenceTransformer(folder).encode` gives the run's text embeddings.

    Heads of kind `linear` and `identity` can be one Dense layer, including the standardization;
    others cannot. Encoders can be `st:`, and `hf:` with mean, CLS or max pooling of the model's
    output.

    Args:
        heads: the run.
        out: the folder.
        text: the text encoder, if it has moved.

    Returns:
        The names of the files and folders in `out`.

    Raises:
        RunError: another kind of head or encoder.
        EncoderError: the encoder cannot be loaded.
        MismatchError: it is not the one that the head was trained on.
        MissingExtraError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize
    except ImportError:
        raise MissingExtraError("sentence_transformers", "sentence-transformers") from None
    head = _require_affine(heads.text.head)
    spec = text or spec_from_json(heads.text.encoder)
    _require_cut(spec)
    encoder = load_text_encoder(spec, "cpu")
    heads.text.require_encoder(encoder.fingerprint, f"text encoder {encoder.spec}")
    loaded: LibraryModel = encoder.module
    modules = list(loaded) if spec.library == "st" else _transformer(encoder)
    prompts = _prompts(spec, loaded)
    model = SentenceTransformer(
        modules=[*modules, _dense(head), Normalize()],
        device="cpu",
        **prompts,
    )
    if spec.library == "st":
        model.max_seq_length = encoder.max_tokens
    model.save(str(out), create_model_card=False)
    # Some of its writers make files that only the owner can read.
    apply_umask(out)
    return sorted(path.name for path in out.iterdir())


def _require_affine(head: Head) -> PooledHead:
    """Return the head if it can be one Dense layer."""
    if not isinstance(head, PooledHead) or head.spec.kind not in ("linear", "identity"):
        raise RunError(
            f"the text head is of kind {head.spec.kind}; a sentence-transformers folder can hold "
            "linear and identity "
            "heads: export others with --onnx or --safetensors"
        )
    return head


def _require_cut(spec: EncoderSpec) -> None:
    """Refuse an encoder, layer or pooling that sentence-transformers cannot express."""
    if spec.library == "st":
        return
    if spec.library != "hf" or spec.layer is not None or spec.pooling not in POOLINGS:
        raise RunError(
            f"text encoder {spec} with pooling {spec.pooling}, layer {spec.layer}: a "
            "sentence-transformers folder can "
            "hold st: encoders, and hf: encoders with mean, cls, max or last pooling of their "
            "output; "
            "export with --onnx"
        )


def _transformer(encoder: TextEncoder) -> list[nn.Module]:
    """Return the encoder and its pooling as modules of sentence-transformers."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    spec = encoder.spec
    # The pooling `default` is resolved by the encoder, and only its fingerprint has the result.
    described = encoder.fingerprint.fields["inputs"]
    pooling = LIBRARY_POOLINGS.get(described["pooling"])
    if pooling is None:
        raise RunError(
            f"text encoder {spec}: a sentence-transformers folder cannot hold its own pooling; "
            "export with --onnx"
        )
    # Where nothing is said, the library asks whether it may run a repository's code.
    options = {"trust_remote_code": False}
    inner: Any = Transformer(
        str(resolve_folder(spec, TRANSFORMERS_WEIGHTS)),
        max_seq_length=encoder.max_tokens,
        do_lower_case=bool(described.get("lower_case")),
        model_kwargs=dict(options),
        processor_kwargs=dict(options),
        config_kwargs=dict(options),
    )
    return [inner, Pooling(encoder.dim, pooling)]


def _prompts(spec: EncoderSpec, module: LibraryModel) -> dict[str, Any]:
    """Return the prefix of every text as a default prompt; empty without one."""
    prefix = text_prefix(spec) if spec.library == "hf" else spec.prefix
    if prefix is None:
        prefix = module.prompts.get(module.default_prompt_name) or ""
    if not prefix:
        return {}
    return {"prompts": {"apecache": prefix}, "default_prompt_name": "apecache"}


@torch.no_grad()
def _dense(head: PooledHead) -> nn.Module:
    """Return W ((x - mean) / deviation) + b as one layer, computed in double precision."""
    from sentence_transformers.sentence_transformer.modules import Dense

    weight, bias = _affine(head)
    dense: Any = Dense(head.in_dim, head.out_dim, activation_function=nn.Identity())
    dense.linear.weight.copy_(weight)
    dense.linear.bias.copy_(bias)
    return dense  # type: ignore[no-any-return]


def _affine(head: PooledHead) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear or identity head, with its standardization folded in."""
    if isinstance(head.body, nn.Linear):
        return fold_linear(head.body, head.mean, head.deviation)
    identity = nn.Linear(head.in_dim, head.in_dim, bias=False)
    identity.weight.copy_(torch.eye(head.in_dim))
    return fold_linear(identity, head.mean, head.deviation)
