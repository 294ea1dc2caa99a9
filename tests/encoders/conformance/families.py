"""The table of encoder families: how to build a small one, and what its model card computes.

A row's reference is written from the usage that the model cards of the family show, with the
family's library alone. To add a family, add a row.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as hf
from model_tokenizers import N_TOKENS, save_tokenizer
from PIL import Image
from torch import Tensor, nn

WIDTH = 32
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
DECODER = {**SIZES, "vocab_size": N_TOKENS, "num_key_value_heads": 2, "head_dim": 8}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXTS = (
    "a",
    "a red circle on a white ground, 3/4 view",
    "",
    " ",
    "\n\t",
    "Ünïcödé naïve café",
    "日本語のテキスト",
    "हिन्दी में एक वाक्य",
    "🙂🙃",
    "word " * 15,
    "The Quick Brown FOX",
    "x" * 75,
    "x" * 76,
    "y" * 600,
    "a <|endoftext|> b </s> [SEP] c <pad> [PAD]",
)
"""Of 1 to 600 tokens; empty ones, alphabets of several kinds, and special tokens in words."""
PICTURE_SIZES = ((900, 130), (61, 47), (300, 301))

Reference = Callable[[Path, Sequence[Any]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of encoder."""

    library: Literal["hf", "st", "timm", "open_clip"]
    modality: Literal["image", "text"]
    build: Callable[[Path], None]
    """Write a small model with random weights to an empty folder."""
    reference: Reference
    """(folder, texts or RGB pictures) -> float32 [n, dim], in one batch or one by one."""
    needs: str | None = None
    """An optional package."""


def pictures() -> list[Image.Image]:
    """Noise with a gradient: every crop, squash and interpolation shows."""
    made: list[Image.Image] = []
    generator = torch.Generator().manual_seed(0)
    for width, height in PICTURE_SIZES:
        noise = torch.rand(height, width, 3, generator=generator) * 96
        ramp = torch.linspace(0, 150, width)[None, :, None]
        made.append(Image.fromarray((noise + ramp).to(torch.uint8).numpy()))
    return made


def randomize(module: nn.Module) -> Any:
    """Draw large weights, norms and tables too: what is left out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * 0.15 + (0.6 if parameter.ndim == 1 else 0.0))
    return module.eval()


def write_json(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# Texts by transformers


def build_text(
    model: Any,
    style: str,
    max_length: int | None = None,
    files: dict[str, Any] | None = None,
    card: str = "A model.",
) -> Callable[[Path], None]:
    """Return a builder of a model and its tokenizer, with other JSON files beside them."""

    def build(folder: Path) -> None:
        randomize(model()).save_pretrained(folder)
        save_tokenizer(folder, style, max_length)
        (folder / "README.md").write_text(card)
        for name, content in (files or {}).items():
            write_json(folder, name, content)

    return build


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """As on the cards of all-MiniLM-L6-v2 and E5."""
    weights = mask.unsqueeze(-1).float()
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """As on the cards of bge and gte-modernbert."""
    return hidden[:, 0]


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """As on the card of Qwen3-Embedding."""
    if bool(mask[:, -1].all()):
        return hidden[:, -1]
    lengths = mask.sum(1) - 1
    return hidden[torch.arange(len(hidden)), lengths]


def greatest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)


def by_auto_model(
    pool: Callable[[Tensor, Tensor], Tensor],
    max_length: int,
    prefix: str = "",
    lower: bool = False,
    model_class: Any = hf.AutoModel,
) -> Reference:
    """AutoTokenizer, AutoModel and a pooling, as most cards show."""

    def reference(folder: Path, texts: Sequence[str]) -> Tensor:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        model = model_class.from_pretrained(folder).eval()
        inputs = tokenizer(
            [(prefix + text).lower() if lower else prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        return pool(hidden, inputs["attention_mask"])

    return reference


def gpt2_reference(folder: Path, texts: Sequence[str]) -> Tensor:
    """GPT-2 has no padding token, so each text runs alone; an empty one is an end of text."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModel.from_pretrained(folder).eval()
    rows: list[Tensor] = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=128)["input_ids"]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids or [tokenizer.eos_token_id]]))
        rows.append(output.last_hidden_state[0, -1])
    return torch.stack(rows)


def clip_text_reference(model_class: Any) -> Reference:
    def reference(folder: Path, texts: Sequence[str]) -> Tensor:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        model = model_class.from_pretrained(folder).eval()
        with torch.no_grad():
            hidden = model.text_model(**inputs).last_hidden_state
            ends = (inputs["input_ids"] == tokenizer.eos_token_id).int().argmax(1)
            return model.text_projection(hidden[torch.arange(len(texts)), ends])

    return reference


