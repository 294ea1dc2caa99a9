"""Load either tower of an open_clip model: its projected embedding.

Preprocessing and tokenizer are the model's own.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apecache.encoders.encoder import (
    FeatureTap,
    ImageEncoder,
    State,
    States,
    TextEncoder,
    Tokens,
    build_fingerprint,
    digest_module,
    freeze,
)
from apecache.encoders.preprocess import TensorPreprocess, image_preprocess, probe
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError, MissingExtraError, nearest
from apecache.fingerprint import Json, content_hash


def load_open_clip_image(specs: Sequence[EncoderSpec], device: torch.device) -> list[ImageEncoder]:
    """Load the image tower: its embedding before normalization, [n, embed_dim].

    There are no other cuts.

    Raises:
        EncoderError: no such model or weights, or a cut other than the model's own output.
        MissingExtraError: open_clip is not installed.
    """
    (spec,) = _only_own(specs)
    model = _create(spec)
    config: dict[str, Any] = dict(model.visual.preprocess_cfg)
    if spec.resolution:
        config["size"] = spec.resolution
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
    preprocess, backend = image_preprocess(
        spec,
        reference=transform,
        backend="open-clip-pil",
        faster=_tensor_form(config),
    )
    inputs: Json = {
        **backend,
        "config": {key: _plain(value) for key, value in sorted(config.items())},
    }
    fingerprint = build_fingerprint(
        spec,
        weights=digest_module(model.visual),
        architecture=_architecture(model, spec),
        inputs=inputs,
    )
    visual: Any = freeze(model.visual, spec, device)
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    tap = FeatureTap(states=_states(visual), state="own", pool=lambda state, _: state)
    input_shape = (3, height, width)
    row_shape = probe(tap, shape=input_shape, spec=spec, device=device)
    encoder = ImageEncoder(
        spec=spec,
        module=visual,
        preprocess=preprocess,
        forward=tap,
        input_shape=input_shape,
        row_shape=row_shape,
        fingerprint=fingerprint,
        device=device,
    )
    return [encoder]


def load_open_clip_text(specs: Sequence[EncoderSpec], device: torch.device) -> list[TextEncoder]:
    """Load the text tower: its embedding before normalization, [n, embed_dim].

    There are no other cuts. Raises as `load_open_clip_image` does.
    """
    (spec,) = _only_own(specs)
    model = _create(spec)
    tokenizer = _tokenizer(spec)
    context = int(model.context_length)
    if spec.max_tokens and spec.max_tokens != context:
        raise EncoderError(
            f"encoder {spec}: its context is {context} tokens; leave --max-tokens off"
        )
    tower = model.text
    # A causal tower that pools at the end-of-text token never sees the padding after it, so its
    # batches are padded to their longest caption only. Any other tower gets the whole context.
    pools_at_end = getattr(tower, "pool_type", "") in ("argmax", "eos")
    trimmed = pools_at_end and getattr(tower, "attn_mask", None) is not None
    prefix = spec.prefix or ""
    inputs: Json = {"tokenizer": _digest(tokenizer), "max_tokens": context, "pooling": "default"}
    inputs |= {"prefix": prefix} if prefix else {}
    fingerprint = build_fingerprint(
        spec,
        weights=digest_module(tower),
        architecture=_architecture(model, spec),
        inputs=inputs,
    )
    frozen: Any = freeze(tower, spec, device)

    def tokenize(texts: Sequence[str]) -> Tokens:
        prefixed = [prefix + text for text in texts]
        return _tokenize(tokenizer, texts=prefixed, context=context, trimmed=trimmed)

    states = _trimmed_states(frozen) if trimmed else _states(frozen)
    tap = FeatureTap(states=states, state="own", pool=lambda state, _: state)
    length = None if trimmed else context
    with torch.inference_mode():
        probe_ids = torch.zeros(1, context, dtype=torch.long, device=device)
        dim = int(frozen(probe_ids).shape[1])
    encoder = TextEncoder(
        spec=spec,
        module=frozen,
        tokenize=tokenize,
        forward=tap,
        pad_id=0,
        max_tokens=context,
        row_shape=(dim,),
        fingerprint=fingerprint,
        device=device,
        length=length,
    )
    return [encoder]


def _only_own(specs: Sequence[EncoderSpec]) -> Sequence[EncoderSpec]:
    """Return the specs unchanged; refuse a cut other than the model's own output."""
    for spec in specs:
        if spec.pooling != "default" or spec.layer is not None:
            raise EncoderError(
                f"encoder {spec}: of open_clip models only the output can be taken; leave the "
                "cut off"
            )
    return specs


