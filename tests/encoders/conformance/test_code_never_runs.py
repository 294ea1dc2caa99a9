"""Python code and pickles in an encoder's folder never run, whatever standard input answers."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VISION, bert, build_image, build_text, sentence_files, write_json
from transformers import BitImageProcessor, ViTConfig, ViTModel

from apecache.encoders.load import (
    load_image_encoder,
    load_preprocess,
    load_text_encoder,
    shape_tower,
)
from apecache.encoders.spec import parse_encoder
from apecache.errors import EncoderError

CODE = """
from pathlib import Path
from transformers import (
    BertConfig, BertModel, BertTokenizerFast, BitImageProcessor, PreTrainedTokenizerFast
)

Path({trace!r}).write_text(__name__)


class OwnConfig(BertConfig):
    model_type = "own"


class OwnModel(BertModel):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass


class OwnProcessor(BitImageProcessor):
    pass
"""


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "unpickled")


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


AUTO_MODEL = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
}


def own_model(folder: Path) -> None:
    """An architecture that only the folder's code knows."""
    edit(folder / "config.json", model_type="own", auto_map=AUTO_MODEL)


def known_model(folder: Path) -> None:
    """An architecture that the library knows too."""
    edit(folder / "config.json", auto_map=AUTO_MODEL)