def end_of_text_reference(folder: Path, texts: Sequence[str]) -> Tensor:
    """As on the card of Stable Diffusion's text encoder, but pooled."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    model = hf.CLIPTextModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pooled: Tensor = model(**inputs).pooler_output
    return pooled


def siglip_text_reference(model_class: Any) -> Reference:
    """As on the cards: padded to the length of training, and without a mask."""

    def reference(folder: Path, texts: Sequence[str]) -> Tensor:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(
            list(texts),
            padding="max_length",
            max_length=64,
            truncation=True,
            return_tensors="pt",
        )
        model = model_class.from_pretrained(folder).eval()
        with torch.inference_mode():
            output = model(input_ids=inputs["input_ids"])
        pooled: Tensor = output.pooler_output
        return pooled

    return reference


def bert(positions: int = 128, **settings: Any) -> Any:
    config = hf.BertConfig(
        **SIZES,
        vocab_size=N_TOKENS,
        max_position_embeddings=positions,
        **settings,
    )
    return hf.BertModel(config)


def xlm_roberta(positions: int = 130) -> Any:
    config = hf.XLMRobertaConfig(
        **SIZES,
        vocab_size=N_TOKENS,
        max_position_embeddings=positions,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return hf.XLMRobertaModel(config)


def mpnet() -> Any:
    config = hf.MPNetConfig(
        **SIZES,
        vocab_size=N_TOKENS,
        max_position_embeddings=130,
        pad_token_id=1,
    )
    return hf.MPNetModel(config)


def distilbert() -> Any:
    config = hf.DistilBertConfig(
        dim=WIDTH,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        vocab_size=N_TOKENS,
        max_position_embeddings=128,
    )
    return hf.DistilBertModel(config)


def modernbert() -> Any:
    config = hf.ModernBertConfig(
        **SIZES,
        vocab_size=N_TOKENS,
        max_position_embeddings=8192,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    )
    return hf.ModernBertModel(config)


def deberta() -> Any:
    config = hf.DebertaV2Config(
        **SIZES,
        vocab_size=N_TOKENS,
        max_position_embeddings=128,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=0,
    )
    return hf.DebertaV2Model(config)


def t5() -> Any:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return hf.T5EncoderModel(hf.T5Config(**sizes, vocab_size=N_TOKENS))


def umt5() -> Any:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return hf.UMT5ForConditionalGeneration(hf.UMT5Config(**sizes, vocab_size=N_TOKENS))


def siglip(text_width: int = 24) -> Any:
    config = hf.SiglipConfig(
        text_config={
            **SIZES,
            "vocab_size": N_TOKENS,
            "max_position_embeddings": 64,
            "projection_size": text_width,
        },
        vision_config=VISION,
    )
    return hf.SiglipModel(config)


def siglip2_text() -> Any:
    config = hf.Siglip2TextConfig(
        **SIZES,
        vocab_size=N_TOKENS,
        max_position_embeddings=64,
        projection_size=24,
    )
    return hf.Siglip2TextModel(config)


def gpt2() -> Any:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return hf.GPT2Model(hf.GPT2Config(**sizes, vocab_size=N_TOKENS))


def clip(eos_id: int) -> Callable[[], Any]:
    def make() -> Any:
        config = hf.CLIPConfig(
            text_config={
                **SIZES,
                "vocab_size": N_TOKENS,
                "max_position_embeddings": 77,
                "eos_token_id": eos_id,
                "projection_dim": 24,
            },
            vision_config={**VISION, "projection_dim": 24},
            projection_dim=24,
        )
        return hf.CLIPModel(config)

    return make


def metaclip2() -> Any:
    config = hf.MetaClip2Config(
        text_config={
            **SIZES,
            "vocab_size": N_TOKENS,
            "max_position_embeddings": 77,
            "eos_token_id": 2,
            "projection_dim": 24,
        },
        vision_config={**VISION, "projection_dim": 24},
        projection_dim=24,
    )
    return hf.MetaClip2Model(config)


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
NORMALIZE = {
    "idx": 2,
    "name": "2",
    "path": "2_Normalize",
    "type": "sentence_transformers.models.Normalize",
}


def sentence_files(
    pooling: dict[str, Any],
    max_length: int | None = 128,
    prompts: dict[str, str] | None = None,
    default: str | None = None,
    normalize: bool = False,
    lower: bool = False,
) -> dict[str, Any]:
    """The files that sentence-transformers keeps beside a model."""
    return {
        "modules.json": [*MODULES, NORMALIZE] if normalize else MODULES,
        "1_Pooling/config.json": {"word_embedding_dimension": WIDTH, **pooling},
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": lower},
        "config_sentence_transformers.json": {
            "prompts": prompts or {},
            "default_prompt_name": default,
        },
    }


CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
LAST = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
E5_CARD = 'Each input text should start with "query: " or "passage: ".'

HF_TEXTS = {
    "bert, mean by convention": Family(
        library="hf",
        modality="text",
        build=build_text(bert, "bert", 128),
        reference=by_auto_model(masked_mean, 128),
    ),
    "bge: cls": Family(
        library="hf",
        modality="text",
        build=build_text(bert, "bert", 128, sentence_files(CLS, normalize=True)),
        reference=by_auto_model(first_token, 128),
    ),
    "minilm: mean, at most 100 tokens": Family(
        library="hf",
        modality="text",
        build=build_text(
            bert,
            "bert",
            128,
            sentence_files({"pooling_mode_mean_tokens": True}, 100),
        ),
        reference=by_auto_model(masked_mean, 100),
    ),
    "max pooling": Family(
        library="hf",
        modality="text",
        build=build_text(bert, "bert", 128, sentence_files({"pooling_mode": "max"})),
        reference=by_auto_model(greatest, 128),
    ),
    "lower case": Family(
        library="hf",
        modality="text",
        build=build_text(
            bert,
            "bert",
            128,
            sentence_files({"pooling_mode": "mean"}, lower=True),
        ),
        reference=by_auto_model(masked_mean, 128, lower=True),
    ),
    "arctic: cls and a default prompt": Family(
        library="hf",
        modality="text",
        build=build_text(
            bert,
            "bert",
            128,
            sentence_files(CLS, prompts={"q": "Find: "}, default="q"),
        ),
        reference=by_auto_model(first_token, 128, prefix="Find: "),
    ),
    "multilingual-e5: prefix, mean": Family(
        library="hf",
        modality="text",
        build=build_text(
            xlm_roberta,
            "roberta",
            128,
            sentence_files({"pooling_mode_mean_tokens": True}, normalize=True),
            card=E5_CARD,
        ),
        reference=by_auto_model(masked_mean, 128, prefix="query: "),
    ),
    "multilingual-e5-instruct: no prefix": Family(
        library="hf",
        modality="text",
        build=build_text(
            xlm_roberta,
            "roberta",
            128,
            sentence_files({"pooling_mode_mean_tokens": True}),
            card="Each query must come with a one-sentence instruction.",
        ),
        reference=by_auto_model(masked_mean, 128),
    ),
    "xlm-roberta, no limit in its tokenizer": Family(
        library="hf",
        modality="text",
        build=build_text(xlm_roberta, "roberta"),
        reference=by_auto_model(masked_mean, 128),
    ),
    "mpnet": Family(
        library="hf",
        modality="text",
        build=build_text(mpnet, "roberta", 128),
        reference=by_auto_model(masked_mean, 128),
    ),
    "distilbert": Family(
        library="hf",
        modality="text",
        build=build_text(distilbert, "bert", 128),
        reference=by_auto_model(masked_mean, 128),
    ),
    "gte-modernbert: cls, 8,192 tokens": Family(
        library="hf",
        modality="text",
        build=build_text(modernbert, "bert", 8192, sentence_files(CLS, 8192)),
        reference=by_auto_model(first_token, 8192),
    ),
    "deberta-v3": Family(
        library="hf",
        modality="text",
        build=build_text(deberta, "bert", 128),
        reference=by_auto_model(masked_mean, 128),
    ),
    "t5": Family(
        library="hf",
        modality="text",
        build=build_text(t5, "t5", 512),
        reference=by_auto_model(masked_mean, 512, model_class=hf.T5EncoderModel),
    ),
    "umt5": Family(
        library="hf",
        modality="text",
        build=build_text(umt5, "t5", 512),
        reference=by_auto_model(masked_mean, 512, model_class=hf.UMT5EncoderModel),
    ),
    "siglip": Family(
        library="hf",
        modality="text",
        build=build_text(siglip, "t5", 64),
        reference=siglip_text_reference(hf.SiglipTextModel),
    ),
    "siglip's text tower alone": Family(
        library="hf",
        modality="text",
        build=build_text(lambda: hf.SiglipTextModel(siglip().config.text_config), "t5", 64),
        reference=siglip_text_reference(hf.SiglipTextModel),
    ),
    "siglip 2's text tower alone": Family(
        library="hf",
        modality="text",
        build=build_text(siglip2_text, "t5", 64),
        reference=siglip_text_reference(hf.Siglip2TextModel),
    ),
    "qwen3-embedding: last token": Family(
        library="hf",
        modality="text",
        build=build_text(
            lambda: hf.Qwen3Model(hf.Qwen3Config(**DECODER, max_position_embeddings=1024)),
            "qwen",
            1024,
            sentence_files(LAST, None, prompts={"query": "Instruct: "}, normalize=True),
        ),
        reference=by_auto_model(last_token, 1024),
    ),
    "qwen3, by convention": Family(
        library="hf",
        modality="text",
        build=build_text(
            lambda: hf.Qwen3Model(hf.Qwen3Config(**DECODER, max_position_embeddings=1024)),
            "qwen",
            1024,
        ),
        reference=by_auto_model(last_token, 1024),
    ),
    "llama, by convention": Family(
        library="hf",
        modality="text",
        build=build_text(
            lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER, max_position_embeddings=256)),
            "llama",
        ),
        reference=by_auto_model(last_token, 256),
    ),
    "mistral, by convention": Family(
        library="hf",
        modality="text",
        build=build_text(
            lambda: hf.MistralModel(
                hf.MistralConfig(**DECODER, max_position_embeddings=1024, sliding_window=64)
            ),
            "llama",
            1024,
        ),
        reference=by_auto_model(last_token, 1024),
    ),
    "gpt2, by convention": Family(
        library="hf",
        modality="text",
        build=build_text(gpt2, "gpt2", 128),
        reference=gpt2_reference,
    ),
    "clip": Family(
        library="hf",
        modality="text",
        build=build_text(clip(257), "clip", 77),
        reference=clip_text_reference(hf.CLIPModel),
    ),
    "clip with the old end of text": Family(
        library="hf",
        modality="text",
        build=build_text(clip(2), "clip", 77),
        reference=clip_text_reference(hf.CLIPModel),
    ),
    "clip's text tower alone": Family(
        library="hf",
        modality="text",
        build=build_text(
            lambda: hf.CLIPTextModelWithProjection(clip(257)().config.text_config),
            "clip",
            77,
        ),
        reference=clip_text_reference(hf.CLIPTextModelWithProjection),
    ),
    "clip's text tower without its projection": Family(
        library="hf",
        modality="text",
        build=build_text(
            lambda: hf.CLIPTextModel(clip(257)().config.text_config),
            "clip",
            77,
        ),
        reference=end_of_text_reference,
    ),
    "metaclip 2's text tower alone": Family(
        library="hf",
        modality="text",
        build=build_text(
            lambda: hf.MetaClip2TextModelWithProjection(metaclip2().config.text_config),
            "roberta",
            77,
        ),
        reference=clip_text_reference(hf.MetaClip2TextModelWithProjection),
    ),
    "metaclip 2": Family(
        library="hf",
        modality="text",
        build=build_text(metaclip2, "roberta", 77),
        reference=clip_text_reference(hf.MetaClip2Model),
    ),
}


# Texts by sentence-transformers


def sentence_reference(folder: Path, texts: Sequence[str]) -> Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    encoded: Tensor = model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
    return encoded.clone()


def build_dense(folder: Path) -> None:
    """LaBSE and the sentence T5s end in a dense layer."""
    from safetensors.torch import save_file

    build_text(bert, "bert", 128, sentence_files(CLS))(folder)
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    write_json(folder, "modules.json", [*MODULES, dense])
    described = {
        "in_features": WIDTH,
        "out_features": 12,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    write_json(folder, "2_Dense/config.json", described)
    layer = randomize(nn.Linear(WIDTH, 12))
    tensors = {"linear.weight": layer.weight.detach(), "linear.bias": layer.bias.detach()}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")


def build_static(folder: Path) -> None:
    """As model2vec's potion: a table of word vectors, whose mean is the text's."""
    from safetensors.torch import save_file

    tokenizer = save_tokenizer(folder / "0_StaticEmbedding", "bert", None)
    inner = folder / "0_StaticEmbedding"
    for path in inner.iterdir():
        path.unlink()
    tokenizer.backend_tokenizer.save(str(inner / "tokenizer.json"))
    table = randomize(nn.Embedding(N_TOKENS, WIDTH)).weight.detach()
    save_file({"embedding.weight": table}, inner / "model.safetensors")
    module_type = "sentence_transformers.models.StaticEmbedding"
    module = {"idx": 0, "name": "0", "path": "0_StaticEmbedding", "type": module_type}
    write_json(folder, "modules.json", [module, {**NORMALIZE, "idx": 1, "path": "1_Normalize"}])


def build_sentence_clip(folder: Path) -> None:
    """As sentence-transformers/clip-ViT-B-32 keeps its files."""
    inner = folder / "0_CLIPModel"
    inner.mkdir()
    randomize(clip(257)()).save_pretrained(inner)
    save_tokenizer(inner, "clip", 77)
    hf.CLIPImageProcessor(**CROPPED).save_pretrained(inner)
    module_type = "sentence_transformers.models.CLIPModel"
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": module_type}
    write_json(folder, "modules.json", [module])


def sentence_images(folder: Path, images: Sequence[Image.Image]) -> Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    encoded: Tensor = model.encode(list(images), convert_to_tensor=True, show_progress_bar=False)
    return encoded.clone()


def sentence_family(build: Callable[[Path], None]) -> Family:
    return Family(
        library="st",
        modality="text",
        build=build,
        reference=sentence_reference,
        needs="sentence_transformers",
    )


ST_TEXTS = {
    f"st: {mode}": sentence_family(
        build_text(bert, "bert", 128, sentence_files({"pooling_mode": mode}, normalize=True))
    )
    for mode in ("cls", "mean", "max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens")
}
ST_TEXTS |= {
    "st: two poolings": sentence_family(
        build_text(bert, "bert", 128, sentence_files({"pooling_mode": ["cls", "max"]}))
    ),
    "st: last token of a decoder": sentence_family(
        build_text(
            lambda: hf.Qwen3Model(hf.Qwen3Config(**DECODER, max_position_embeddings=1024)),
            "qwen",
            1024,
            sentence_files(LAST, None, normalize=True),
        )
    ),
    "st: a prompt that is not pooled": sentence_family(
        build_text(
            t5,
            "t5",
            512,
            sentence_files(
                {"pooling_mode": "mean", "include_prompt": False},
                512,
                prompts={"q": "Represent: "},
                default="q",
            ),
        )
    ),
    "st: a prompt that is pooled": sentence_family(
        build_text(
            bert,
            "bert",
            128,
            sentence_files({"pooling_mode": "mean"}, prompts={"q": "Find: "}, default="q"),
        )
    ),
    "st: lower case": sentence_family(
        build_text(bert, "bert", 128, sentence_files({"pooling_mode": "mean"}, lower=True))
    ),
    "st: no length in its files": sentence_family(
        build_text(xlm_roberta, "roberta", 128, sentence_files({"pooling_mode": "mean"}, None))
    ),
    "st: dense": sentence_family(build_dense),
    "st: static word vectors": sentence_family(build_static),
    "st: clip, text": sentence_family(build_sentence_clip),
}


# Pictures by transformers


def build_image(model: Callable[[], Any], processor: Callable[[], Any]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        randomize(model()).save_pretrained(folder)
        processor().save_pretrained(folder)
        (folder / "README.md").write_text("A model.")

    return build


def by_processor(model_class: Any, take: Callable[[Any, Tensor], Tensor]) -> Reference:
    """AutoImageProcessor, then what `take` reads from the model's output."""

    def reference(folder: Path, images: Sequence[Image.Image]) -> Tensor:
        processor = hf.AutoImageProcessor.from_pretrained(folder)
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        model = model_class.from_pretrained(folder).eval()
        with torch.no_grad():
            return take(model, pixels)

    return reference


