"""Small encoders of every library, with random weights in the libraries' own file formats, and runs
on them: for benchmarks and tests that need many pairs of encoders and no data."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.heads.build import build_head
from apecache.heads.head import Head, HeadSpec
from apecache.runs.heads import TrainedHeads, TrainedSide, save_heads

DIM = 16
"""Width of the embeddings of all runs."""
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
HEADS = {
    "linear": HeadSpec(kind="linear", dim=DIM),
    "mlp": HeadSpec(kind="mlp", dim=DIM, depth=2, width=24, residual=False),
    "gated": HeadSpec(kind="gated", dim=DIM),
    "transformer on tokens": HeadSpec(kind="transformer", dim=DIM, depth=1, n_heads=2),
}
"""The kinds of heads that formats treat differently."""
PAIRS = {
    "timm + hf BERT": ("timm", "bert"),
    "hf DINOv2 + hf CLIP": ("dinov2", "clip"),
    "hf CLIP + st": ("clip", "st"),
    "open_clip + open_clip": ("open_clip", "open_clip"),
}
"""(image, text) encoders, by keys of `IMAGE_BUILDERS` and `TEXT_BUILDERS`."""


def build_timm(folder: Path) -> EncoderSpec:
    """A ViT of timm, 32 px, whose configuration crops nothing."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=3)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": 3,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
    }
    description = {
        "architecture": "test_vit",
        "num_classes": 3,
        "model_args": {"img_size": 32},
        "pretrained_cfg": config,
    }
    (folder / "config.json").write_text(json.dumps(description))
    return parse_encoder(f"timm:{folder}", "image")


def build_bert(folder: Path) -> EncoderSpec:
    """BERT of transformers, mean pooling, at most 24 tokens."""
    from transformers import BertConfig, BertModel

    n_tokens = _save_tokenizer(folder, max_length=24, names=("[CLS]", "[SEP]"))
    config = BertConfig(vocab_size=n_tokens, max_position_embeddings=24, **SIZES)
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return parse_encoder(f"hf:{folder}", "text")


def build_sentences(folder: Path) -> EncoderSpec:
    """A folder of sentence-transformers: BERT, CLS pooling, normalization, a prompt."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    inner = folder / "bert"
    inner.mkdir()
    build_bert(inner)
    transformer: Any = Transformer(str(inner))
    modules = [transformer, Pooling(SIZES["hidden_size"], "cls"), Normalize()]
    model = SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts={"query": "find: "},
        default_prompt_name="query",
    )
    model.save(str(folder / "st"), create_model_card=False)
    return parse_encoder(f"st:{folder / 'st'}", "text")


def build_dinov2(folder: Path) -> EncoderSpec:
    """DINOv2 of transformers, CLS token."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 32},
    ).save_pretrained(folder)
    return parse_encoder(f"hf:{folder}", "image")


def build_clip_image(folder: Path) -> EncoderSpec:
    """The image tower of CLIP of transformers, projected."""
    _build_clip(folder)
    return parse_encoder(f"hf:{folder}", "image")


def build_clip_text(folder: Path) -> EncoderSpec:
    """The text tower of CLIP of transformers, projected."""
    _build_clip(folder)
    return parse_encoder(f"hf:{folder}", "text")


def build_open_clip_image(folder: Path) -> EncoderSpec:
    """The image tower of open_clip."""
    _build_open_clip(folder)
    return parse_encoder(f"open_clip:{folder}", "image")


def build_open_clip_text(folder: Path) -> EncoderSpec:
    """The text tower of open_clip, with its own tokenizer."""
    _build_open_clip(folder)
    return parse_encoder(f"open_clip:{folder}", "text")


IMAGE_BUILDERS: dict[str, Callable[[Path], EncoderSpec]] = {
    "timm": build_timm,
    "dinov2": build_dinov2,
    "clip": build_clip_image,
    "open_clip": build_open_clip_image,
}
TEXT_BUILDERS: dict[str, Callable[[Path], EncoderSpec]] = {
    "bert": build_bert,
    "st": build_sentences,
    "clip": build_clip_text,
    "open_clip": build_open_clip_text,
}


def build_run(folder: Path, pair: str, head: str) -> Path:
    """Write small encoders and a run of heads with random weights on them.

    Args:
        folder: an empty folder for all of it.
        pair: a key of `PAIRS`.
        head: a key of `HEADS`, for both sides.

    Returns:
        The folder of the run.

    Raises:
        EncoderError: an encoder has no tokens, which the head needs.
    """
    image_name, text_name = PAIRS[pair]
    image = IMAGE_BUILDERS[image_name](_new(folder / "image"))
    text = TEXT_BUILDERS[text_name](_new(folder / "text"))
    return save_run(folder / "run", image=image, text=text, head=HEADS[head])


def save_run(out: Path, image: EncoderSpec, text: EncoderSpec, head: HeadSpec) -> Path:
    """Write a run of heads with random weights on two encoders."""
    from dataclasses import replace

    if head.cut == "tokens":
        image = replace(image, pooling="tokens")
        text = replace(text, pooling="tokens")
    image_encoder = load_image_encoder(image, "cpu")
    text_encoder = load_text_encoder(text, "cpu")
    heads = TrainedHeads(
        image=TrainedSide(
            head=random_head(head, image_encoder.dim),
            encoder=asdict(image),
            fingerprint=image_encoder.fingerprint,
        ),
        text=TrainedSide(
            head=random_head(head, text_encoder.dim),
            encoder=asdict(text),
            fingerprint=text_encoder.fingerprint,
        ),
        scale=20.0,
        training={},
    )
    save_heads(heads, out)
    return out


def random_head(spec: HeadSpec, in_dim: int) -> Head:
    """Build a head whose statistics are not those of a new one."""
    torch.manual_seed(1)
    head = build_head(spec, in_dim, spec.dim or in_dim).eval().requires_grad_(False)
    head.mean.normal_().mul_(0.1)
    head.deviation.uniform_(0.5, 2)
    return head


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _save_tokenizer(folder: Path, max_length: int, names: tuple[str, str]) -> int:
    """Write a tokenizer of bytes, and return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    begin, end = names
    specials = ["[PAD]", "[UNK]", begin, end]
    # The end of a text has the highest id, as in CLIP's vocabulary.
    ordered = [*specials[:3], *sorted(pre_tokenizers.ByteLevel.alphabet()), end]
    ids = {token: number for number, token in enumerate(ordered)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        special_tokens=[(begin, ids[begin]), (end, ids[end])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token=begin,
        sep_token=end,
        bos_token=begin,
        eos_token=end,
    ).save_pretrained(folder)
    return len(ids)


def _build_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    n_tokens = _save_tokenizer(folder, max_length=24, names=("<s>", "</s>"))
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **SIZES,
            "vocab_size": n_tokens,
            "max_position_embeddings": 24,
            "eos_token_id": n_tokens - 1,
            "bos_token_id": 2,
            "pad_token_id": 0,
            "projection_dim": 24,
        },
        vision_config={**VISION, "projection_dim": 24},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
    ).save_pretrained(folder)


def _build_open_clip(folder: Path) -> None:
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    model_config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 16,
            "patch_size": 8,
            "head_width": 8,
        },
        "text_cfg": {
            "context_length": 24,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 2,
        },
    }
    preprocess = {
        "size": [32, 32],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    description = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    torch.manual_seed(0)
    model: Any = CLIP(**model_config)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