def _create(spec: EncoderSpec) -> Any:
    """Load the whole model in evaluation mode."""
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError("open_clip", "open-clip") from None
    name, _, tag = spec.name.partition("/")
    if spec.folder:
        source: dict[str, Any] = {"model_name": f"local-dir:{spec.folder}"}
    elif spec.name.startswith("hf-hub:"):
        source = {"model_name": spec.name}
    else:
        _require_known(spec, name=name, tag=tag, open_clip=open_clip)
        source = {"model_name": name, "pretrained": tag}
    try:
        # As a separate tower the text side takes batches shorter than its context.
        model = open_clip.create_model(
            **source,
            require_pretrained=True,
            force_custom_text=True,
            force_image_size=spec.resolution,
        )
    except Exception as error:  # open_clip raises what its hub client, torch and json raise
        reason = " ".join(str(error).split())[:200]
        raise EncoderError(
            f"encoder {spec} cannot be opened ({reason}); or give open_clip:/folder"
        ) from error
    return model.eval()


def _require_known(spec: EncoderSpec, name: str, tag: str, open_clip: Any) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        suggestion = nearest(name, open_clip.list_models())
        raise EncoderError(
            f"encoder {spec}: open_clip has no pretrained model {name!r}{suggestion}"
        )
    if tag not in tags:
        raise EncoderError(
            f"encoder {spec}: give NAME/TAG; the tags of {name} are {', '.join(tags)}"
        )


def _tokenizer(spec: EncoderSpec) -> Any:
    import open_clip

    if spec.folder:
        return open_clip.get_tokenizer(f"local-dir:{spec.folder}")
    if spec.name.startswith("hf-hub:"):
        return open_clip.get_tokenizer(spec.name)
    model_name = spec.name.partition("/")[0]
    return open_clip.get_tokenizer(model_name)


def _states(tower: Any) -> States:
    def states(inputs: tuple[Tensor, ...], _: Collection[State]) -> dict[State, Tensor]:
        return {"own": tower(inputs[0])}

    return states


def _trimmed_states(tower: Any) -> States:
    """Return the forward pass of a tower for texts shorter than its context."""
    mask = tower.attn_mask

    def states(inputs: tuple[Tensor, ...], _: Collection[State]) -> dict[State, Tensor]:
        ids = inputs[0]
        length = ids.shape[1]
        # open_clip cuts the positions to the text's length, but not the causal mask.
        buffers = {"attn_mask": mask[:length, :length]}
        return {"own": torch.func.functional_call(tower, buffers, (ids,))}

    return states


def _tokenize(tokenizer: Any, texts: Sequence[str], context: int, trimmed: bool) -> Tokens:
    """Return the ids of each text, without padding if `trimmed`, and count the truncated texts."""
    if not texts:
        return Tokens(ids=[], n_truncated=0)
    ids = tokenizer(list(texts), context_length=context)
    last_ids = ids[:, -1].tolist()
    full_texts = [text for text, last_id in zip(texts, last_ids, strict=True) if last_id]
    n_truncated = 0
    if full_texts:
        # A full row may just fit. With room for one more token only truncated texts fill it.
        longer = tokenizer(full_texts, context_length=context + 1)
        n_truncated = int((longer[:, -1] != 0).sum())
    rows: list[list[int]] = []
    for row in ids:
        # The end-of-text token has the highest id.
        n_tokens = int(row.argmax()) + 1 if trimmed else len(row)
        rows.append(row[:n_tokens].tolist())
    return Tokens(ids=rows, n_truncated=n_truncated)


def _digest(tokenizer: Any) -> str:
    """Hash the tokenizer: its vocabulary or tokenizer.json, and how text is cleaned."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        content = inner.backend_tokenizer.to_str()
    else:
        content = json.dumps(sorted(tokenizer.encoder.items()))
    clean_function = getattr(tokenizer, "clean_fn", None)
    clean_name = getattr(clean_function, "__name__", "")
    return content_hash(f"{type(tokenizer).__name__}\0{clean_name}\0{content}")


def _architecture(model: Any, spec: EncoderSpec) -> Json:
    """Return the class and what the weights do not show: the model's configuration, if known."""
    if spec.folder:
        config_path = Path(spec.folder) / "open_clip_config.json"
        described: Json = json.loads(config_path.read_text())["model_cfg"]
    else:
        import open_clip

        described = open_clip.get_model_config(spec.name.partition("/")[0]) or {"name": spec.name}
    return {"class": type(model).__name__, "config": described}


def _tensor_form(config: dict[str, Any]) -> TensorPreprocess | None:
    """Return the preprocessing on tensors; None unless it is a square crop of the short side."""
    size = config["size"]
    if isinstance(size, int):
        side = size
    elif size[0] == size[1]:
        side = size[0]
    else:
        side = None
    if side is None or config.get("resize_mode", "shortest") != "shortest":
        return None
    return TensorPreprocess(
        edge=side,
        crop=(side, side),
        interpolation=config.get("interpolation", "bicubic"),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _plain(value: Any) -> Json:
    return list(value) if isinstance(value, tuple) else value
