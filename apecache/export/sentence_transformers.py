"""The text side of a run as a sentence-transformers folder: encoder, pooling, the head as one Dense
layer, norm."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apecache.encoders.encoder import TextEncoder
from apecache.encoders.from_transformers import text_prefix
from apecache.encoders.load import load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import MissingExtraError, RunError
from apecache.heads.fold import fold_linear
from apecache.heads.head import Head
from apecache.heads.pooled import PooledHead
from apecache.runs.heads import TrainedHeads
from apecache.storage.atomic import apply_umask

POOLINGS = ("default", "mean", "cls", "max")
"""Those that sentence-transformers has under the same names; `default` is one of them."""


def export_sentence_transformers(
    heads: TrainedHeads,
    out: Path,
    text: EncoderSpec | None = None,
) -> list[str]:
    """A folder whose `SentenceTransformer(folder).encode` gives the run's text embeddings. Returns
    the names in it.

    Heads of kind `linear` and `identity` can be one Dense layer (standardisation included); others
    cannot. Encoders: `hf:` with mean, CLS or max pooling of the model's output, and `st:`. `text`:
    the encoder's new place, if it moved.

    Raises:
        RunError: another kind of head or encoder. EncoderError: the encoder cannot be had.
            MismatchError: it is not
        the one that the head was trained on. MissingExtraError: sentence-transformers is not
            installed.
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
    loaded: Any = encoder.module
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
    apply_umask(out)
    return sorted(path.name for path in out.iterdir())


def _require_affine(head: Head) -> PooledHead:
    if not isinstance(head, PooledHead) or head.spec.kind not in ("linear", "identity"):
        raise RunError(
            f"the text head is of kind {head.spec.kind}; a sentence-transformers folder can hold "
            "linear and identity "
            "heads: export others with --onnx or --safetensors"
        )
    return head


def _require_cut(spec: EncoderSpec) -> None:
    if spec.library == "st":
        return
    if spec.library != "hf" or spec.layer is not None or spec.pooling not in POOLINGS:
        raise RunError(
            f"text encoder {spec} with pooling {spec.pooling}, layer {spec.layer}: a "
            "sentence-transformers folder can "
            "hold st: encoders, and hf: encoders with mean, cls or max pooling of their output; "
            "export with --onnx"
        )


def _transformer(encoder: TextEncoder) -> list[nn.Module]:
    """Pooling as the encoder resolved it, which its fingerprint says."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    spec = encoder.spec
    described = encoder.fingerprint.fields["inputs"]
    revision = {"revision": spec.revision} if spec.revision else {}
    inner: Any = Transformer(
        str(spec.folder or spec.name),
        max_seq_length=encoder.max_tokens,
        model_kwargs=dict(revision),
        processor_kwargs=dict(revision),
        config_kwargs=dict(revision),
    )
    return [inner, Pooling(encoder.dim, described["pooling"])]


def _prompts(spec: EncoderSpec, module: Any) -> dict[str, Any]:
    """What is put before every text, as a default prompt."""
    prefix = text_prefix(spec) if spec.library == "hf" else spec.prefix
    if prefix is None:
        prefix = module.prompts.get(module.default_prompt_name) or ""
    return {"prompts": {"apecache": prefix}, "default_prompt_name": "apecache"} if prefix else {}


@torch.no_grad()
def _dense(head: PooledHead) -> nn.Module:
    """W ((x - mean) / deviation) + b, worked out in double precision."""
    from sentence_transformers.sentence_transformer.modules import Dense

    weight, bias = _affine(head)
    made: Any = Dense(head.in_dim, head.out_dim, activation_function=nn.Identity())
    made.linear.weight.copy_(weight)
    made.linear.bias.copy_(bias)
    return made  # type: ignore[no-any-return]


def _affine(head: PooledHead) -> tuple[Tensor, Tensor]:
    if isinstance(head.body, nn.Linear):
        return fold_linear(head.body, head.mean, head.deviation)
    plain = nn.Linear(head.in_dim, head.in_dim, bias=False)
    plain.weight.copy_(torch.eye(head.in_dim))
    return fold_linear(plain, head.mean, head.deviation)