def take_cls(model: Any, pixels: Tensor) -> Tensor:
    hidden: Tensor = model(pixel_values=pixels).last_hidden_state
    return hidden[:, 0]


def take_mean_patch(base: str) -> Callable[[Any, Tensor], Tensor]:
    """What the classifier of a fine-tuned BEiT takes: the mean patch, then LayerNorm."""

    def take(model: Any, pixels: Tensor) -> Tensor:
        inner = getattr(model, base)
        mean = inner(pixel_values=pixels).last_hidden_state[:, 1:].mean(1)
        norm = inner.pooler.layernorm
        normed: Tensor = nn.functional.layer_norm(
            mean,
            mean.shape[1:],
            norm.weight,
            norm.bias,
            norm.eps,
        )
        torch.testing.assert_close(model.classifier(normed), model(pixel_values=pixels).logits)
        return normed

    return take


def take_pooled(model: Any, pixels: Tensor) -> Tensor:
    pooled: Tensor = model(pixel_values=pixels).pooler_output
    return pooled


def take_projected(model: Any, pixels: Tensor) -> Tensor:
    """As on the cards of CLIP."""
    projected: Tensor = model.get_image_features(pixel_values=pixels).pooler_output
    return projected


def take_mean(model: Any, pixels: Tensor) -> Tensor:
    mean: Tensor = model(pixel_values=pixels).last_hidden_state.mean(1)
    return mean