def own_tokenizer(folder: Path) -> None:
    auto_map = {"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)


def own_processor(folder: Path) -> None:
    auto_map = {"AutoImageProcessor": "modeling_own.OwnProcessor"}
    edit(
        folder / "preprocessor_config.json",
        image_processor_type="OwnProcessor",
        auto_map=auto_map,
    )


def own_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "modeling_own.OwnModel"
    write_json(folder, "modules.json", modules)


def trusting_module(folder: Path) -> None:
    own_model(folder)
    trust = {"trust_remote_code": True}
    edit(
        folder / "sentence_bert_config.json",
        model_args=trust,
        config_args=trust,
        tokenizer_args=trust,
    )


def pickled(name: str) -> Callable[[Path], None]:
    """Return an edit that puts a pickle in place of the weights."""

    def replace_weights(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        state = {"weight": Payload(folder.parent / "trace")}
        torch.save(state, folder / name)
        # Also a plain pickle, which old files are.
        (folder / "old.pth").write_bytes(pickle.dumps(state))

    return replace_weights


def own_tower(folder: Path) -> None:
    """open_clip: the text tower of transformers has code of its own."""
    own_model(folder / "tower")
    code = (folder / "modeling_own.py").read_text()
    (folder / "tower" / "modeling_own.py").write_text(code)


def trusting_tokenizer(folder: Path) -> None:
    own_tokenizer(folder)
    described = json.loads((folder / "open_clip_config.json").read_text())
    described["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    write_json(folder, "open_clip_config.json", described)


build_st = build_text(bert, "bert", 128, sentence_files({"pooling_mode": "mean"}))
build_vit = build_image(
    lambda: ViTModel(ViTConfig(**VISION)),
    lambda: BitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False),
)
XLMR = FAMILIES["open_clip: xlm-roberta, text"].build
CLIP = FAMILIES["open_clip: clip, text"].build
CASES: dict[str, tuple[str, Any, Callable[[Path], None], Callable[[Path], None]]] = {
    "hf: model": ("hf", "text", build_text(bert, "bert", 128), own_model),
    "hf: known model": ("hf", "text", build_text(bert, "bert", 128), known_model),
    "hf: tokenizer": ("hf", "text", build_text(bert, "bert", 128), own_tokenizer),
    "hf: pickle": ("hf", "text", build_text(bert, "bert", 128), pickled("pytorch_model.bin")),
    "hf: image model": ("hf", "image", build_vit, own_model),
    "hf: processor": ("hf", "image", build_vit, own_processor),
    "hf: image pickle": ("hf", "image", build_vit, pickled("pytorch_model.bin")),
    "st: module": ("st", "text", build_st, own_module),
    "st: model": ("st", "text", build_st, own_model),
    "st: trusting model": ("st", "text", build_st, trusting_module),
    "st: tokenizer": ("st", "text", build_st, own_tokenizer),
    "st: pickle": ("st", "text", build_st, pickled("pytorch_model.bin")),
    "timm: config": ("timm", "image", FAMILIES["timm"].build, known_model),
    "timm: pickle": ("timm", "image", FAMILIES["timm"].build, pickled("pytorch_model.bin")),
    "open_clip: tower": ("open_clip", "text", XLMR, own_tower),
    "open_clip: tokenizer": ("open_clip", "text", XLMR, own_tokenizer),
    "open_clip: trusting tokenizer": ("open_clip", "text", XLMR, trusting_tokenizer),
    "open_clip: pickle": ("open_clip", "text", CLIP, pickled("open_clip_pytorch_model.bin")),
}
PACKAGES = {"st": "sentence_transformers", "open_clip": "open_clip"}


@pytest.mark.parametrize("name", CASES)
def test_what_a_folder_brings_does_not_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    library, modality, build, change = CASES[name]
    if library in PACKAGES:
        pytest.importorskip(PACKAGES[library])
    trace = tmp_path / "trace"
    questions: list[str] = []

    def say_yes(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", say_yes)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "own"))
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder)
    (folder / "modeling_own.py").write_text(CODE.format(trace=str(trace)))
    change(folder)
    spec = parse_encoder(f"{library}:{folder}", modality)
    load: Any = load_image_encoder if modality == "image" else load_text_encoder
    messages: list[str] = []
    for call in (
        lambda: load(spec, "cpu"),
        lambda: shape_tower(spec),
        lambda: load_preprocess(spec),
    ):
        try:
            call()
        except EncoderError as error:
            messages.append(str(error))
    assert not any("trust_remote_code=True" in message for message in messages)
    assert not any("\n" in message for message in messages)
    assert not trace.exists(), trace.read_text()
    assert questions == []


KERNEL = "someone/attention"
KERNEL_CASES: dict[str, tuple[str, Any, Callable[[Path], None], str, dict[str, Any]]] = {
    "hf": ("hf", "text", build_text(bert, "bert", 128), "config.json", {"attn_implementation": 0}),
    "hf, private name": (
        *("hf", "text", build_text(bert, "bert", 128), "config.json"),
        {"_attn_implementation": 0},
    ),
    "hf, by side": (
        *("hf", "text", build_text(bert, "bert", 128), "config.json"),
        {"attn_implementation": {"": 0}},
    ),
    "hf, image": ("hf", "image", build_vit, "config.json", {"attn_implementation": 0}),
    "st": ("st", "text", build_st, "config.json", {"attn_implementation": 0}),
    "st, arguments": (
        *("st", "text", build_st, "sentence_bert_config.json"),
        {"model_args": {"attn_implementation": 0}},
    ),
    "open_clip": ("open_clip", "text", XLMR, "tower/config.json", {"attn_implementation": 0}),
}


def named(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: named(inner, name) for key, inner in value.items()}
    return name


@pytest.mark.parametrize("attention", [KERNEL, "flash_attention_2", "paged|someone/attention"])
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_an_attention_from_elsewhere_is_never_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    attention: str,
) -> None:
    """With the package `kernels` the library would download it."""
    library, modality, build, file, values = KERNEL_CASES[name]
    if library in PACKAGES:
        pytest.importorskip(PACKAGES[library])
    loaded: list[Any] = []
    hub = "transformers.integrations.hub_kernels"
    monkeypatch.setattr(f"{hub}.is_kernels_available", lambda: True)
    monkeypatch.setattr(f"{hub}.get_kernel", lambda *names, **_: loaded.append(names))
    build(tmp_path)
    edit(tmp_path / file, **named(values, attention))
    spec = parse_encoder(f"{library}:{tmp_path}", modality)
    load: Any = load_image_encoder if modality == "image" else load_text_encoder
    with pytest.raises(EncoderError, match=r"asks for the attention.*which apecache never runs"):
        load(spec, "cpu")
    assert loaded == []


def test_the_librarys_own_attention_may_be_named(tmp_path: Path) -> None:
    build_text(bert, "bert", 128)(tmp_path)
    edit(tmp_path / "config.json", attn_implementation="eager")
    spec = parse_encoder(f"hf:{tmp_path}", "text")
    assert load_text_encoder(spec, "cpu").module.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["hf: model", "st: module", "st: model", "open_clip: tower"])
def test_the_refusal_says_that_code_of_a_repository_never_runs(tmp_path: Path, name: str) -> None:
    library, modality, build, change = CASES[name]
    if library in PACKAGES:
        pytest.importorskip(PACKAGES[library])
    build(tmp_path)
    (tmp_path / "modeling_own.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    change(tmp_path)
    with pytest.raises(EncoderError, match="which apecache never runs"):
        load_text_encoder(parse_encoder(f"{library}:{tmp_path}", modality), "cpu")


def test_the_same_folder_runs_its_code_where_it_is_trusted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trace is left by the code: without this the other tests could not fail."""
    from transformers import AutoModel

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "own"))
    folder = tmp_path / "model"
    build_text(bert, "bert", 128)(folder)
    (folder / "modeling_own.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    own_model(folder)
    AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "trace").exists()
    torch.save(Payload(tmp_path / "unpickled"), tmp_path / "pickle.pt")
    with (tmp_path / "pickle.pt").open("rb") as file:
        torch.load(file, weights_only=False)
    assert (tmp_path / "unpickled").exists()
