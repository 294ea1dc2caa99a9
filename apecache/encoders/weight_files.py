"""Name the weight files of each encoder library's repositories, the preferred ones first."""

HUB_PREFIX = "hf-hub:"
"""Before the hub id of a repository, where a name alone is one of the library's own."""
TRANSFORMERS_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*.bin"),
)
TIMM_WEIGHTS = (("model.safetensors",), ("pytorch_model.bin",))
OPEN_CLIP_WEIGHTS = (
    ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors"),
    ("open_clip_pytorch_model.bin", "pytorch_model.bin"),
)
SENTENCE_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "0_*/model*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "0_*/pytorch_model*.bin"),
)