def take_classified(base: str) -> Callable[[Any, Tensor], Tensor]:
    """What the classifier takes."""

    def take(model: Any, pixels: Tensor) -> Tensor:
        pooled: Tensor = getattr(model, base)(pixel_values=pixels).pooler_output
        torch.testing.assert_close(model.classifier(pooled), model(pixel_values=pixels).logits)
        return pooled

    return take


def take_head(model: Any, pixels: Tensor) -> Tensor:
    """What the last linear layer of the classifier takes."""
    taken: list[Tensor] = []
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    hook = linear.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    model(pixel_values=pixels)
    hook.remove()
    return taken[0]


def image_family(
    model: Callable[[], Any],
    processor: Callable[[], Any],
    reference: Reference,
) -> Family:
    return Family(
        library="hf",
        modality="image",
        build=build_image(model, processor),
        reference=reference,
    )


SQUASHED = {"size": {"height": 32, "width": 32}}
CROPPED = {
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]}
WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 4,
}
HIERA = {
    "image_size": [32, 32],
    "patch_size": [7, 7],
    "patch_stride": [4, 4],
    "patch_padding": [3, 3],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, False],
    "num_query_pool": 1,
    "query_stride": [2, 2],
}
SMALL_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
SQUASHED_64 = {"size": {"height": 64, "width": 64}}
CONVOLUTIONS: dict[str, tuple[Any, Any, Any]] = {
    "resnet": (
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**SMALL_STAGES, num_labels=3)),
        lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
        hf.ResNetForImageClassification,
    ),
    "regnet": (
        lambda: hf.RegNetForImageClassification(
            hf.RegNetConfig(**SMALL_STAGES, groups_width=4, num_labels=3)
        ),
        lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
        hf.RegNetForImageClassification,
    ),
    "mobilenet v1": (
        lambda: hf.MobileNetV1ForImageClassification(
            hf.MobileNetV1Config(depth_multiplier=0.25, num_labels=3)
        ),
        lambda: hf.MobileNetV1ImageProcessor(
            size={"shortest_edge": 72},
            crop_size={"height": 64, "width": 64},
        ),
        hf.MobileNetV1ForImageClassification,
    ),
    "mobilenet v2": (
        lambda: hf.MobileNetV2ForImageClassification(
            hf.MobileNetV2Config(depth_multiplier=0.35, num_labels=3)
        ),
        lambda: hf.MobileNetV2ImageProcessor(
            size={"shortest_edge": 72},
            crop_size={"height": 64, "width": 64},
        ),
        hf.MobileNetV2ForImageClassification,
    ),
    "efficientnet": (
        lambda: hf.EfficientNetForImageClassification(
            hf.EfficientNetConfig(
                width_coefficient=0.25,
                depth_coefficient=0.3,
                hidden_dim=320,
                num_labels=3,
            )
        ),
        lambda: hf.EfficientNetImageProcessor(**SQUASHED_64),
        hf.EfficientNetForImageClassification,
    ),
}
RELATIVE = {"use_relative_position_bias": True, "num_labels": 3}
HF_IMAGES = {
    "vit": image_family(
        lambda: hf.ViTModel(hf.ViTConfig(**VISION)),
        lambda: hf.ViTImageProcessor(**SQUASHED),
        by_processor(hf.AutoModel, take_cls),
    ),
    "dinov2": image_family(
        lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION)),
        lambda: hf.BitImageProcessor(**CROPPED),
        by_processor(hf.AutoModel, take_cls),
    ),
    "beit, fine-tuned": image_family(
        lambda: hf.BeitForImageClassification(hf.BeitConfig(**VISION, **RELATIVE)),
        lambda: hf.BeitImageProcessor(**SQUASHED, do_center_crop=False),
        by_processor(hf.BeitForImageClassification, take_mean_patch("beit")),
    ),
    "beit, cls": image_family(
        lambda: hf.BeitModel(hf.BeitConfig(**VISION, use_mean_pooling=False)),
        lambda: hf.BeitImageProcessor(**SQUASHED, do_center_crop=False),
        by_processor(hf.AutoModel, take_cls),
    ),
    "data2vec, fine-tuned": image_family(
        lambda: hf.Data2VecVisionForImageClassification(
            hf.Data2VecVisionConfig(**VISION, **RELATIVE)
        ),
        lambda: hf.BeitImageProcessor(**SQUASHED, do_center_crop=False),
        by_processor(
            hf.Data2VecVisionForImageClassification,
            take_mean_patch("data2vec_vision"),
        ),
    ),
    "dinov3": image_family(
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION, num_register_tokens=4)),
        lambda: hf.ViTImageProcessor(**SQUASHED),
        by_processor(hf.AutoModel, take_cls),
    ),
    "clip, image": image_family(
        clip(257),
        lambda: hf.CLIPImageProcessor(**CROPPED),
        by_processor(hf.CLIPModel, take_projected),
    ),
    "clip's image tower alone": image_family(
        lambda: hf.CLIPVisionModelWithProjection(clip(257)().config.vision_config),
        lambda: hf.CLIPImageProcessor(**CROPPED),
        by_processor(
            hf.CLIPVisionModelWithProjection,
            lambda model, pixels: model(pixel_values=pixels).image_embeds,
        ),
    ),
    "clip's image tower without its projection": image_family(
        lambda: hf.CLIPVisionModel(clip(257)().config.vision_config),
        lambda: hf.CLIPImageProcessor(**CROPPED),
        by_processor(hf.CLIPVisionModel, take_pooled),
    ),
    "metaclip 2, image": image_family(
        metaclip2,
        lambda: hf.CLIPImageProcessor(**CROPPED),
        by_processor(hf.MetaClip2Model, take_projected),
    ),
    "aimv2": image_family(
        lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**VISION)),
        lambda: hf.CLIPImageProcessor(**CROPPED),
        by_processor(hf.Aimv2VisionModel, take_pooled),
    ),
    "aimv2 without its head": image_family(
        lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**VISION, use_head=False)),
        lambda: hf.CLIPImageProcessor(**CROPPED),
        by_processor(hf.Aimv2VisionModel, take_mean),
    ),
    "swin": image_family(
        lambda: hf.SwinForImageClassification(hf.SwinConfig(**WINDOWS, num_labels=3)),
        lambda: hf.ViTImageProcessor(**SQUASHED),
        by_processor(hf.SwinForImageClassification, take_classified("swin")),
    ),
    "swinv2": image_family(
        lambda: hf.Swinv2ForImageClassification(hf.Swinv2Config(**WINDOWS, num_labels=3)),
        lambda: hf.ViTImageProcessor(**SQUASHED),
        by_processor(hf.Swinv2ForImageClassification, take_classified("swinv2")),
    ),
    "convnext": image_family(
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**STAGES, num_labels=3)),
        lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
        by_processor(hf.ConvNextForImageClassification, take_classified("convnext")),
    ),
    "convnextv2": image_family(
        lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**STAGES, num_labels=3)),
        lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
        by_processor(hf.ConvNextV2ForImageClassification, take_classified("convnextv2")),
    ),
    "dinov3-convnext": image_family(
        lambda: hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(**STAGES)),
        lambda: hf.ViTImageProcessor(size={"height": 64, "width": 64}),
        by_processor(hf.AutoModel, take_pooled),
    ),
    **{
        f"{name}, classifier's input": image_family(make, processor, by_processor(cls, take_head))
        for name, (make, processor, cls) in CONVOLUTIONS.items()
    },
    "hiera": image_family(
        lambda: hf.HieraForImageClassification(hf.HieraConfig(**HIERA, num_labels=3)),
        lambda: hf.BitImageProcessor(**CROPPED),
        by_processor(hf.HieraForImageClassification, take_classified("hiera")),
    ),
    "siglip, image": image_family(
        siglip,
        lambda: hf.SiglipImageProcessor(**SQUASHED),
        by_processor(hf.SiglipVisionModel, take_pooled),
    ),
    "siglip's image tower alone": image_family(
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)),
        lambda: hf.SiglipImageProcessor(**SQUASHED),
        by_processor(
            hf.SiglipVisionModel,
            lambda model, pixels: model(pixel_values=pixels).pooler_output,
        ),
    ),
}


# Pictures by timm


def build_timm(
    name: str = "test_vit",
    preprocessing: dict[str, Any] | None = None,
    **model_args: Any,
) -> Callable[[Path], None]:
    """Return a builder of a timm model at 32 pixels.

    Args:
        preprocessing: what differs in its configuration of the data.
    """

    def build(folder: Path) -> None:
        import timm
        from timm.models import save_for_hf

        arguments = {"img_size": 32, **model_args}
        arguments = {key: value for key, value in arguments.items() if value is not None}
        model = randomize(timm.create_model(name, pretrained=False, num_classes=3, **arguments))
        model.pretrained_cfg = {
            **model.pretrained_cfg,
            "input_size": (3, 32, 32),
            "crop_pct": 0.9,
            "num_classes": 3,
            "fixed_input_size": True,
            **(preprocessing or {}),
        }
        save_for_hf(model, folder, model_args=arguments, safe_serialization="both")
        (folder / "README.md").write_text("A model.")

    return build


def timm_reference(folder: Path, images: Sequence[Image.Image]) -> Tensor:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        features: Tensor = model(torch.stack([transform(image) for image in images]))
    return features


SMALL_TIMM = {"embed_dim": WIDTH, "num_heads": 4, "depth": 2, "patch_size": 8}
SQUASHED_TIMM = {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"}
BORDERED_TIMM = {"crop_mode": "border", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def timm_family(
    name: str,
    preprocessing: dict[str, Any] | None = None,
    **model_args: Any,
) -> Family:
    return Family(
        library="timm",
        modality="image",
        build=build_timm(name, preprocessing, **model_args),
        reference=timm_reference,
    )


TIMM_IMAGES = {
    "timm": timm_family("test_vit"),
    "timm: siglip": timm_family("vit_base_patch16_siglip_224", SQUASHED_TIMM, **SMALL_TIMM),
    "timm: eva02": timm_family("eva02_tiny_patch14_224", **SMALL_TIMM),
    "timm: dinov3": timm_family("vit_small_patch16_dinov3", **SMALL_TIMM),
    "timm: pe": timm_family("vit_pe_core_tiny_patch16_384", SQUASHED_TIMM, **SMALL_TIMM),
    "timm: beit": timm_family("beit_base_patch16_224", BORDERED_TIMM, **SMALL_TIMM),
    "timm: resnet": timm_family("test_resnet", {"interpolation": "bilinear"}, img_size=None),
    "timm: convnext": timm_family("test_convnext", {"crop_pct": 0.75}, img_size=None),
    "timm: swin": timm_family(
        "swin_tiny_patch4_window7_224",
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
        window_size=4,
    ),
    "timm: mobilenet": timm_family("mobilenetv3_small_050", {"crop_pct": 0.875}, img_size=None),
    "timm: efficientnet": timm_family("test_efficientnet", img_size=None),
    "timm: cait": timm_family("cait_xxs24_224", **SMALL_TIMM),
    "timm: xcit": timm_family("xcit_nano_12_p8_224", **SMALL_TIMM),
    "timm: hiera": timm_family("hiera_tiny_224", embed_dim=16, stages=(1, 1, 1, 1)),
}


# Both sides by open_clip

CLIP_VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8}
CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
COCA_TEXT = {**CLIP_TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True}
COCA = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": {
        **CLIP_VISION,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "text_cfg": COCA_TEXT,
    "multimodal_cfg": {**CLIP_TEXT, "context_length": 76, "attn_pooler_heads": 4},
}


def build_open_clip(
    model_config: dict[str, Any],
    tower: str | None = None,
) -> Callable[[Path], None]:
    """Return a builder; `tower` is the style of a text tower of transformers."""

    def build(folder: Path) -> None:
        from open_clip import CLIP, CoCa, CustomTextCLIP
        from safetensors.torch import save_file

        config = json.loads(json.dumps(model_config))
        is_custom = config.pop("custom_text", False)
        if tower is not None:
            inner = folder / "tower"
            {"bert": bert, "roberta": xlm_roberta}[tower]().save_pretrained(inner)
            (inner / "model.safetensors").unlink()
            save_tokenizer(folder, tower, None)
            config["text_cfg"] |= {
                "hf_model_name": str(inner),
                "hf_tokenizer_name": "nobody/nothing",
                "hf_model_pretrained": False,
            }
        custom = CoCa if "multimodal_cfg" in config else CustomTextCLIP
        model = randomize((custom if is_custom else CLIP)(**config))
        state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        preprocess = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.25] * 3}
        described = {
            "model_cfg": {**config, **({"custom_text": True} if is_custom else {})},
            "preprocess_cfg": {
                **preprocess,
                "interpolation": "bicubic",
                "resize_mode": "shortest",
            },
        }
        write_json(folder, "open_clip_config.json", described)
        (folder / "README.md").write_text("A model.")

    return build


def open_clip_text(folder: Path, texts: Sequence[str]) -> Tensor:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        features: Tensor = model.encode_text(tokenizer(list(texts)), normalize=False)
    return features


def open_clip_image(folder: Path, images: Sequence[Image.Image]) -> Tensor:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = torch.stack([transform(image) for image in images])
    with torch.no_grad():
        features: Tensor = model.eval().encode_image(pixels, normalize=False)
    return features


def open_clip_family(
    modality: Literal["image", "text"],
    config: dict[str, Any],
    tower: str | None = None,
) -> Family:
    return Family(
        library="open_clip",
        modality=modality,
        build=build_open_clip(config, tower),
        reference=open_clip_image if modality == "image" else open_clip_text,
        needs="open_clip",
    )


CLIP_CONFIG = {"embed_dim": 24, "vision_cfg": CLIP_VISION, "text_cfg": CLIP_TEXT}
TOWER_TEXT = {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
TOWER_CONFIG = {**CLIP_CONFIG, "custom_text": True, "text_cfg": TOWER_TEXT}
SIGLIP_TEXT = {
    **CLIP_TEXT,
    "context_length": 64,
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
}
OPEN_CLIP = {
    "open_clip: clip, text": open_clip_family("text", CLIP_CONFIG),
    "open_clip: clip, image": open_clip_family("image", CLIP_CONFIG),
    "open_clip: siglip, text": open_clip_family(
        "text",
        {**CLIP_CONFIG, "custom_text": True, "text_cfg": SIGLIP_TEXT},
    ),
    "open_clip: xlm-roberta, text": open_clip_family("text", TOWER_CONFIG, "roberta"),
    "open_clip: bert, text": open_clip_family(
        "text",
        {**TOWER_CONFIG, "text_cfg": {**TOWER_TEXT, "hf_pooler_type": "cls_pooler"}},
        "bert",
    ),
    "open_clip: coca, text": open_clip_family("text", COCA),
    "open_clip: coca, image": open_clip_family("image", COCA),
}

ST_IMAGES = {
    "st: clip, image": Family(
        library="st",
        modality="image",
        build=build_sentence_clip,
        reference=sentence_images,
        needs="sentence_transformers",
    )
}

FAMILIES: dict[str, Family] = {
    **HF_TEXTS,
    **ST_TEXTS,
    **ST_IMAGES,
    **HF_IMAGES,
    **TIMM_IMAGES,
    **OPEN_CLIP,
}
